"""A candidate: a genome with its lineage and what was measured of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from deap import base

from evoprune.metrics.expression import Expression, from_json


class RungFitness(base.Fitness):
    """DEAP's view of a fitness by rung: whoever got further is better, then whoever lost less there."""

    weights = (1.0, -1.0)


@dataclass(frozen=True)
class Candidate:
    """An evaluated metric.

    Attributes:
        birth: its number.
        expression: in canonical form.
        origin: how it came about: ``seed:NAME``, ``random``, ``crossover``, ``mutate:NAME``, ``tune``, ...
        parents: births it was made from.
        evolved: it was bred or tuned, not given or drawn.
        island: where it lives.
        rungs: fitness at each rung that it ran, lower is better.
        stderr: of the last of them.
        signature: hash of its ranking of the probe.
    """

    birth: int
    expression: Expression
    origin: str
    parents: tuple[int, ...]
    evolved: bool
    island: int
    rungs: tuple[float, ...]
    stderr: float
    signature: str
    fitness: RungFitness = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fitness", RungFitness((len(self.rungs), self.rungs[-1])))

    def __len__(self) -> int:
        """Node count, which DEAP's parsimony tournament reads."""
        return self.expression.size

    @property
    def value(self) -> float:
        """Fitness at the highest rung that it ran."""
        return self.rungs[-1]

    @property
    def complexity(self) -> int:
        return self.expression.complexity

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` reads them back."""
        return {
            "birth": self.birth,
            "expression": self.expression.to_json(),
            "origin": self.origin,
            "parents": list(self.parents),
            "evolved": self.evolved,
            "island": self.island,
            "rungs": list(self.rungs),
            "stderr": self.stderr,
            "signature": self.signature,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Candidate:
        """The candidate that `to_json` wrote."""
        return cls(
            **{
                **values,
                "expression": from_json(values["expression"]),
                "parents": tuple(values["parents"]),
                "rungs": tuple(values["rungs"]),
            }
        )
