"""The self-test of an export: seeded inputs that any machine can make, and what the metric gives for them."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from evoprune.metrics.criterion import Metric
from evoprune.metrics.emit_runtime import draw
from evoprune.metrics.expression import Expression
from evoprune.metrics.interpreter import evaluate, free_inputs
from evoprune.metrics.mask import mask
from evoprune.metrics.records import MaskRule, Site
from evoprune.metrics.terminals import TERMINALS
from evoprune.metrics.types import NONNEGATIVE, Type

ROWS = 8
_SPARSITY = 0.5
_MIN_COLUMNS = 32

# Inputs are redrawn until no score is this close to the cut, relatively: exp and pow differ in their last bits between
# machines.
_CLEAR_GAP = 1e-4
_DRAWS = 16

# The scalars that follow from the shape; all other terminals but the weight are arguments of an exported score.
DERIVED = ("n_in", "n_out")


@dataclass(frozen=True, slots=True)
class SelfTest:
    """Inputs by seed, and expected results.

    Attributes:
        seeds: seed of `draw` for every terminal that the metric reads, ``W`` first.
        columns: width of the test matrix, which has `ROWS` rows.
        rule: the mask that is checked.
        samples: `ROWS` scores, every `stride`-th of the flattened matrix.
        mask_sha256: of the flattened mask, one byte a weight.
    """

    seeds: dict[str, int]
    columns: int
    rule: MaskRule
    samples: list[float]
    mask_sha256: str

    @property
    def stride(self) -> int:
        """Distance between two samples in the flattened matrix: one a row, each from another column."""
        return self.columns - 1

    def to_json(self) -> dict[str, Any]:
        """The recipe and the expected results as plain data."""
        return {
            "generator": "s = (1103515245*s + 12345) mod 2^31, number = (s >> 7) / 2^24, row-major float32;"
            " signed statistics are 2*number - 1, n_in and n_out follow from the shape",
            "seeds": self.seeds,
            "shape": [ROWS, self.columns],
            "sparsity": self.rule.sparsity,
            "pattern": None if self.rule.pattern is None else list(self.rule.pattern),
            "group": self.rule.group,
            "stride": self.stride,
            "samples": self.samples,
            "mask_sha256": self.mask_sha256,
        }


def arguments(expression: Expression) -> tuple[str, ...]:
    """The terminals that an exported score takes beside the weight, in the order of the language."""
    return tuple(name for name in TERMINALS if name in expression.terminals and name != "W" and name not in DERIVED)


def is_signed(name: str) -> bool:
    """Whether a terminal can be negative."""
    return not TERMINALS[name].sign <= NONNEGATIVE


def make_selftest(metric: Metric, rule: MaskRule) -> SelfTest:
    """A self-test of `metric`, for a pattern if `rule` has one, with inputs whose mask is clear-cut if possible."""
    if rule.pattern is None:
        # A test at the rule's own sparsity may remove next to nothing of a small matrix.
        columns = _MIN_COLUMNS
        tested = MaskRule(sparsity=_SPARSITY, group="row" if metric.group == "row" else "layer")
    else:
        width = rule.pattern[1]
        columns = width * math.ceil(_MIN_COLUMNS / width)
        tested = MaskRule(pattern=rule.pattern)
    best: tuple[float, dict[str, int], Tensor] | None = None
    for attempt in range(_DRAWS):
        seeds = {name: 1000 * attempt + 1 + i for i, name in enumerate(("W", *arguments(metric.expression)))}
        scores = _scores(metric.expression, seeds, columns, tested.fraction)
        gap = _gap_at_cut(scores, tested)
        if best is None or gap > best[0]:
            best = gap, seeds, scores
        if gap > _CLEAR_GAP:
            break
    assert best is not None
    _, seeds, scores = best
    return SelfTest(
        seeds={name: seed for name, seed in seeds.items() if name != "sparsity"},
        columns=columns,
        rule=tested,
        samples=scores.flatten()[:: columns - 1][:ROWS].tolist(),
        mask_sha256=hashlib.sha256(bytes(mask(scores, tested).flatten().tolist())).hexdigest(),
    )


def _scores(expression: Expression, seeds: dict[str, int], columns: int, sparsity: float) -> Tensor:
    drawn = {name: draw(seed, *TERMINALS[name].type.shape(ROWS, columns)) for name, seed in seeds.items()}
    signed = {name: 2 * value - 1 if is_signed(name) else value for name, value in drawn.items()}
    site = Site("selftest", "selftest", 0, 1, ROWS, columns)
    # The target sparsity is the rule's, as in every mask; the depth is drawn.
    depth = {"depth": signed["depth"]} if "depth" in signed else {}
    statistics = {name: value for name, value in signed.items() if TERMINALS[name].type is not Type.SCAL}
    return evaluate(expression, {**free_inputs(site, signed["W"], sparsity), **statistics, **depth})


def _gap_at_cut(scores: Tensor, rule: MaskRule) -> float:
    """Smallest relative distance between a lowest kept and a highest removed score that were compared."""
    if rule.pattern is not None:
        rows, removed = scores.reshape(-1, rule.pattern[1]), rule.pattern[1] - rule.pattern[0]
    else:
        rows = scores if rule.group == "row" else scores.reshape(1, -1)
        removed = rows.shape[1] // 2
    ranked = rows.double().sort(dim=1).values
    below, above = ranked[:, removed - 1], ranked[:, removed]
    return ((above - below) / above.abs().maximum(below.abs()).clamp(min=1e-300)).min().item()
