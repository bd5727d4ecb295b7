"""Hidden states of a text in a file: written batch by batch, read one batch at a time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evoprune.metrics.errors import InvalidInput


class FileStates:
    """Hidden states of batches, one behind the other in a file; what is read is a private copy.

    Nothing is mapped: the pages of a mapped file count as the process's own.

    Args:
        path: a new file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._shapes: list[list[int]] = []
        self._starts = [0]
        self._dtype: torch.dtype | None = None

    def append(self, hidden: Tensor, /) -> None:
        """Write the states of the next batch, on the CPU; all batches have one dtype."""
        with self.path.open("ab" if self._shapes else "wb") as stream:
            hidden.contiguous().view(torch.uint8).numpy().tofile(stream)
        self._shapes.append(list(hidden.shape))
        self._starts.append(self._starts[-1] + hidden.numel() * hidden.element_size())
        self._dtype = hidden.dtype

    def __getitem__(self, number: int, /) -> Tensor:
        """The states of a batch."""
        assert self._dtype is not None
        start, end = self._starts[number : number + 2]
        content = np.fromfile(self.path, dtype=np.uint8, count=end - start, offset=start)
        if len(content) != end - start:
            raise InvalidInput(f"{self.path} is damaged: delete {self.path.parent} and run again")
        return torch.from_numpy(content).view(self._dtype).view(self._shapes[number])

    def flush(self) -> None:
        """Bring it to the disk."""
        with self.path.open("rb") as stream:
            os.fsync(stream.fileno())

    def to_json(self) -> dict[str, Any]:
        """What is needed to find it again."""
        return {"file": self.path.name, "shapes": self._shapes, "dtype": str(self._dtype).removeprefix("torch.")}

    @classmethod
    def from_json(cls, folder: Path, document: dict[str, Any]) -> FileStates:
        """The states of which `to_json` told."""
        found = cls(folder / document["file"])
        found._shapes = document["shapes"]
        found._dtype = getattr(torch, document["dtype"])
        size = found._dtype.itemsize
        found._starts = [0, *np.cumsum([size * int(np.prod(shape)) for shape in found._shapes]).tolist()]
        return found
