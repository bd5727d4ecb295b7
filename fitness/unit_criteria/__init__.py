"""Unit criteria: how much each KV group, query head and neuron of a block is worth keeping. Plug-ins, one file each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from evoprune.fitness.adapters import SiteModule
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.units import BlockUnits, find_units
from evoprune.metrics.errors import EvopruneError, InvalidInput
from evoprune.metrics.registry import Registry
from evoprune.metrics.shape import BlockShape

Spread = Literal["uniform", "global"]
"""Where scores are compared: inside each block, which all lose the same fraction, or between all units of a model."""


@dataclass(frozen=True, slots=True)
class UnitScores:
    """Scores of the units of one block, low = removed first.

    Attributes:
        groups: [KV groups] float32, of whole groups with their query heads.
        heads: [query heads] float32, to be compared inside their group.
        neurons: [neurons] float32.
    """

    groups: Tensor
    heads: Tensor
    neurons: Tensor


class UnitEvidence(Protocol):
    """Statistics of a dense model, as `evoprune.fitness.statistics.Statistics` holds them.

    Attributes:
        sequences, tokens: how many they are from.
    """

    sequences: int
    tokens: int

    def tensor(self, site: str, name: str) -> Tensor:
        """One statistic of a matrix, a private float32 copy: [1, in] of its inputs, [out, in] of its gradients."""


class UnitCriterion(Protocol):
    """Scores units. Deterministic.

    Attributes:
        needs: names of the statistics that it reads.
        spread: where its authors compare its scores.
        source: the paper it is from.
    """

    @property
    def needs(self) -> frozenset[str]: ...

    @property
    def spread(self) -> Spread: ...

    @property
    def source(self) -> str: ...

    def scores(self, block: BlockUnits, evidence: UnitEvidence) -> UnitScores:
        """Scores of the units of one dense block."""


@runtime_checkable
class Compensating(UnitCriterion, Protocol):
    """A criterion whose authors make up for what goes."""

    def additions(self, block: BlockUnits, shape: BlockShape, evidence: UnitEvidence) -> dict[str, Tensor | None]:
        """[out] each, to be added to the outputs of the output and down matrix, by their names; None adds nothing."""


UNIT_CRITERIA: Registry[UnitCriterion] = Registry("unit criterion", "evoprune.fitness.unit_criteria")


@torch.no_grad()
def score_units(
    language_model: LanguageModel, criterion: UnitCriterion, evidence: UnitEvidence | None = None
) -> list[UnitScores]:
    """Scores of the units of every decoder block, on the CPU, in model order.

    Args:
        language_model: dense, of a family that can be cut.
        criterion: one of `UNIT_CRITERIA`.
        evidence: holds at least its `needs`; None if those are none.

    Raises:
        InvalidInput: the family cannot be cut, or a score is no finite number.
    """
    if evidence is None:
        evidence = _Nothing()
    found = []
    for block in find_units(language_model):
        scores = criterion.scores(block, evidence)
        for what, values in (("KV groups", scores.groups), ("heads", scores.heads), ("neurons", scores.neurons)):
            if not bool(values.isfinite().all()):
                raise InvalidInput(f"the scores of {what} of {block.name} are not finite: nothing follows from them")
        found.append(UnitScores(scores.groups.cpu(), scores.heads.cpu(), scores.neurons.cpu()))
    return found


class _Nothing:
    """Evidence for criteria that read weights alone."""

    sequences = tokens = 0

    def tensor(self, site: str, name: str) -> Tensor:
        raise EvopruneError(f"the unit criterion reads {name}, which is not among its needs")


def weight(bound: SiteModule) -> Tensor:
    """[out, in] float32."""
    return bound.weight().float()


def statistic(bound: SiteModule, evidence: UnitEvidence, name: str) -> Tensor:
    """A statistic of a matrix, where the matrix is; shapes as in `UnitEvidence`."""
    return evidence.tensor(bound.site.name, name).to(bound.weight().device)


def coupled_sums(
    block: BlockUnits, rows: Callable[[SiteModule], Tensor], columns: Callable[[SiteModule], Tensor]
) -> UnitScores:
    """Scores of all that goes with a unit, added up: a group counts its keys, values and all of its query heads.

    Args:
        block: whose units.
        rows: [out] scores of the rows of a matrix that units are rows of.
        columns: [in] scores of the columns of a matrix that units are columns of.
    """
    attention, mlp = block.attention, block.mlp
    outputs = output_sums(block, columns)
    query, key = attention.heads * attention.head_dim, attention.groups * attention.head_dim
    # In one matrix or three, the rows are those of query, key and value, in this order.
    parts = torch.cat([rows(bound) for bound in attention.inputs]).split([query, key, key])
    queries, keys, values = (part.reshape(-1, attention.head_dim).sum(1) for part in parts)
    heads = queries + outputs.heads
    neurons = torch.cat([rows(bound) for bound in mlp.inputs]).reshape(-1, mlp.neurons).sum(0) + outputs.neurons
    return UnitScores(keys + values + heads.reshape(attention.groups, -1).sum(1), heads, neurons)


def output_sums(block: BlockUnits, columns: Callable[[SiteModule], Tensor]) -> UnitScores:
    """Scores of the columns of output and down matrices, added up over heads and groups; arguments as above."""
    attention, mlp = block.attention, block.mlp
    heads = columns(attention.output).reshape(attention.heads, attention.head_dim).sum(1)
    return UnitScores(heads.reshape(attention.groups, -1).sum(1), heads, columns(mlp.output))
