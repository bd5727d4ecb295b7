"""Training a cut model for a moment, to see what it will recover: the fitness of training-aware selection.

What is trained are the parameters that the cut model has, so nothing that was pruned grows back; float32 masters take
the updates, which half precision would round away. The order of the text is the same for every candidate. Afterwards
the model has the very parameters that it had before.
Source: Tang et al. 2025 (DarwinLM, arXiv:2502.07780), section 3.2; layerwise sparsity allocation, section 5.7.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from evoprune.fitness.examples import read_side
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.samples import Sequences, forward_batches
from evoprune.fitness.teacher import Teacher, batch_loss, build_teacher
from evoprune.fitness.units import BlockUnits

Trainable = Literal["outputs", "all"]
Loss = Literal["kl", "ce"]

WARM_UP = 0.05
"""Share of the steps in which the learning rate grows to its constant value."""
BETAS = (0.9, 0.95)
CLIP = 1.0


@dataclass(frozen=True)
class Training:
    """How long and with what a candidate is trained.

    Attributes:
        tokens: of text A, at least: windows are whole.
        batch_tokens: of a step, at most, but one window at least.
        trainable: ``outputs`` are the output matrices of attentions and MLPs, and all norms; ``all`` is everything but
            embeddings and the output head.
        loss: ``kl`` from the dense model, or ``ce``, the cross entropy of the next token.
        learning_rate: after warm-up.
    """

    tokens: int
    batch_tokens: int
    trainable: Trainable
    loss: Loss
    learning_rate: float

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` reads them back."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Training:
        """What `to_json` gave."""
        return cls(**values)


@dataclass(frozen=True)
class TrainingText:
    """What candidates are trained on, each from the first batch to the last.

    Attributes:
        windows: of text A, or samples.
        teacher: the dense model on them; None for the cross entropy.
        rows: windows of a step; samples are steps of their own.
    """

    windows: Sequences
    teacher: Teacher | None
    rows: int


def build_training_text(
    language_model: LanguageModel, head: nn.Linear | None, training: Training, source: str, *, window: int, seed: int
) -> TrainingText:
    """Read the text, and run the dense model over it once.

    Args:
        language_model: dense.
        head: what `linear_head` found.
        training: how long.
        source: of text A.
        window: tokens of a window.
        seed: draws the windows.

    Raises:
        InvalidInput: the text is too short, or nowhere.
    """
    count = -(-training.tokens // window)
    windows = read_side(language_model, source, "A", window=window, count=count, seed=seed)
    teacher = build_teacher(language_model.model, head, windows) if training.loss == "kl" else None
    return TrainingText(windows, teacher, max(training.batch_tokens // window, 1))


@contextmanager
def trained(
    language_model: LanguageModel,
    units: Sequence[BlockUnits],
    head: nn.Linear | None,
    training: Training,
    text: TrainingText,
) -> Iterator[list[nn.Parameter]]:
    """Inside, the model has been trained; behind, it has its own parameters again.

    AdamW without weight decay, gradients clipped to a norm of 1, the learning rate growing over the first twentieth of
    the steps.

    Args:
        language_model: cut or whole.
        units: of the dense model.
        head: what `linear_head` found; neither it nor the embeddings are trained, so the teacher stays that of the
            model.
        training, text: how, and on what.

    Yields:
        What has been trained, in the order of the model.
    """
    places = trainable_places(language_model, units, training.trainable)
    before = [module.get_parameter(name) for module, name in places]
    live = [nn.Parameter(parameter.detach().clone()) for parameter in before]
    _put(places, live)
    try:
        with torch.enable_grad():
            _train(language_model, head, training, text, live)
        for parameter in live:
            parameter.requires_grad_(False)
        yield live
    finally:
        _put(places, before)


def trainable_places(
    language_model: LanguageModel, units: Sequence[BlockUnits], trainable: Trainable
) -> list[tuple[nn.Module, str]]:
    """Where the parameters are that are trained: modules of the live model, and the names of parameters in them."""
    parts = [part for block in units for part in (block.attention, block.mlp)]
    outputs = {part.output.module for part in parts}
    inputs = {bound.module for part in parts for bound in part.inputs}
    blocks = language_model.blocks()
    found = []
    for _, block in blocks:
        for module in block.modules():
            for name, parameter in module.named_parameters(recurse=False):
                norm = parameter.dim() == 1 and module not in inputs
                if trainable == "all" or module in outputs or norm:
                    found.append((module, name))
    # Beside the list of blocks stands the last norm.
    body = language_model.model.get_submodule(blocks[0][0].rpartition(".")[0].rpartition(".")[0])
    for module in body.children():
        found += [(module, name) for name, norm in module.named_parameters(recurse=False) if norm.dim() == 1]
    return found


def _put(places: Sequence[tuple[nn.Module, str]], parameters: Sequence[nn.Parameter]) -> None:
    for (module, name), parameter in zip(places, parameters, strict=True):
        setattr(module, name, parameter)


def _train(
    language_model: LanguageModel,
    head: nn.Linear | None,
    training: Training,
    text: TrainingText,
    live: Sequence[nn.Parameter],
) -> None:
    if not live:
        return
    masters: list[Tensor] = [parameter.detach().float().clone() for parameter in live]
    optimizer = torch.optim.AdamW(masters, lr=training.learning_rate, betas=BETAS, weight_decay=0.0)
    batches = list(forward_batches(text.windows, text.rows, language_model.device))
    warm, first = max(round(WARM_UP * len(batches)), 1), 0
    with _repeatable(language_model.device):
        for step, batch in enumerate(batches, 1):
            teacher = None if text.teacher is None else text.teacher[slice(first, first + batch.rows)]
            first += batch.rows
            loss = batch_loss(language_model.model, head, batch, teacher)
            gradients = torch.autograd.grad(loss, live, allow_unused=True, materialize_grads=True)
            for master, gradient in zip(masters, gradients, strict=True):
                master.grad = gradient.float()
            nn.utils.clip_grad_norm_(masters, CLIP)
            for group in optimizer.param_groups:
                group["lr"] = training.learning_rate * min(step / warm, 1)
            optimizer.step()
            with torch.no_grad():
                for parameter, master in zip(live, masters, strict=True):
                    parameter.copy_(master)


def _repeatable(device: torch.device) -> Any:
    """On a GPU, attention whose gradients are the same each time; on a CPU they are anyway."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else nullcontext()
