"""Checkpoints of a recovery's training: numbers and JSON, where those of `Trainer` are pickles in part.

One is a folder with a safetensors file, which holds what learns, the state of the optimiser and, as JSON in its header,
that of the schedule. The JSON that `Trainer` reads is written last, and without it a checkpoint does not count. No
generator has a state worth saving: each step seeds its own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.files import write_atomically

_STATE, _TRAINER = "training.safetensors", "trainer_state.json"
_PARAMETER, _OPTIMIZER = "parameter", "optimizer"


@dataclass(frozen=True)
class TrainingState:
    """Where a training is.

    Attributes:
        step: how many of its steps are done.
        parameters: what learns, by name.
        optimizer: the state of the optimiser for each of them, by their number.
        schedule: the state of the schedule: JSON values.
    """

    step: int
    parameters: dict[str, Tensor]
    optimizer: dict[int, dict[str, Tensor]]
    schedule: dict[str, Any]


def learning(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of what asks for gradients."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def write_state(folder: Path, state: TrainingState, batch_size: int) -> None:
    """Write a checkpoint into `folder`, and delete those before.

    Args:
        folder: of the training.
        state: what goes into it.
        batch_size: windows in a pass, which `Trainer` compares.
    """
    place = folder / f"checkpoint-{state.step}"
    place.mkdir(parents=True, exist_ok=True)
    tensors = {f"{_PARAMETER}.{name}": value for name, value in state.parameters.items()}
    for index, values in state.optimizer.items():
        tensors |= {f"{_OPTIMIZER}.{index}.{name}": value for name, value in values.items()}
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_atomically(place / _STATE, save(plain, {"schedule": json.dumps(state.schedule)}))
    write_atomically(place / _TRAINER, json.dumps({"global_step": state.step, "train_batch_size": batch_size}) + "\n")
    for other in folder.glob("checkpoint-*"):
        if other != place:
            shutil.rmtree(other, ignore_errors=True)


def last_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint in a folder that is whole."""
    return max((place for place in folder.glob("checkpoint-*") if _is_whole(place)), key=_step, default=None)


def read_state(place: Path, model: nn.Module) -> TrainingState:
    """The checkpoint in a folder, of a training of `model`.

    Raises:
        InvalidInput: it holds something else.
    """
    parameters: dict[str, Tensor] = {}
    optimizer: dict[int, dict[str, Tensor]] = {}
    schedule = {}
    try:
        with safe_open(place / _STATE, framework="pt") as file:
            schedule = json.loads(file.metadata()["schedule"])
            for key in list(file.keys()):
                kind, _, rest = key.partition(".")
                if kind == _PARAMETER:
                    parameters[rest] = file.get_tensor(key)
                else:
                    index, _, name = rest.partition(".")
                    optimizer.setdefault(int(index), {})[name] = file.get_tensor(key)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        parameters = {}
    shapes = {name: parameter.shape for name, parameter in learning(model)}
    if {name: value.shape for name, value in parameters.items()} != shapes:
        raise InvalidInput(f"{place} is damaged: delete {place.parent} to train from the start")
    return TrainingState(_step(place), parameters, optimizer, schedule)


def _is_whole(place: Path) -> bool:
    try:
        found = json.loads((place / _TRAINER).read_text(encoding="utf-8"))
        return found.keys() == {"global_step", "train_batch_size"} and found["global_step"] == _step(place)
    except (OSError, ValueError, AttributeError):
        return False


def _step(place: Path) -> int:
    return int(place.name.rpartition("-")[2])
