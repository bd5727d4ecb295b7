"""Masks as text: packed bits in hexadecimal, the first entry in the highest bit."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def packed(mask: NDArray[np.bool_]) -> str:
    """A mask [n] bool in hexadecimal, eight entries a byte."""
    return np.packbits(mask).tobytes().hex()


def unpacked(text: str, n: int) -> NDArray[np.bool_]:
    """The mask [n] bool that `packed` wrote.

    Raises:
        ValueError: it is no hexadecimal.
    """
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8), count=n).astype(np.bool_)
