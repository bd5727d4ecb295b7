"""Sums, means, maxima and norms of a row, a column or the whole matrix, summed in float64."""

from __future__ import annotations

from torch import Tensor

from evoprune.metrics.operators import BOUND, Operator, define
from evoprune.metrics.types import NONNEGATIVE, Sign


def rsum(x: Tensor) -> Tensor:
    return x.double().sum(1, keepdim=True).clamp_(-BOUND, BOUND).float()


def rmean(x: Tensor) -> Tensor:
    return x.double().mean(1, keepdim=True).float()


def rmax(x: Tensor) -> Tensor:
    return x.amax(1, keepdim=True)


def rl2(x: Tensor) -> Tensor:
    return x.double().square().sum(1, keepdim=True).sqrt_().clamp_(max=BOUND).float()


def csum(x: Tensor) -> Tensor:
    return x.double().sum(0, keepdim=True).clamp_(-BOUND, BOUND).float()


def cmean(x: Tensor) -> Tensor:
    return x.double().mean(0, keepdim=True).float()


def cmax(x: Tensor) -> Tensor:
    return x.amax(0, keepdim=True)


def cl2(x: Tensor) -> Tensor:
    return x.double().square().sum(0, keepdim=True).sqrt_().clamp_(max=BOUND).float()


def tmean(x: Tensor) -> Tensor:
    return x.double().mean().float().reshape(1, 1)


def tstd(x: Tensor) -> Tensor:
    wide = x.double()
    return (wide - wide.mean()).square_().mean().sqrt_().float().reshape(1, 1)


def tmin(x: Tensor) -> Tensor:
    return x.amin().reshape(1, 1)


def tmax(x: Tensor) -> Tensor:
    return x.amax().reshape(1, 1)


def tl2(x: Tensor) -> Tensor:
    return x.double().square().sum().sqrt_().clamp_(max=BOUND).float().reshape(1, 1)


def _same(x: Sign) -> Sign:
    return x


def _nonnegative(x: Sign) -> Sign:
    return NONNEGATIVE


for _letter, _functions, _kind, _over in (
    ("r", {"sum": rsum, "mean": rmean, "max": rmax, "l2": rl2}, "reduce_row", "row"),
    ("c", {"sum": csum, "mean": cmean, "max": cmax, "l2": cl2}, "reduce_column", "col"),
    ("t", {"mean": tmean, "std": tstd, "min": tmin, "max": tmax, "l2": tl2}, "reduce_all", "all"),
):
    for _what, _function in _functions.items():
        define(
            Operator(
                _letter + _what,
                _function,
                _kind,  # type: ignore[arg-type]
                1,
                _nonnegative if _what in ("l2", "std") else _same,
                lambda x, what=_what, over=_over: f"\\operatorname{{{what}}}_\\mathrm{{{over}}}({x})",
                2,
                scope="row" if _letter == "r" else "matrix",
            )
        )
