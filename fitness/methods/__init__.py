"""Methods: published ways to make a model smaller in one go, of the whole model at once. Plug-ins, one file each.

A method is a frozen dataclass whose fields are its parameters, with their defaults. It leaves the model as it is and
says what to do with it; `apply_edit` then does that, the same way for all of them.
Source: weight compression operators, section 0.2 (model-level operators).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from evoprune.fitness.forms import cut_model
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.samples import Sequences
from evoprune.fitness.units import BlockUnits
from evoprune.metrics import parameters
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.records import removed_count
from evoprune.metrics.registry import Registry
from evoprune.metrics.shape import BlockShape

DEFAULT_SPARSITY = 0.25
"""Of the prunable weights, where nobody says how much goes."""

GONE = BlockShape((), (), ())
"""Of a block that goes as a whole."""


@dataclass(frozen=True)
class Evidence:
    """What a method may look at.

    Attributes:
        language_model: dense; its weights may be changed, and are as they were at the end.
        units: of its blocks; see `evoprune.fitness.units.find_units`.
        windows: text A, [n, window] int64 token ids or samples.
        sparsity: fraction of the prunable weights that goes, in (0, 1); None if the user gave none.
        progress: called with (done, total).
    """

    language_model: LanguageModel
    units: Sequence[BlockUnits]
    windows: Sequences
    sparsity: float | None = None
    progress: Callable[[int, int], None] = lambda done, total: None

    @property
    def target(self) -> float:
        """The fraction that goes, by default `DEFAULT_SPARSITY`."""
        return DEFAULT_SPARSITY if self.sparsity is None else self.sparsity

    def blocks_to_go(self) -> int:
        """How many whole blocks the budget is: as many as it pays for, rounded down.

        Raises:
            InvalidInput: none, or all of them.
        """
        blocks = len(self.units)
        going = removed_count(self.target, blocks)
        if not 0 < going < blocks:
            raise InvalidInput(
                f"a sparsity of {self.target:g} is less than one of {blocks} blocks: give {_share(1, blocks)} or more"
                if not going
                else f"a model of {blocks} blocks cannot lose {going}: one has to stay"
            )
        return going


@dataclass(frozen=True)
class ModelEdit:
    """What a method does to a model.

    Attributes:
        blocks: what every block keeps, in model order; `GONE` where it goes as a whole.
        replaced: new values of parameters of blocks that stay, by name, as large and of the dtype as they were.
        outputs: weights of output projections, [out, kept] by name of the site; see `Surgeon.apply`.
        found: what it found on its way, JSON values.
    """

    blocks: tuple[BlockShape, ...]
    replaced: Mapping[str, Tensor] = field(default_factory=dict)
    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    found: Mapping[str, Any] = field(default_factory=dict)


class Method(Protocol):
    """Makes a model smaller. Deterministic; a frozen dataclass of plain parameters.

    Attributes:
        source: the paper it is from.
    """

    @property
    def source(self) -> str: ...

    def edit(self, evidence: Evidence) -> ModelEdit:
        """What to do with a model, whose weights are as before at the end.

        Raises:
            InvalidInput: a parameter does not fit this model, or the budget cannot be met.
        """


METHODS: Registry[Method] = Registry("method", "evoprune.fitness.methods")


def configured(name: str, given: Mapping[str, Any] | None = None) -> Method:
    """A registered method with some parameters changed; see `evoprune.metrics.parameters.configured`."""
    return parameters.configured(METHODS, name, given)


@torch.no_grad()
def apply_edit(language_model: LanguageModel, edit: ModelEdit, form: str = "auto") -> tuple[LanguageModel, str]:
    """Do to a model, in place, what a method says.

    Args:
        language_model: dense.
        edit: of this model.
        form: as of `cut_model`.

    Returns:
        The model with the sites that it has now, and the form that it got.

    Raises:
        InvalidInput: see `cut_model`; the weights may then be changed: load the model again.
    """
    for name, value in edit.replaced.items():
        language_model.model.get_parameter(name).copy_(value)
    return cut_model(language_model, edit.blocks, edit.outputs, form)


def without(evidence: Evidence, gone: Sequence[int]) -> tuple[BlockShape, ...]:
    """The shape of a model of which these blocks go as a whole and all others stay as they are."""
    return tuple(GONE if block.block in gone else block.widths.whole for block in evidence.units)


def check_protected(first: int, last: int) -> None:
    """Refuse numbers of protected blocks below 0.

    Raises:
        InvalidInput: says what would be right.
    """
    if first < 0 or last < 0:
        raise InvalidInput(f"{first} first and {last} last blocks cannot be protected: give 0 or more")


def least_influential(
    influence: Sequence[float], going: int, protect_first: int = 0, protect_last: int = 0
) -> list[int]:
    """The blocks of least influence, ascending; of equals the earlier.

    Args:
        influence: of each block.
        going: how many.
        protect_first, protect_last: so many blocks at either end are not asked.

    Raises:
        InvalidInput: fewer are not protected.
    """
    free = range(protect_first, len(influence) - protect_last)
    if going > len(free):
        raise InvalidInput(
            f"{going} blocks cannot go where {len(free)} of {len(influence)} are not protected: protect fewer, or give "
            "a smaller sparsity"
        )
    return sorted(sorted(free, key=lambda block: (influence[block], block))[:going])


def _share(part: int, whole: int) -> str:
    """A fraction for people, rounded up so that it is enough."""
    return f"{math.ceil(1e4 * part / whole) / 1e4:g}"
