"""DSA: a function from the scores of a block to its sparsity, composed of named steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from evoprune.fitness.allocators import ALLOCATORS, Evidence, Use, around, check_numbers, grouped, shared_out
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.parameters import check_choice, check_range


def _log(x: Tensor) -> Tensor:
    # What is not positive counts as 1, as in the published family.
    return x.where(x > 0, torch.ones_like(x)).log()


def _abslog(x: Tensor) -> Tensor:
    return _log(x.abs())


def _standardise(x: Tensor) -> Tensor:
    deviation = x.std()
    return (x - x.mean()) / deviation if deviation > 0 else torch.zeros_like(x)


def _minmax(x: Tensor) -> Tensor:
    low, high = x.aminmax()
    return (x - low) / (high - low) if high > low else torch.zeros_like(x)


def _asin(x: Tensor) -> Tensor:
    """arcsin, continued with slope 1 outside [-1, 1].

    The published family has a NaN there, which it then takes for 0: its winner, asin of atan, ranks groups whose
    variance is above tan(1) as if it were the smallest. A bound instead of a slope would make them all equal.
    """
    inside = x.clamp(-1, 1)
    return inside.asin() + (x - inside)


def _entropy(x: Tensor) -> Tensor:
    """Of the softmax of all numbers, in nats."""
    return torch.distributions.Categorical(logits=x).entropy()


PRE: Mapping[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "abslog": _abslog,
    "exp": torch.exp,
    "id": lambda x: x,
    "log": _log,
    "minmax": _minmax,
    "sigmoid": torch.sigmoid,
    "square": torch.square,
    "standardise": _standardise,
    "tanh": torch.tanh,
}
REDUCE: Mapping[str, Callable[[Tensor], Tensor]] = {
    "entropy": _entropy,
    "fro": lambda x: x.square().sum().sqrt(),
    "geomean": lambda x: _abslog(x).mean().exp(),
    "l1": lambda x: x.abs().mean(),
    "mean": torch.mean,
    "std": torch.std,
    "var": torch.var,
}
POST: Mapping[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "acos": lambda x: math.pi / 2 - _asin(x),
    "asin": _asin,
    "atan": torch.atan,
    "cos": torch.cos,
    "exp": torch.exp,
    "id": lambda x: x,
    "log": _log,
    "sigmoid": torch.sigmoid,
    "sin": torch.sin,
    "softplus": torch.nn.functional.softplus,
    "tan": torch.tan,
    "tanh": torch.tanh,
}


def block_value(scores: Tensor, pre: Sequence[str], reduce: str, post: Sequence[str]) -> float:
    """post(reduce(pre(scores))) of one group, in float64.

    Args:
        scores: [n], all scores of the group.
        pre, post: names of steps, applied from left to right.
        reduce: name of the step between them.
    """
    value = scores.double()
    for name in pre:
        value = PRE[name](value)
    value = REDUCE[reduce](value)
    for name in post:
        value = POST[name](value)
    return value.item()


@dataclass(frozen=True)
class Dsa:
    """Blocks whose scores reduce to a large value lose more: S - mean + 2 * spread * x, x between 0 and 1.

    The steps are those of the published family that are defined for the scores of a block as one vector; its default
    is the published winner. Steps for square matrices (gram, corr, diag, det, rank, slogdet) are left out: scores are
    not square.

    Attributes:
        pre: up to two steps on every score, separated by commas.
        reduce: from all scores of a group to a number.
        post: one or two steps on that number, separated by commas.
        spread: largest distance from the mean would be twice this (lambda of the paper).
        granularity: what shares a sparsity: block, kind or matrix.
    """

    pre: str = "abslog"
    reduce: str = "var"
    post: str = "atan,asin"
    spread: float = 0.08
    granularity: str = "block"

    needs: ClassVar[frozenset[str]] = frozenset()
    uses: ClassVar[frozenset[Use]] = frozenset({"scores"})
    source: ClassVar[str] = "Li et al. 2024, DSA: discovering sparsity allocation; released code"

    def __post_init__(self) -> None:
        check_range("spread", self.spread, 0, 1)
        check_choice("reduction", self.reduce, list(REDUCE))
        for what, words, known in (("step before", self._pre, PRE), ("step after", self._post, POST)):
            if len(words) > 2:
                raise InvalidInput(f"{len(words)} steps {what[5:]} the reduction are too many: give at most two")
            for word in words:
                check_choice(what, word, list(known))
        grouped((), self.granularity)

    @property
    def _pre(self) -> list[str]:
        return [word.strip() for word in self.pre.split(",") if word.strip()]

    @property
    def _post(self) -> list[str]:
        return [word.strip() for word in self.post.split(",") if word.strip()]

    def request(self, evidence: Evidence) -> Sequence[float]:
        sites = evidence.sites
        groups = grouped(sites, self.granularity)
        values = [
            block_value(
                torch.cat([evidence.scores(sites[index]).flatten() for index in group]),
                self._pre,
                self.reduce,
                self._post,
            )
            for group in groups
        ]
        check_numbers("the DSA value", sites, groups, values)
        return shared_out(groups, around(evidence.target, values, self.spread))


ALLOCATORS.add("dsa", Dsa())
