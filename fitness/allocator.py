"""Getting freed memory back from the C library."""

from __future__ import annotations

import ctypes

_M_MMAP_THRESHOLD = -3  # glibc's malloc.h
_OWN_MAPPING_BYTES = 1 << 20


def release_freed_tensors() -> None:
    """From now on, have glibc give a tensor's memory back to the system as soon as the tensor is freed.

    By itself glibc puts blocks of up to 32 MiB on its heap, where the aligned blocks that torch asks for leave holes
    that later ones do not fit into: one backward pass of a 180 M-parameter model left 0.6 times the weights' bytes
    unused but private. With a mapping of its own for each block above 1 MiB that is gone, at no measurable cost in
    time. Holds for the whole process; does nothing where the C library is another.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, _OWN_MAPPING_BYTES)
