"""Breeders: which allocations an allocation search tries next. Plug-ins, one file each."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.registry import Registry
from evoprune.search.spaces.ladder import Genome


class Breeder(Protocol):
    """Makes the children of each generation. What it draws depends on what it is told, and on nothing else.

    Attributes:
        origin: what the history calls its children.
        redraw: windows of text are drawn anew in every generation; one that learns from all generations keeps them.
        crosses: what children of one parent changed may be brought together in others.
    """

    origin: str
    redraw: bool
    crosses: bool

    def children(self, parent: Genome, count: int, rng: random.Random) -> Sequence[Genome]:
        """At most so many different genomes that meet the budget, none of them `parent`.

        Args:
            rng: of this generation.
        """

    def tell(self, genome: Genome, kl: float | None) -> None:
        """Take in what a child was worth in its first stage, None if it has no fitness; in the order of births."""

    def note(self, genome: Genome) -> Mapping[str, Any]:
        """What the history says of a child beside its genome, as JSON values; often nothing."""

    def finalists(self) -> Mapping[Genome, int]:
        """Children that the finals see beside the last parents, with their generations; often none."""

    def state(self) -> Any:
        """Everything that `restore` needs, as JSON values."""

    def restore(self, state: Any) -> None:
        """Continue from `state`."""


@dataclass(frozen=True)
class BreederPlugin:
    """How to get a breeder.

    Attributes:
        what: one line for people.
        make: called with the space and the run's seed and, if it `reads` something, what is known of the matrices and
            the formula to start from, if there is one.
        needs: packages beside those that evoprune itself needs.
        reads: terminals of `evoprune.metrics.site_terminals` that it can make use of.
    """

    what: str
    make: Callable[..., Breeder]
    needs: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()


class Plain:
    """What most breeders have to say beyond their genomes: nothing."""

    crosses = False

    def note(self, genome: Genome) -> Mapping[str, Any]:
        return {}

    def finalists(self) -> Mapping[Genome, int]:
        return {}


BREEDERS: Registry[BreederPlugin] = Registry("searcher", "evoprune.search.breeders")


def breeder_of(name: str) -> BreederPlugin:
    """The breeder of this name, once it is known that it can work here.

    Raises:
        UnknownName: there is none.
        InvalidInput: a package is not installed; says which.
    """
    plugin = BREEDERS[name]
    for package in plugin.needs:
        if find_spec(package) is None:
            raise InvalidInput(f"searcher {name!r} needs the package {package}: pip install 'evoprune[samplers]'")
    return plugin
