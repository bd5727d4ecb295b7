"""Criteria: how a weight is scored. A metric is a criterion given as an expression."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from evoprune.metrics.expression import Expression, parse
from evoprune.metrics.files import derived_seed
from evoprune.metrics.interpreter import evaluate
from evoprune.metrics.records import Group, Site
from evoprune.metrics.registry import Registry


@dataclass(frozen=True, slots=True)
class Tags:
    """Where a method stands in the survey's taxonomy: Cheng et al., arXiv 2308.06767, seven contrast pairs and more."""

    speedup: Literal["universal", "specific"] = "specific"
    when: Literal["before", "during", "after", "runtime"] = "after"
    how: Literal["criterion", "learned"] = "criterion"
    fusion: Literal["none", "quantisation", "distillation", "low-rank", "nas"] = "none"
    structure: Literal["unstructured", "structured"] = "unstructured"
    shots: Literal["one-shot", "iterative"] = "one-shot"
    data: Literal["data-free", "data-driven"] = "data-driven"
    weights: Literal["initialised", "pre-trained"] = "pre-trained"
    training: Literal["from-scratch", "fine-tuned"] = "fine-tuned"
    task: Literal["original", "transfer"] = "original"
    execution: Literal["static", "dynamic"] = "static"


@runtime_checkable
class Criterion(Protocol):
    """What scores the weights of a site. Deterministic and without side effects."""

    @property
    def needs(self) -> frozenset[str]:
        """Names of the statistics it reads (terminals that are not free)."""

    @property
    def group(self) -> Group:
        """What its scores are meant to be compared within, unless the user says otherwise."""

    @property
    def source(self) -> str:
        """The paper it is from."""

    @property
    def tags(self) -> Tags:
        """Its place in the taxonomy."""

    def score(self, site: Site, inputs: Mapping[str, Tensor]) -> Tensor:
        """[out, in] float32 scores, low = removed first, from terminals by name; `inputs` is only read."""


@dataclass(frozen=True)
class Metric:
    """A criterion that is an expression.

    Raises:
        InvalidExpression, UnknownName: `expression` is text that cannot be read.
    """

    expression: Expression
    group: Group = "row"
    source: str = ""

    @classmethod
    def from_text(cls, text: str, group: Group = "row", source: str = "") -> Metric:
        """The metric that `text` spells."""
        return cls(parse(text), group, source)

    @cached_property
    def needs(self) -> frozenset[str]:
        return self.expression.statistics

    @cached_property
    def tags(self) -> Tags:
        return Tags(data="data-driven" if self.needs else "data-free")

    def score(self, site: Site, inputs: Mapping[str, Tensor]) -> Tensor:
        return evaluate(self.expression, inputs)


@dataclass(frozen=True)
class RandomCriterion:
    """Uniform random scores, fixed by the site's name and a seed: the floor that every criterion has to beat."""

    seed: int = 0
    needs: frozenset[str] = field(default_factory=frozenset)
    group: Group = "row"
    source: str = "baseline"
    tags: Tags = field(default_factory=lambda: Tags(data="data-free"))

    def score(self, site: Site, inputs: Mapping[str, Tensor]) -> Tensor:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, f"random criterion {site.name}"))
        return torch.rand(inputs["W"].shape, generator=generator).to(inputs["W"].device)


CRITERIA: Registry[Criterion] = Registry("criterion", "evoprune.metrics.library")
