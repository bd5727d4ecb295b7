"""Recovery: what is left of a pruned model is trained for a budget of tokens, and stays as pruned as it was."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from evoprune.fitness.cache import disk_errors
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.recoveries import Recovery, kept_weights
from evoprune.fitness.text import token_windows, training_side
from evoprune.metrics.errors import EvopruneError, InvalidInput
from evoprune.metrics.files import content_hash, derived_seed, write_atomically
from evoprune.metrics.parameters import parameters_of

LOSSES = ("distill", "lm")
# Where positions are not bounded, and where they are by more.
LONGEST_WINDOW = 2048

_FORMAT, _RECORD = "evoprune recovery 1", "recovery.json"


@dataclass(frozen=True)
class Recovered:
    """What a recovery did.

    Attributes:
        tokens: trained on, each counted as often as it was read.
        steps: of the optimiser.
        parameters: how many learned.
        learning_rate: behind the warm-up.
        continued: the step from which an interrupted training went on; 0 from the start.
        discarded: whether there was a checkpoint, of another training.
        seconds: in this process.
    """

    tokens: int
    steps: int
    parameters: int
    learning_rate: float
    continued: int
    discarded: bool
    seconds: float


def training_windows(language_model: LanguageModel, source: str, tokens: int, seed: int) -> Tensor:
    """What a model learns from: windows of the text in random order, and again in another once it has seen all.

    Args:
        source: as in `evoprune.fitness.text`; what is read of it is its `training_side`.
        tokens: budget, filled up to the last window.
        seed: of the order.

    Returns:
        [n, window] int64 with n * window <= tokens; a window is as long as the model reads, up to 2,048 tokens.

    Raises:
        InvalidInput: the budget holds no window, or the text none.
    """
    window = min(LONGEST_WINDOW, language_model.context or LONGEST_WINDOW)
    count = tokens // window
    if count < 1:
        raise InvalidInput(f"{tokens} tokens of recovery do not fill one window of {window}: give {window} or more")
    side = training_side(source)
    found = token_windows(language_model.tokenizer, source, side, window=window, count=1, seed=seed, spare=count - 1)
    rounds, missing = [found], count - len(found)
    while missing > 0:
        draws = torch.Generator().manual_seed(derived_seed(seed, "recovery-order", len(rounds)))
        rounds.append(found[torch.randperm(len(found), generator=draws)[:missing]])
        missing -= len(rounds[-1])
    return torch.cat(rounds)


def recover(
    language_model: LanguageModel,
    recovery: Recovery,
    windows: Tensor,
    *,
    dense: PreTrainedModel | None = None,
    seed: int = 0,
    folder: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Recovered:
    """Train what is left of a pruned model, in place: its classes, shapes, dtypes and zeros are the same afterwards.

    A weight that is zero stays zero, exactly; see `kept_weights`. Parameters are float32 while they learn.

    Args:
        language_model: pruned or cut.
        recovery: a configured one of `RECOVERIES`; its packages are there.
        windows: what it learns from; see `training_windows`.
        dense: the model that was pruned, whose distribution it then learns; None: it learns the text.
        seed: of what is drawn.
        folder: for checkpoints of the training; one that lies there and is of the same training is continued, and on
            a CPU ends where the undisturbed training does. None writes nothing.
        progress: called with (done, all) in steps.

    Raises:
        InvalidInput: the folder holds something else, or the device is not the first GPU.
        EvopruneError: the recovery broke its contract.
    """
    from evoprune.fitness.recovery_trainer import train

    model, device = language_model.model, language_model.device
    if device.type == "cuda" and device.index not in (None, 0):
        raise InvalidInput(
            f"a recovery trains on the first GPU, and the model is on {device}: set CUDA_VISIBLE_DEVICES"
        )
    began = time.monotonic()
    kept = kept_weights(language_model)
    discarded = False
    if folder is not None:
        discarded = _prepare(folder, _identity(language_model, recovery, windows, dense, seed))
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    before = _layout(language_model)
    # Not by the model's own method: that would cast the buffers of positions too.
    _cast(model, dict.fromkeys(dtypes, torch.float32))
    # What `Trainer` sets in it would be written with the model.
    config = dict(vars(model.config))
    with torch.random.fork_rng():
        torch.manual_seed(derived_seed(seed, "recovery"))
        recovery.begin(language_model, kept)
    try:
        trained = train(
            language_model, recovery, windows, dense=dense, kept=kept, seed=seed, folder=folder, progress=progress
        )
    finally:
        vars(model.config).clear()
        vars(model.config).update(config)
        recovery.end(language_model, kept)
        model.eval().requires_grad_(False)
        _cast(model, dtypes)
    if _layout(language_model) != before or any(
        bool((model.get_parameter(name)[~keep] != 0).any()) for name, keep in kept.items()
    ):
        raise EvopruneError("the recovery changed the layout of the model, or weights that had been pruned")
    if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
        raise EvopruneError("the recovery ended in weights that are not finite: give a lower learning_rate")
    seconds = time.monotonic() - began
    return Recovered(**asdict(trained), tokens=windows.numel(), discarded=discarded, seconds=seconds)


def check_folder(folder: Path) -> None:
    """Refuse a folder for checkpoints that holds anything else; worth asking before long work.

    Raises:
        InvalidInput: it does.
    """
    with disk_errors(folder):
        if folder.exists() and not folder.is_dir():
            raise InvalidInput(f"{folder} is a file, where checkpoints of the recovery would go: move it away")
        if folder.is_dir() and any(folder.iterdir()) and _identity_in(folder) is None:
            raise InvalidInput(f"{folder} holds other files, where checkpoints of the recovery would go: move it away")


def remove_folder(folder: Path) -> None:
    """Delete the checkpoints of a recovery once its result is safe."""
    check_folder(folder)
    shutil.rmtree(folder, ignore_errors=True)


def _prepare(folder: Path, identity: str) -> bool:
    """Make `folder` that of this training; whether it was that of another, whose checkpoints are gone now."""
    check_folder(folder)
    found = _identity_in(folder)
    if found == identity:
        return False
    with disk_errors(folder):
        if found is not None:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / _RECORD, json.dumps({"format": _FORMAT, "identity": identity}) + "\n")
    return found is not None


def _identity_in(folder: Path) -> str | None:
    """Which training the checkpoints in a folder are of; None if they are none of ours."""
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        return None
    return str(record.get("identity"))


def _identity(
    language_model: LanguageModel, recovery: Recovery, windows: Tensor, dense: PreTrainedModel | None, seed: int
) -> str:
    """A hash of all that decides what a training ends in, the machine apart."""
    return content_hash(
        {
            "weights": _hash(language_model.model),
            "dense": None if dense is None else _hash(dense),
            "recovery": [type(recovery).__name__, parameters_of(recovery)],
            "windows": [*windows.shape, hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest()],
            "seed": seed,
            "versions": [torch.__version__, transformers.__version__],
        }
    )


def _hash(model: PreTrainedModel) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.dtype} {list(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _layout(language_model: LanguageModel) -> list[tuple[str, type, dict[str, torch.Size]]]:
    """Which modules there are, and what parameters they have."""
    return [
        (name, type(module), {key: value.shape for key, value in module.named_parameters(recurse=False)})
        for name, module in language_model.model.named_modules()
    ]


def _cast(model: PreTrainedModel, dtypes: Mapping[str, torch.dtype]) -> None:
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
