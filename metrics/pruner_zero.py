"""The published Pruner-Zero language, with its published defects: only to load its trees and reproduce their masks.

Fifteen operators on |W|, X and G. ``div`` divides by a norm, ``log`` adds a constant, ``mms`` and ``zsn`` take the
whole tensor and give NaN on constants, ``exp`` still overflows, ``sqr`` and ``pow`` are the same, ``skp`` does nothing.
Scores may therefore be non-finite; the mask then refuses them. Searches use the core language instead.

Source: Dong et al. 2024, arXiv:2406.02924, and its released code; symbolic pruning metrics, sections 1.1 to 1.5.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from evoprune.metrics.criterion import Tags
from evoprune.metrics.errors import InvalidExpression, UnknownName
from evoprune.metrics.expression import MAX_HEIGHT, MAX_NODES, Expression, call, constant, terminal, within_limits
from evoprune.metrics.records import Group, Site
from evoprune.metrics.types import Type

# The released gradient statistic is scaled before it is stored.
GRADIENT_SCALE = 100.0
# Depths of the released random trees.
MIN_DEPTH, MAX_DEPTH = 2, 4


def _div(x: Tensor, y: Tensor) -> Tensor:
    x, y = torch.broadcast_tensors(x, y)
    return x / torch.linalg.vector_norm(y)


UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "sqr": lambda x: x * x,
    "neg": torch.neg,
    "abs": torch.abs,
    "log": lambda x: torch.log(x.abs() + 0.001),
    "exp": lambda x: torch.exp(x.clamp(max=100)),
    "sqrt": lambda x: torch.sqrt(x.abs()),
    "tanh": torch.tanh,
    "pow": lambda x: x.pow(2),
    "skp": lambda x: x,
    "mms": lambda x: (x - x.min()) / (x.max() - x.min()),
    "zsn": lambda x: (x - x.mean()) / x.std(),
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": _div,
}
FUNCTIONS = (*UNARY, *BINARY)
# Each leaf, and the statistic of ours that it is made of.
LEAVES = {"W": "W", "G": "G_l2", "X": "X_ss"}


@dataclass(frozen=True, slots=True)
class Tree:
    """A node of a published tree; a unary operator's argument is `left`."""

    data: str
    left: Tree | None = None
    right: Tree | None = None

    def __str__(self) -> str:
        inner = ",".join(str(child) for child in (self.left, self.right) if child is not None)
        return f"{self.data}({inner})" if inner else self.data

    def walk(self) -> Iterator[Tree]:
        """Every node, parents first."""
        yield self
        for child in (self.left, self.right):
            if child is not None:
                yield from child.walk()

    def to_json(self) -> dict[str, Any]:
        """The released form, ``{"data", "left", "right"}``, without the children that a node has not."""
        children = {"left": self.left, "right": self.right}
        return {"data": self.data, **{side: tree.to_json() for side, tree in children.items() if tree is not None}}


def from_json(value: Any) -> Tree:
    """The tree that a released file holds.

    Raises:
        InvalidExpression: not of that form, wrong number of children, too deep or too large.
        UnknownName: neither one of the published operators nor W, G or X.
    """
    tree = _from_json(value, 0)
    if sum(1 for _ in tree.walk()) > MAX_NODES:
        raise InvalidExpression(f"tree of more than {MAX_NODES} nodes")
    return tree


def _from_json(value: Any, depth: int) -> Tree:
    if depth > MAX_HEIGHT:
        raise InvalidExpression(f"tree nested deeper than {MAX_HEIGHT}")
    if (
        not isinstance(value, dict)
        or not isinstance(value.get("data"), str)
        or value.keys() - {"data", "left", "right"}
    ):
        raise InvalidExpression('a node of a Pruner-Zero tree is {"data": name, "left": node, "right": node}')
    name = value["data"]
    if name not in FUNCTIONS and name not in LEAVES:
        raise UnknownName("Pruner-Zero operator or leaf", name, (*FUNCTIONS, *LEAVES))
    sides = ("left", "right") if name in BINARY else ("left",) if name in UNARY else ()
    if value.keys() - {"data"} != set(sides):
        expected = " and ".join(sides) or "no argument"
        raise InvalidExpression(f"{name} takes {expected}, but {sorted(value.keys() - {'data'})} given")
    return Tree(name, *(_from_json(value[side], depth + 1) for side in sides))


def evaluate(tree: Tree, inputs: Mapping[str, Tensor]) -> Tensor:
    """The value of `tree`, as the published code computes it, in float32 and possibly non-finite.

    Args:
        inputs: the leaves: ``W`` [out, in], the magnitudes of the weights; ``G`` [out, in]; ``X`` [1, in].
    """
    if tree.left is None:
        return inputs[tree.data]
    left = evaluate(tree.left, inputs)
    if tree.right is None:
        return UNARY[tree.data](left)
    return BINARY[tree.data](left, evaluate(tree.right, inputs))


@dataclass(frozen=True)
class PrunerZeroMetric:
    """A criterion that is a published tree."""

    tree: Tree
    group: Group = "row"
    source: str = "Dong et al. 2024, arXiv:2406.02924, released language"

    @cached_property
    def needs(self) -> frozenset[str]:
        return frozenset(LEAVES[node.data] for node in self.tree.walk() if node.data in LEAVES) - {"W"}

    @cached_property
    def tags(self) -> Tags:
        return Tags(data="data-driven" if self.needs else "data-free")

    def score(self, site: Site, inputs: Mapping[str, Tensor]) -> Tensor:
        weight = inputs["W"].float()
        leaves = {"W": weight.abs()}
        if "G_l2" in self.needs:
            leaves["G"] = GRADIENT_SCALE * inputs["G_l2"].float()
        if "X_ss" in self.needs:
            leaves["X"] = inputs["X_ss"].float()
        return evaluate(self.tree, leaves).expand(weight.shape)


def published_generator(rng: random.Random) -> Tree:
    """A random tree as the published search would start with: grown or full, 2 to 4 deep, all 15 operators alike."""
    depth = rng.randint(MIN_DEPTH, MAX_DEPTH)
    return _random_tree(rng, grow=rng.random() < 0.5, max_depth=depth, depth=0)


def _random_tree(rng: random.Random, grow: bool, max_depth: int, depth: int) -> Tree:
    if depth >= max_depth or (depth >= MIN_DEPTH and grow and rng.random() < 0.5):
        return Tree(rng.choice(list(LEAVES)))
    name = rng.choice(FUNCTIONS)
    children = [_random_tree(rng, grow, max_depth, depth + 1) for _ in range(2 if name in BINARY else 1)]
    return Tree(name, *children)


def to_core(tree: Tree) -> Expression:
    """The tree in the core language: the same formula with our guards.

    Equal in real arithmetic wherever the published form is finite, except that ``exp`` is bounded at 69 instead of 100
    and ``zsn`` divides by the population's deviation instead of the sample's.

    Raises:
        InvalidExpression: the translation is too high or too large.
    """
    return within_limits(_to_core(tree))


def _to_core(tree: Tree) -> Expression:
    if tree.left is None:
        leaf = terminal(LEAVES[tree.data])
        return {"W": call("abs", leaf), "G": call("mul", constant(GRADIENT_SCALE), leaf), "X": leaf}[tree.data]
    left = _to_core(tree.left)
    if tree.right is None:
        return _unary_to_core(tree.data, left)
    right = _to_core(tree.right)
    if tree.data == "div":
        # The divisor's norm is that of its broadcast with the dividend; of two vectors it is a vector's norm.
        norm = "tl2" if left.type.join(right.type) is Type.MAT else "rl2"
        return call("div", left, call(norm, right))
    return call(tree.data, left, right)


def _unary_to_core(name: str, argument: Expression) -> Expression:
    if name == "skp":
        return argument
    if name == "log":
        return call("log", call("add", call("abs", argument), constant(0.001)))
    return call({"pow": "sqr", "mms": "mms_t", "zsn": "zsn_t"}.get(name, name), argument)
