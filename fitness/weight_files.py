"""Single tensors out of a model's safetensors files, by the names that the model has for them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from evoprune.fitness.hub import one_line, weight_files
from evoprune.metrics.errors import InvalidInput

# Rows that are compared at a time.
_ROWS = 1024
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "I8": 1, "BOOL": 1}


class WeightFiles:
    """What the files of a model hold; nothing of it stays in memory.

    Args:
        folder: with the files.
        model: an empty model of this config, which says what there has to be.

    Attributes:
        again: names of tensors that are tied to one of another name.

    Raises:
        InvalidInput: no safetensors, one that cannot be read, a tensor that is missing or has another shape, or tied
            weights that differ.
    """

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        self._folder = folder
        self._places: dict[str, tuple[Path, str]] = {}
        self._bytes: dict[str, int] = {}
        self.again: set[str] = set()
        keys: dict[str, tuple[Path, tuple[int, ...], str]] = {}
        for path in weight_files(folder):
            with self._opened(path) as file:
                for key in list(file.keys()):
                    view = file.get_slice(key)
                    keys[key] = (path, tuple(view.get_shape()), view.get_dtype())
        twins: dict[int, list[str]] = {}
        state = model.state_dict(keep_vars=True)
        for name, value in state.items():
            twins.setdefault(id(value), []).append(name)
        for names in twins.values():
            spelled = [(name, key) for name in names for key in _spellings(name, model.base_model_prefix)]
            found = [(name, key) for name, key in spelled if key in keys]
            if not found:
                raise InvalidInput(
                    f"the weights in {folder} are incomplete, or called otherwise than in {type(model).__name__}: "
                    f"there is no {names[0]}"
                )
            path, shape, dtype = keys[found[0][1]]
            if shape != tuple(state[names[0]].shape):
                raise InvalidInput(f"the weights in {folder} do not fit its config.json: {names[0]} has another shape")
            self.again.update(names[1:])
            for name in names:
                self._places[name] = (path, found[0][1])
                self._bytes[name] = state[name].numel() * _BYTES.get(dtype, 8)
            for name, key in found[1:]:
                if not self._equal(self._places[name], (keys[key][0], key)):
                    raise InvalidInput(f"the weights in {folder} say {name} apart from {names[0]}, to which it is tied")

    def stored_bytes(self, name: str) -> int:
        """What a tensor takes in its file."""
        return self._bytes[name]

    def read(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor by the name that the model has for it; a floating one as `dtype`.

        Raises:
            InvalidInput: it cannot be read, or holds a NaN or an infinity.
        """
        path, key = self._places[name]
        with self._opened(path) as file:
            stored: Tensor = file.get_tensor(key)
            target = dtype if stored.is_floating_point() else stored.dtype
            # The file is mapped; a copy lets go of it.
            found = stored.to(device, target, copy=True)
            del stored
        if found.numel() and found.is_floating_point() and not all(bound.isfinite() for bound in found.aminmax()):
            raise InvalidInput(f"the weights in {self._folder} are damaged: {name} holds a NaN or an infinity")
        return found

    def _equal(self, first: tuple[Path, str], second: tuple[Path, str]) -> bool:
        with self._opened(first[0]) as left, self._opened(second[0]) as right:
            views = left.get_slice(first[1]), right.get_slice(second[1])
            if views[0].get_shape() != views[1].get_shape():
                return False
            starts = range(0, views[0].get_shape()[0], _ROWS)
            return all(torch.equal(*(view[at : at + _ROWS] for view in views)) for at in starts)

    def _opened(self, path: Path) -> Any:
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise InvalidInput(
                f"the weights in {self._folder} cannot be read: {path.name}: {one_line(error)}"
            ) from error


def _spellings(name: str, prefix: str) -> Iterable[str]:
    """What a tensor may be called in a file: files of a bare body lack its prefix, and some have one too many."""
    yield name
    if prefix and name.startswith(f"{prefix}."):
        yield name.removeprefix(f"{prefix}.")
    if prefix:
        yield f"{prefix}.{name}"
