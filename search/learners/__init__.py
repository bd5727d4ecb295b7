"""Learners: who moves a mask policy. Plug-ins, one file each: frozen dataclasses whose fields are their options.

A learner only says which masks it wants the losses of (`ask`) and takes these in (`tell`); it knows no model.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from evoprune.metrics import parameters
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.files import derived_seed
from evoprune.metrics.parameters import parameters_of
from evoprune.metrics.registry import Registry
from evoprune.search.policies import Budget, Floats, Ints, Mask

Role = Literal["sample", "reference"]
Diagnostics = dict[str, float | None]
DIAGNOSTICS = {
    "loss": "mean loss of the sampled masks",
    "loss_std": "its standard deviation between them",
    "reference": "loss of the reference mask, where the learner asks for it",
    "failed": "trials without a finite loss",
    "samples": "masks of the step, the reference not counted",
    "rho": "variance of the minibatch over that of the masks, from earlier steps",
    "baseline": "what was subtracted from the losses, on average",
    "clipped": "share of advantages that were clipped",
    "rate": "learning rate; the step size of cma",
    "kl": "how far the step moved the policy, in nats",
    "cosine": "of the gradients of two halves of the masks over the last 20 steps",
    "entropy": "mean over units that may go, in nats",
    "undecided": "share of them with a probability in (0.05, 0.95)",
    "jaccard": "of the mode and the one 20 steps ago",
}
"""What `Learner.tell` says, by name; None where a learner has no such thing or does not know it yet."""


@dataclass(frozen=True, eq=False)
class Problem:
    """What there is to learn.

    Attributes:
        budget: of the masks.
        groups: [n] int, the group of each unit, such as (layer, kind).
        prior: [n] float64, a criterion's scores, as z-scores inside their groups.
        start: [n] float64, initial logits.
        steps: how many steps are planned; schedules read it.
        seed: of the run.

    Raises:
        InvalidInput: lengths differ, or a number is not finite.
    """

    budget: Budget
    groups: Ints
    prior: Floats
    start: Floats
    steps: int
    seed: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", np.asarray(self.groups, dtype=np.int64))
        for name in ("prior", "start"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.float64))
            if not np.isfinite(getattr(self, name)).all():
                raise InvalidInput(f"the {name} of a unit is not finite: nothing can be learned from there")
        for name in ("groups", "prior", "start"):
            if getattr(self, name).shape != (self.budget.n,):
                raise InvalidInput(f"{name} says something of {getattr(self, name).size} of {self.budget.n} units")
        if self.steps < 1:
            raise InvalidInput(f"{self.steps} steps are planned: at least 1 is needed")


@dataclass(frozen=True, eq=False)
class Trial:
    """A mask whose loss a learner wants to know; all trials of a step are measured on the same minibatch.

    Attributes:
        mask: [n] bool.
        role: what it is for; the reference is what the learner would answer now.
        values: [n] float64 in [0, 1], where the loss is wanted at these values of the mask and with its gradient;
            None where the mask's own loss is.
    """

    mask: Mask
    role: Role = "sample"
    values: Floats | None = None


@dataclass(frozen=True, eq=False)
class Answer:
    """What a trial was worth.

    Attributes:
        loss: None if it is not finite.
        gradient: [n] float64, of the loss with respect to the mask's values; None where it was not asked for.
        windows: the loss on each window of the minibatch, the same windows in the same order for all trials of the
            step; None if unknown. From these the variance of the minibatch is known at every step.
    """

    loss: float | None
    gradient: Floats | None = None
    windows: Sequence[float] | None = None


class Learner(Protocol):
    """Moves a policy. What it does depends on the problem, the options and what it is told, and on nothing else.

    Attributes:
        exact: every mask that it asks for meets the budget; else only the expected mask does.
    """

    @property
    def exact(self) -> bool: ...

    def ask(self, step: int) -> list[Trial]:
        """The masks of a step: a function of the state and the step, so that it may be asked again."""

    def tell(self, step: int, answers: Sequence[Answer]) -> Diagnostics:
        """Take in what was asked for, in the same order; says how it goes: `DIAGNOSTICS`."""

    def probabilities(self) -> Floats:
        """[n]: how probable it is that each unit is kept."""

    def mode(self) -> Mask:
        """[n] bool: the mask to answer now; meets the budget."""

    def state(self) -> dict[str, Any]:
        """Everything that `restore` needs, as JSON values."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`, to the last bit."""


class LearnerPlugin(Protocol):
    """How to get a learner: a frozen dataclass whose fields are its options, with their defaults.

    Attributes:
        what: one line for people.
        gradients: it asks for losses with gradients.
        adapts: it can choose the number of masks of a step by itself.
    """

    what: ClassVar[str]
    gradients: ClassVar[bool]
    adapts: ClassVar[bool]

    def build(self, problem: Problem, options: Mapping[str, Any] | None = None) -> Learner:
        """The learner of a problem.

        Args:
            options: those that are not as they are by default.

        Raises:
            InvalidInput: no such option, no such value, or a problem that does not suit the learner.
        """


LEARNERS: Registry[LearnerPlugin] = Registry("learner", "evoprune.search.learners")


def configured(name: str, given: Mapping[str, Any] | None = None) -> LearnerPlugin:
    """A registered learner with some options changed; see `evoprune.metrics.parameters.configured`.

    ``samples`` may be ``auto``, which is 0.
    """
    given = dict(given or {})
    if given.get("samples") == "auto":
        given["samples"] = 0
    return parameters.configured(LEARNERS, name, given)


class Options(ABC):
    """What plug-ins share: how they are built."""

    name: ClassVar[str]
    adapts: ClassVar[bool] = False

    @abstractmethod
    def make(self, problem: Problem) -> Learner:
        """The learner with these options."""

    def build(self, problem: Problem, options: Mapping[str, Any] | None = None) -> Learner:
        """See `LearnerPlugin.build`."""
        plugin = configured(self.name, {**parameters_of(self), **options}) if options else self
        assert isinstance(plugin, Options)
        return plugin.make(problem)


def generator(seed: int, stream: str, step: int) -> np.random.Generator:
    """A counter-based generator that depends on nothing but its arguments."""
    return np.random.Generator(np.random.Philox(key=derived_seed(seed, stream, step)))


def reported(known: Mapping[str, float | None]) -> Diagnostics:
    """All of `DIAGNOSTICS`, in their order, None where nothing is known."""
    assert known.keys() <= DIAGNOSTICS.keys()
    return {name: known.get(name) for name in DIAGNOSTICS}


def cosine(step: int, steps: int, last: float) -> float:
    """A factor that falls from 1 to `last` over the steps, along half a cosine; stays there beyond them."""
    share = min(1.0, step / steps)
    return last + (1 - last) * (1 + math.cos(math.pi * share)) / 2
