"""ARMOR: a sparse core between two block-diagonal matrices, which make up for what the pattern takes.

A matrix is scaled to rows and columns of length one, W' = W / (r cᵀ), and A S B is fitted to it, with A and B of square
blocks on the diagonal and S in the pattern, so that Σ_ij h_j (W' - A S B)_ij² gets less at every step; h_j is the mean
square of input j. It begins with A = B = I and the best mask of W' (NoWag), so it never ends above that. One round
solves for A, for B and, along conjugate gradients, for the values of S; then, in each pair of a block of A and one of
B, the groups of S whose best support gains most get it, one after the other. In the end r and c go into A and B.
Source: Liu et al. 2025, arXiv:2510.05528, and its reference code. There A, B and S take a step of Adam in each round,
of which tens of thousands are needed and some rise, and groups are drawn; exact steps need tens of rounds and no luck.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from math import gcd
from typing import ClassVar

import torch
from torch import Tensor

from evoprune.fitness.compressors import COMPRESSORS, Cost, Goal, Made
from evoprune.fitness.factored import Factors
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.mask import mask, mask_of_count
from evoprune.metrics.parameters import check_range
from evoprune.metrics.records import Group, MaskRule

# All supports of a group of columns are tried.
WIDEST_GROUP = 8
# Where the pattern names no groups.
_GROUP = 4
# The blocks of A and B have about as many weights in all as a sixteenth of the matrix, as in the paper.
_SHARE, _LEAST, _MOST = 32, 8, 128
_CONJUGATE_STEPS = 4
# Groups that together gain less than this fraction of what is lost are left to the next round.
_LITTLE = 1e-3
# Keeps what cannot be told from the data where it was.
_RIDGE = 1e-6


@dataclass(frozen=True)
class Armor:
    """A sparse core between two block-diagonal wrappers, fitted together to the dense matrix.

    The core keeps N of every M, or, without a pattern, as many weights of each 4 columns as its first mask does.

    Attributes:
        block: rows of a wrapper's block; 0 takes about 1/32 of the width, from 8 to 128.
        rounds: at most so many.
        tolerance: stop when a round takes off less than this fraction of what is lost.
    """

    block: int = 0
    rounds: int = 50
    tolerance: float = 1e-3

    needs: ClassVar[frozenset[str]] = frozenset({"X_ss"})
    reads_criterion: ClassVar[bool] = False
    keeps_mask: ClassVar[bool] = False
    keeps_weights: ClassVar[bool] = False
    groups: ClassVar[frozenset[Group]] = frozenset()
    wraps: ClassVar[str] = "block-diagonal matrices"
    cost: ClassVar[Cost] = "linear"
    source: ClassVar[str] = "Liu et al. 2025 (ARMOR), arXiv:2510.05528, with exact steps"

    def __post_init__(self) -> None:
        check_range("block", self.block, 0, 1 << 12)
        check_range("rounds", self.rounds, 0, 1 << 20)
        check_range("tolerance", self.tolerance, 0, 1)

    def check(self, out_features: int, in_features: int, pattern: tuple[int, int] | None) -> None:
        """Refuse a matrix that does not fall into blocks, and groups that are too wide.

        Raises:
            InvalidInput: says which.
        """
        group = _GROUP if pattern is None else pattern[1]
        if group > WIDEST_GROUP:
            raise InvalidInput(
                f"compressor 'armor' tries every support of {group} columns: give a pattern N:M with M up to "
                f"{WIDEST_GROUP}, such as 2:4"
            )
        if self.block and (out_features % self.block or in_features % self.block or self.block % group):
            raise InvalidInput(
                f"wrappers in blocks of {self.block} do not fit {out_features} × {in_features} in groups of {group}: "
                f"give a multiple of {group} that divides both"
            )

    def compress(self, weight: Tensor, goals: Iterable[Goal], statistics: Mapping[str, Tensor]) -> Iterator[Made]:
        squares = statistics["X_ss"].flatten()
        usable = squares.isfinite() & (squares > 0)
        # A dead input weighs as much as another: it may live in another text.
        squares = torch.where(usable, squares, squares[usable].mean() if bool(usable.any()) else 1.0)
        columns = weight.norm(dim=0) + 1e-5
        rows = (weight / columns).norm(dim=1) + 1e-5
        for goal in goals:
            self.check(weight.shape[0], weight.shape[1], goal.pattern)
            if goal.removed in (0, weight.numel()):
                keep = torch.full_like(weight, goal.removed == 0, dtype=torch.bool)
                yield weight.masked_fill(~keep, 0), keep
                continue
            fit = self.started(weight / columns / rows[:, None], squares / squares.mean(), goal)
            for _ in range(self.rounds):
                before = fit.loss()
                fit = fit.improved()
                if fit.loss() > (1 - self.tolerance) * before:
                    break
            factors = fit.factors()
            left = factors.left * rows.view(*factors.left.shape[:2], 1)
            right = factors.right * columns.view(len(factors.right), 1, -1)
            yield factors.core, fit.keep(), left, right

    def started(self, normal: Tensor, squares: Tensor, goal: Goal) -> Fit:
        """The best mask of a matrix, [out, in], in wrappers that do nothing.

        Args:
            normal: W'.
            squares: h, [in].
            goal: what has to go.
        """
        scores = normal.square() * squares
        if goal.pattern is None:
            group = gcd(normal.shape[1], _GROUP)
            keep = mask_of_count(scores, goal.removed)
        else:
            group = goal.pattern[1]
            keep = mask(scores, MaskRule(None, goal.pattern))
        rows, columns = normal.shape
        left, right = self.block or _width(rows, 1), self.block or _width(columns, group)
        eyes = (torch.eye(size, dtype=normal.dtype, device=normal.device) for size in (left, right))
        a, b = (eye.repeat(count, 1, 1) for eye, count in zip(eyes, (rows // left, columns // right), strict=True))
        return Fit(
            _tiled(normal, left, right),
            squares.view(-1, right),
            _tiled(normal.masked_fill(~keep, 0), left, right),
            _tiled(keep, left, right),
            a,
            b,
            group,
        )


def _width(size: int, multiple: int) -> int:
    """The largest divisor of `size` that is one of `multiple` times a whole number and not too large."""
    most = max(_LEAST, min(_MOST, size // _SHARE))
    return max((width for width in range(multiple, most + 1, multiple) if size % width == 0), default=multiple)


def _tiled(matrix: Tensor, left: int, right: int) -> Tensor:
    """[out / left, in / right, left, right] of an [out, in] matrix."""
    return matrix.view(-1, left, matrix.shape[1] // right, right).transpose(1, 2).contiguous()


def _untiled(tiles: Tensor) -> Tensor:
    return tiles.transpose(1, 2).reshape(tiles.shape[0] * tiles.shape[2], -1)


@dataclass(frozen=True)
class Fit:
    """A S B on its way to a matrix, all of it in tiles: one for each pair of a block of A and a block of B.

    Attributes:
        target: W', [J, K, d, e].
        squares: h, [K, e].
        core: S, as `target`, zero where nothing is kept.
        live: what of it is kept, bool.
        left: the blocks of A, [J, d, d].
        right: the blocks of B, [K, e, e].
        group: columns among which as many stay as do now.
    """

    target: Tensor
    squares: Tensor
    core: Tensor
    live: Tensor
    left: Tensor
    right: Tensor
    group: int

    def factors(self) -> Factors:
        """A, S and B."""
        return Factors(_untiled(self.core), self.left, self.right)

    def keep(self) -> Tensor:
        """[out, in] bool."""
        return _untiled(self.live)

    def loss(self) -> float:
        """What is lost, as a fraction of Σ_ij h_j W'_ij²."""
        weighed = self.squares[:, None].double()
        lost = (self._error().double().square() * weighed).sum() / (self.target.double().square() * weighed).sum()
        return lost.item()

    def improved(self) -> Fit:
        """After one round; its loss is no higher but for rounding."""
        return self.with_left().with_right().with_values().with_supports()

    def with_left(self) -> Fit:
        """The best A for this S and B."""
        made = self.core @ self.right
        weighed = (made * self.squares[:, None]).transpose(2, 3)
        moment, gram = (self.target @ weighed).sum(1), (made @ weighed).sum(1)
        return replace(self, left=_solved(gram, moment.transpose(1, 2), self.left.transpose(1, 2)).transpose(1, 2))

    def with_right(self) -> Fit:
        """The best B for A and S; every column has a problem of its own, so h does not matter."""
        made = self.left[:, None] @ self.core
        moment, gram = (made.transpose(2, 3) @ self.target).sum(0), (made.transpose(2, 3) @ made).sum(0)
        return replace(self, right=_solved(gram, moment, self.right))

    def with_values(self) -> Fit:
        """S after some conjugate gradients, on the support that it has; each tile has a problem of its own."""
        ours, theirs = self._grams()
        core = self.core.clone()
        residual = self._gradient().masked_fill_(~self.live, 0)
        direction, size = residual.clone(), residual.square().sum((2, 3), keepdim=True)
        for _ in range(_CONJUGATE_STEPS):
            turned = (ours[:, None] @ direction @ theirs).masked_fill_(~self.live, 0)
            curvature = (direction * turned).sum((2, 3), keepdim=True)
            step = torch.where(curvature > 0, size / curvature.clamp(min=torch.finfo(core.dtype).tiny), 0)
            core += step * direction
            residual -= step * turned
            after = residual.square().sum((2, 3), keepdim=True)
            direction = (
                residual + torch.where(size > 0, after / size.clamp(min=torch.finfo(core.dtype).tiny), 0) * direction
            )
            size = after
        return replace(self, core=core)

    def with_supports(self) -> Fit:
        """S after the best group of each tile got its best support, as often as a tile has rows."""
        ours, theirs = self._grams()
        rows, columns, d, e = self.core.shape
        groups, size = e // self.group, self.group
        core = self.core.view(rows, columns, d, groups, size).clone()
        live = self.live.view(core.shape).clone()
        gradient = self._gradient().view(core.shape).clone()
        supports = _supports(size, self.core.device)
        own = theirs.view(columns, groups, size, groups, size).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
        inverses = _inverses(own, supports)
        weights = ours.diagonal(dim1=1, dim2=2)[:, None, :, None, None].clamp(min=1e-8)
        counts, per_support = live.sum(4), supports.sum(1)
        allowed = per_support == counts[..., None]
        lost = (self._error().square() * self.squares[:, None]).sum()
        j, k = torch.meshgrid(*(torch.arange(n, device=core.device) for n in (rows, columns)), indexing="ij")
        for _ in range(d):
            pull = gradient + weights * torch.einsum("jkrgm,kgmn->jkrgn", core, own)
            gains = torch.einsum("jkrgm,kgtmn,jkrgn->jkrgt", pull, inverses, pull) / weights
            now = (2 * pull * core).sum(4) - weights[..., 0] * torch.einsum("jkrgm,kgmn,jkrgn->jkrg", core, own, core)
            gains = gains.masked_fill_(~allowed, -torch.inf) - now[..., None]
            best = gains.flatten(2).argmax(2)
            support = best % len(supports)
            group = best // len(supports) % groups
            row = best // len(supports) // groups
            wanted = pull[j, k, row, group]
            scale = ours.diagonal(dim1=1, dim2=2)[j, row, None].clamp(min=1e-8)
            found = torch.einsum("jkmn,jkn->jkm", inverses[k, group, support], wanted) / scale
            gram = own[k, group]
            reached = (2 * wanted * found).sum(2) - scale[..., 0] * torch.einsum("jkm,jkmn,jkn->jk", found, gram, found)
            better = (reached > now[j, k, row, group])[..., None]
            change = (found - core[j, k, row, group]) * better
            core[j, k, row, group] += change
            live[j, k, row, group] = torch.where(better, supports[support], live[j, k, row, group])
            pushed = torch.einsum("jkm,jkme->jke", change, theirs.view(columns, groups, size, e)[k, group])
            along = ours[j[..., None], torch.arange(d, device=core.device), row[..., None]]
            gradient -= (along[..., None] * pushed[:, :, None]).view(core.shape)
            gained = (reached - now[j, k, row, group]).clamp(min=0).sum()
            if not bool(gained > _LITTLE * lost):
                break
            lost -= gained
        core.masked_fill_(~live, 0)
        return replace(self, core=core.view(self.core.shape), live=live.view(self.core.shape))

    def _error(self) -> Tensor:
        return self.target - self.left[:, None] @ self.core @ self.right

    def _grams(self) -> tuple[Tensor, Tensor]:
        """AᵀA, [J, d, d], and B diag(h) Bᵀ, [K, e, e]: what a change of S costs is tr(AᵀA X B diag(h) Bᵀ Xᵀ)."""
        return self.left.transpose(1, 2) @ self.left, (self.right * self.squares[:, None]) @ self.right.transpose(1, 2)

    def _gradient(self) -> Tensor:
        """How fast the loss falls with each entry of S, kept or not; halved."""
        error = self._error() * self.squares[:, None]
        return self.left.transpose(1, 2)[:, None] @ error @ self.right.transpose(1, 2)


def _solved(gram: Tensor, moment: Tensor, last: Tensor) -> Tensor:
    """X of the least |Y X - T|² + ε |X - last|², from YᵀY and YᵀT, [n, d, d] each: no higher than at `last`."""
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    ridge = (_RIDGE * gram.diagonal(dim1=1, dim2=2).mean(1) + torch.finfo(gram.dtype).tiny)[:, None, None]
    factor, failed = torch.linalg.cholesky_ex(gram + ridge * eye)
    found = torch.cholesky_solve(moment + ridge * last, factor)
    return torch.where((failed == 0)[:, None, None] & found.isfinite(), found, last)


def _supports(size: int, device: torch.device) -> Tensor:
    """Every subset of `size` columns, [2 ** size, size] bool."""
    found = [kept for count in range(size + 1) for kept in combinations(range(size), count)]
    supports = torch.zeros(len(found), size, dtype=torch.bool)
    for at, kept in enumerate(found):
        supports[at, list(kept)] = True
    return supports.to(device)


def _inverses(grams: Tensor, supports: Tensor) -> Tensor:
    """The inverses of [K, groups, M, M] matrices on each support, [K, groups, supports, M, M], zero outside."""
    inside = supports[:, :, None] & supports[:, None, :]
    eye = torch.eye(grams.shape[-1], dtype=grams.dtype, device=grams.device)
    ridge = _RIDGE * grams.diagonal(dim1=2, dim2=3).mean(2)[..., None, None] + 1e-9
    padded = torch.where(inside, (grams + ridge * eye)[:, :, None], eye)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(padded))
    return inverse.masked_fill(~inside, 0)


COMPRESSORS.add("armor", Armor())
