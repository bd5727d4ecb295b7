"""Tuning the exponents and constants of a metric whose structure stays.

Exponents move masks, structure mostly does not, so this is where much of the gain is. A tuner proposes a batch of
points, waits for all of them, and moves: central differences in every direction, then a Newton step from the fitted
parabolas, then the same around the best with half the step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from evoprune.metrics.expression import CONSTANT, Expression, call, constant, from_json
from evoprune.metrics.types import Type

# More parameters than this would spend the budget on one round.
MAX_PARAMETERS = 4

# Finer exponents and constants move no masks worth an evaluation.
EXPONENT_DIGITS = 2
CONSTANT_DIGITS = 3

_MAX_EXPONENT = 4.0


def parametrised(expression: Expression) -> Expression:
    """The same function with an exponent on every statistic that has none and can carry one."""

    def visit(node: Expression, raised: bool) -> Expression:
        if not node.args:
            carries = node.head not in (CONSTANT, "W") and node.nonnegative and node.type is not Type.SCAL
            return call("powc", node, exponent=1.0) if carries and not raised else node
        args = tuple(visit(arg, node.operator.kind == "power" or node.head in ("sqrt", "sqr")) for arg in node.args)
        return Expression(node.head, args, node.value)

    return visit(expression, False)


def parameters(expression: Expression) -> list[int]:
    """Positions, as `Expression.walk` counts, of the numbers to tune; exponents of the weight itself stay."""
    return [
        index
        for index, node in enumerate(expression.walk())
        if (node.head == CONSTANT and node.value != 0)
        or (node.value is not None and node.args and not _is_weight(node.args[0]))
    ]


def _is_weight(node: Expression) -> bool:
    return node.head == "W" or (node.head == "abs" and _is_weight(node.args[0]))


def skeleton(expression: Expression) -> str:
    """The expression's text without its numbers: what a tuner keeps."""
    return with_values(expression, dict.fromkeys(parameters(expression), 1.0)).text


def with_values(expression: Expression, values: dict[int, float]) -> Expression:
    """`expression` with the numbers at some positions replaced."""
    position = -1

    def visit(node: Expression) -> Expression:
        nonlocal position
        position += 1
        here = position
        args = tuple(visit(arg) for arg in node.args)
        return Expression(node.head, args, values.get(here, node.value))

    return visit(expression)


class Tuner:
    """Minimises the fitness over the numbers of one expression.

    Args:
        template: the expression.
        parent: birth that it comes from, None for a given form.
        value: its fitness where points are compared, None if unknown.
        island: where its offspring lives.
        evolved_parent: whether that birth was bred or tuned itself.
        step: first distance to look at; constants move by that much in their logarithm, times two.
        budget: the most points to propose.
        grid: points to propose before the first round.
    """

    def __init__(
        self,
        template: Expression,
        *,
        parent: int | None,
        value: float | None,
        island: int,
        evolved_parent: bool = False,
        step: float = 0.25,
        budget: int = 16,
        grid: Sequence[Sequence[float]] = (),
    ) -> None:
        self.template = template
        self.parent = parent
        self.given = parent is None
        self.island = island
        self.evolved_parent = evolved_parent
        self._positions = parameters(template)
        nodes = list(template.walk())
        self._start = [nodes[index] for index in self._positions]
        self._step = step
        self._budget = budget
        self._proposed = self._told = 0
        self._center = [self._coordinate(node) for node in self._start]
        self._value = value
        self._around: list[float] = list(self._center)
        self._newton = True
        self._batch: list[list[float]] = [list(point) for point in grid]
        self.in_grid = bool(self._batch)
        self._next = 0
        self._values: list[float | None] = [None] * len(self._batch)
        self._births: list[int | None] = [None] * len(self._batch)
        if not self._batch:
            self._differences()

    @property
    def finished(self) -> bool:
        """Whether the budget is spent and every result is in."""
        return self._proposed >= self._budget and self._told >= self._proposed

    def propose(self) -> tuple[int, Expression] | None:
        """The next point of the batch and its number; None while the batch is out."""
        if self._next >= len(self._batch) or self._proposed >= self._budget:
            return None
        index = self._next
        self._next += 1
        self._proposed += 1
        return index, self.at(self._batch[index])

    def at(self, point: Sequence[float]) -> Expression:
        """The template with its numbers at `point`."""
        values = {}
        for position, node, coordinate in zip(self._positions, self._start, point, strict=True):
            if node.head == CONSTANT:
                assert node.value is not None
                size = float(f"{math.exp(coordinate):.{CONSTANT_DIGITS}g}")
                values[position] = constant(math.copysign(size, node.value)).value
            else:
                values[position] = round(coordinate, EXPONENT_DIGITS)
        return with_values(self.template, {position: value for position, value in values.items() if value is not None})

    def tell(self, index: int, value: float | None, birth: int | None = None) -> None:
        """The fitness of point `index`, None if it has none; and the birth that measured it."""
        self._told += 1
        self._births[index] = birth
        self._values[index] = math.inf if value is None else value
        if all(known is not None for known in self._values):
            self._move()

    def _move(self) -> None:
        known = [(value, point) for value, point in zip(self._values, self._batch, strict=True) if value is not None]
        best_value, best_point = min(known, key=lambda pair: pair[0])
        differences = len(known) == 2 * len(self._center) and self._newton
        jump = self._newton_point() if differences and self._value is not None else None
        if math.isfinite(best_value) and (self._value is None or best_value < self._value):
            self._value, self._center = best_value, list(best_point)
            birth = self._births[self._batch.index(best_point)]
            if birth is not None:
                # What comes next is derived from this point, which is itself tuned unless it was given.
                self.parent, self.evolved_parent = birth, not self.in_grid
        if jump is not None:
            self._newton = False
            self._set_batch([jump])
        else:
            if not differences and self._around == self._center:
                self._step /= 2
            self._differences()

    def _differences(self) -> None:
        self._newton = True
        self._around = list(self._center)
        points = []
        for axis in range(len(self._center)):
            for sign in (1, -1):
                point = list(self._center)
                point[axis] += sign * self._scale(axis)
                points.append(self._clipped(point))
        self._set_batch(points)
        self._step = max(self._step / 2, 0.02)

    def _newton_point(self) -> list[float] | None:
        """Minimum of the parabolas through the differences around `_around`, at most two steps away on each axis."""
        point = list(self._around)
        assert self._value is not None
        for axis in range(len(point)):
            above, below = self._values[2 * axis], self._values[2 * axis + 1]
            if above is None or below is None or not (math.isfinite(above) and math.isfinite(below)):
                continue
            step = self._batch[2 * axis][axis] - self._around[axis]
            slope, curvature = (above - below) / 2, above + below - 2 * self._value
            move = -slope / curvature if curvature > 0 else -math.copysign(1.0, slope)
            point[axis] += step * max(-2.0, min(2.0, move))
        point = self._clipped(point)
        return point if point != self._around and point not in self._batch else None

    def _set_batch(self, points: list[list[float]]) -> None:
        self.in_grid = False
        self._batch, self._values, self._next = points, [None] * len(points), 0
        self._births = [None] * len(points)

    def _scale(self, axis: int) -> float:
        return self._step * (2 if self._start[axis].head == CONSTANT else 1)

    def _clipped(self, point: list[float]) -> list[float]:
        limit = math.log(1e6)
        return [
            max(-limit, min(limit, value)) if node.head == CONSTANT else max(-_MAX_EXPONENT, min(_MAX_EXPONENT, value))
            for node, value in zip(self._start, point, strict=True)
        ]

    @staticmethod
    def _coordinate(node: Expression) -> float:
        assert node.value is not None
        return math.log(abs(node.value)) if node.head == CONSTANT else node.value

    def state(self) -> dict[str, Any]:
        """Everything that `from_state` needs, as JSON values."""
        return {
            "template": self.template.to_json(),
            "parent": self.parent,
            "island": self.island,
            "evolved_parent": self.evolved_parent,
            "step": self._step,
            "budget": self._budget,
            "proposed": self._proposed,
            "told": self._told,
            "center": self._center,
            "value": self._value,
            "around": self._around,
            "newton": self._newton,
            "in_grid": self.in_grid,
            "given": self.given,
            "births": self._births,
            "batch": self._batch,
            "next": self._next,
            "values": [None if value is None else repr(value) for value in self._values],
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Tuner:
        """The tuner that `state` describes."""
        tuner = cls(from_json(state["template"]), parent=state["parent"], value=state["value"], island=state["island"])
        tuner.evolved_parent = state["evolved_parent"]
        tuner._step, tuner._budget, tuner._proposed = state["step"], state["budget"], state["proposed"]
        tuner._told, tuner.in_grid = state["told"], state["in_grid"]
        tuner._center, tuner._around, tuner._newton = state["center"], state["around"], state["newton"]
        tuner.given, tuner._births = state["given"], state["births"]
        tuner._batch, tuner._next = state["batch"], state["next"]
        tuner._values = [None if value is None else float(value) for value in state["values"]]
        return tuner
