"""COMP: whole blocks go first, then heads and neurons of the others, and a mask of real numbers makes up for these."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from evoprune.fitness.block_walk import BlockWalk
from evoprune.fitness.gram import wide
from evoprune.fitness.hidden_states import block_influence, without_block
from evoprune.fitness.methods import (
    GONE,
    METHODS,
    Evidence,
    ModelEdit,
    check_protected,
    least_influential,
)
from evoprune.fitness.removal_order import Problem
from evoprune.fitness.structure_build import named_parts, part_grams, replaced
from evoprune.fitness.structure_parts import Part, problem_of, spread
from evoprune.fitness.units import AttentionUnits, BlockUnits
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.parameters import check_range
from evoprune.metrics.records import removed_count
from evoprune.metrics.shape import BlockShape

CLIP = 10
"""No entry of a tuned mask is larger, in magnitude."""


@dataclass(frozen=True)
class CompMethod:
    """Drop the blocks of least influence for a part of the budget, then KV groups and neurons, and tune what stays.

    Parts are gone through in the order of a forward pass, each on what is left of those before it. From each go, a few
    at a time, the units whose columns of the output matrix would be missed least if all others made up for them; then
    every column that stays is multiplied by a number so that the output is what it was, as nearly as that goes. Where
    these numbers come to vary too much, the last step is undone and other parts lose more. What goes is worth the
    budget, or less than a neuron more. The paper's formulas could not be read; this is a reconstruction of it.

    Attributes:
        alpha: part of the budget that whole blocks pay for, rounded down to blocks.
        protect_first, protect_last: so many blocks at either end stay.
        bound: variance that the numbers of a matrix may have.
        ridge: pulls them to 1, in units of the mean diagonal of their normal equations.
        step: of the units that a part shall lose, how many go at a time.
    """

    alpha: float = 0.5
    protect_first: int = 2
    protect_last: int = 1
    bound: float = 0.1
    ridge: float = 1e-3
    step: float = 0.05

    source: ClassVar[str] = "reconstructed from COMP, arXiv:2501.15255"

    def __post_init__(self) -> None:
        check_protected(self.protect_first, self.protect_last)
        check_range("alpha of comp", self.alpha, 0, 1)
        check_range("step of comp", self.step, 0, 1)
        if self.bound < 0 or self.ridge <= 0:
            raise InvalidInput("the bound of comp is 0 or more, and its ridge above 0")

    def edit(self, evidence: Evidence) -> ModelEdit:
        units, model = evidence.units, evidence.language_model
        blocks = len(units)
        budget = removed_count(
            evidence.target, sum(_weights(part) for block in units for _, part in named_parts(block))
        )
        influence = block_influence(model, evidence.windows)
        going = removed_count(self.alpha * evidence.target, blocks)
        gone = least_influential(influence, going, self.protect_first, self.protect_last)
        stay = [block for block in units if block.block not in gone]
        cuts = {block.block: [_Cut(part) for _, part in named_parts(block)] for block in stay}
        budget -= sum(_weights(part) for block in units if block.block in gone for _, part in named_parts(block))
        names = [name for name, _ in model.blocks()]
        with ExitStack() as stack:
            for block in gone:
                stack.enter_context(without_block(model, names.index(units[block].name)))
            self._cut(evidence, stay, cuts, budget)
        found: dict[str, Any] = {
            "dropped": gone,
            "influence": influence,
            "at_bound": [cut.part.output.site.name for pair in cuts.values() for cut in pair if cut.stuck],
        }
        outputs = {
            cut.part.output.site.name: cut.output.to(model.model.dtype)
            for pair in cuts.values()
            for cut in pair
            if cut.output is not None
        }
        shapes = (_shape(*cuts[block.block]) if block.block in cuts else GONE for block in units)
        return ModelEdit(tuple(shapes), outputs=outputs, found=found)

    def _cut(self, evidence: Evidence, stay: Sequence[BlockUnits], cuts: dict[int, list[_Cut]], budget: int) -> None:
        """Go through the blocks until the budget is met, once if no part comes to its bound."""
        missing = budget
        while missing > 0:
            free = [cut for pair in cuts.values() for cut in pair if not cut.stuck and len(cut.kept) > 1]
            before = missing
            if free:
                missing = self._pass(evidence, stay, cuts, missing)
            if missing == before:
                raise InvalidInput(
                    f"comp finds no more to remove when {1 - missing / budget:.0%} of the heads and neurons that have "
                    f"to go are gone: give a larger bound than {self.bound:g}, a larger alpha or a smaller sparsity"
                )

    @torch.no_grad()
    def _pass(self, evidence: Evidence, stay: Sequence[BlockUnits], cuts: dict[int, list[_Cut]], missing: int) -> int:
        """Take what is missing from all parts that can lose it, in turn; what is missing then."""
        order = [cut for block in stay for cut in cuts[block.block]]
        walk = BlockWalk(evidence.language_model, [block.name for block in stay], [evidence.windows])
        with ExitStack() as stack:
            for place, block in enumerate(stay):
                if place:
                    walk.run({}, to=place)
                for cut in cuts[block.block]:
                    behind = [other for other in order[order.index(cut) :] if not other.stuck]
                    count = cut.share_of(missing, behind)
                    if count > 0:
                        (gram,) = part_grams(walk, [cut.part])
                        missing -= cut.lose(self, count, gram) * cut.unit_weights
                    if cut.output is not None:
                        stack.enter_context(
                            replaced(cut.part, spread(cut.part, cut.output, cut.columns), dropped=False)
                        )
                evidence.progress(place + 1, len(stay))
        return missing


class _Cut:
    """What is left of a part.

    Args:
        part: bound to the live model; its own output is dense while something of it goes.

    Attributes:
        units: how many it had.
        kept: those that stay, ascending.
        output: [out, columns of these] float32; None while all of them do.
        stuck: it has come to its bound.
    """

    def __init__(self, part: Part) -> None:
        self.part = part
        self.units = part.groups if isinstance(part, AttentionUnits) else part.neurons
        self.kept = list(range(self.units))
        self.output: Tensor | None = None
        self.stuck = False

    @property
    def unit_weights(self) -> int:
        """Weights in all matrices that go with a unit."""
        return _weights(self.part) // self.units

    @property
    def columns(self) -> list[int]:
        """Columns of the output that stay."""
        return self._columns(self.kept)

    def _columns(self, units: Sequence[int]) -> list[int]:
        size = self.part.output.site.in_features // self.units
        return [unit * size + offset for unit in units for offset in range(size)]

    def share_of(self, missing: int, behind: Sequence[_Cut]) -> int:
        """Units that go, so that all parts from this one on lose the same fraction; the last makes up for the rest."""
        if self.stuck or missing <= 0:
            return 0
        left = sum(len(cut.kept) * cut.unit_weights for cut in behind)
        wanted = missing * len(self.kept) / left
        if isinstance(self.part, AttentionUnits):
            count = math.floor(wanted + 0.5)
            # Heads are large: no more of them than what is missing is worth.
            count = min(count, missing // self.unit_weights)
        else:
            count = math.ceil(missing / self.unit_weights) if behind == [self] else math.floor(wanted)
        return min(count, len(self.kept) - 1)

    def lose(self, method: CompMethod, count: int, gram: Tensor) -> int:
        """Let so many units go, a few at a time, until the tuned mask varies too much; how many went.

        Args:
            gram: [in, in] float32, of what the output reads now.
        """
        problem, dense = problem_of(self.part, gram), self.part.output.weight().float()
        normal = mask_equations(dense, gram)
        each, left = max(math.ceil(method.step * count), 1), count
        while left > 0:
            errors = removal_errors(problem, self.columns).reshape(len(self.kept), -1).sum(1)
            gone = set(errors.argsort(stable=True)[: min(each, left)].tolist())
            kept = [unit for place, unit in enumerate(self.kept) if place not in gone]
            columns = self._columns(kept)
            tuned = tuned_mask(normal, columns, method.ridge)
            if tuned.var(unbiased=False) > method.bound:
                self.stuck = True
                break
            self.kept = kept
            self.output = dense[:, columns] * tuned.to(dense.dtype)
            left -= len(gone)
        return count - left


def removal_errors(problem: Problem, columns: Sequence[int]) -> Tensor:
    """[columns]: the output error of taking away one more of these columns, if the others of them make up for it.

    q_j = |W_:j|² / G_jj with G the inverse of the damped Gram matrix of these columns.

    Source: reconstruction of COMP in weight compression operators, section 6; Hassibi and Stork 1992.
    """
    kept = torch.tensor(columns, dtype=torch.int64, device=problem.hessian.device)
    factor = torch.linalg.cholesky(wide(problem.hessian)[kept][:, kept])
    return wide(problem.weight)[:, kept].square().sum(0) / torch.cholesky_inverse(factor).diagonal()


def mask_equations(weight: Tensor, gram: Tensor) -> Tensor:
    """[in, in] float64: H ∘ WᵀW, the normal equations of numbers by which columns of W are multiplied.

    Args:
        weight: W, [out, in].
        gram: H, [in, in], of the inputs, of any scale.
    """
    weight = wide(weight)
    return wide(gram) * (weight.T @ weight)


def tuned_mask(normal: Tensor, columns: Sequence[int], ridge: float) -> Tensor:
    """[columns] float64, within ±`CLIP`: by what the columns that stay are multiplied to give what all of them gave.

    The least-squares solution of min |Σ_j W_:j x_j - Σ_{j kept} μ_j W_:j x_j|², pulled to 1 and not to 0 by the ridge,
    so that it is 1 where nothing is gone.

    Args:
        normal: of all columns, as `mask_equations` gives them.
        columns: those that stay.
        ridge: in units of the mean diagonal of `normal`.

    Source: reconstruction of COMP in weight compression operators, section 6.
    """
    kept = torch.tensor(columns, dtype=torch.int64, device=normal.device)
    pull = ridge * normal.diagonal().mean().clamp(min=torch.finfo(normal.dtype).tiny)
    rows = normal[kept]
    matrix = rows[:, kept] + pull * torch.eye(len(kept), dtype=normal.dtype, device=normal.device)
    right = rows.sum(1, keepdim=True) + pull
    return torch.cholesky_solve(right, torch.linalg.cholesky(matrix))[:, 0].clamp(-CLIP, CLIP)


def _weights(part: Part) -> int:
    return sum(bound.site.weights for bound in (*part.inputs, part.output))


def _shape(attention: _Cut, mlp: _Cut) -> BlockShape:
    assert isinstance(attention.part, AttentionUnits)
    each = attention.part.heads // attention.part.groups
    heads = [group * each + head for group in attention.kept for head in range(each)]
    return BlockShape(tuple(attention.kept), tuple(heads), tuple(mlp.kept))


METHODS.add("comp", CompMethod())
