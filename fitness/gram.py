"""What a Gram matrix of layer inputs says about single weights: diagonals of the inverse Hessian."""

from __future__ import annotations

import torch
from torch import Tensor

from evoprune.metrics.errors import EvopruneError

DAMPINGS = (0.01, 0.1, 1.0)


def damped(hessian: Tensor, damping: float = DAMPINGS[0]) -> Tensor:
    """A copy of `hessian` that can be inverted.

    Args:
        hessian: [in, in], symmetric, non-negative diagonal.
        damping: fraction of the mean diagonal that is added to the diagonal.

    Dead columns (zero diagonal) get the diagonal 1 before the mean is taken.

    Source: Frantar and Alistarh 2023, arXiv:2301.00774, and its reference code.
    """
    result = hessian.clone()
    diagonal = result.diagonal()
    diagonal.masked_fill_(diagonal == 0, 1)
    diagonal += damping * diagonal.mean()
    return result


def damped_cholesky(hessian: Tensor, least: float = DAMPINGS[0]) -> tuple[Tensor, float]:
    """Lower Cholesky factor [in, in] of the damped Hessian, and the damping.

    Args:
        hessian: see `damped`.
        least: the damping to begin with; where it does not do, the greater ones of `DAMPINGS` in turn.

    Raises:
        EvopruneError: no damping makes the matrix positive definite.
    """
    for damping in (least, *(more for more in DAMPINGS if more > least)):
        factor, failed = torch.linalg.cholesky_ex(damped(hessian, damping))
        if not failed.item() and bool(factor.diagonal().isfinite().all()):
            return factor, damping
    raise EvopruneError(f"the Gram matrix of {hessian.shape[0]} inputs is not positive definite, even damped")


def inverse_diagonals(gram: Tensor, tokens_per_sequence: float) -> tuple[Tensor, Tensor]:
    """The terminals ``Hinv`` and ``Hchol2``, each [1, in] float32.

    Args:
        gram: H = (1/T) Σ x xᵀ over all tokens, [in, in] float32.
        tokens_per_sequence: T/S; the Hessian of the layer's squared error per sequence is 2·(T/S)·H.

    Returns:
        diag((H + λI)⁻¹) and diag(U)², where U is the upper Cholesky factor of (H + λI)⁻¹: SparseGPT's
        order-dependent version, equal to the first in its first column only.

    Raises:
        EvopruneError: the matrix is not positive definite, even damped.
    """
    factor, inverse = _reversed_factors(2 * tokens_per_sequence * wide(gram))
    diagonals = inverse.square().sum(0), factor.diagonal().pow(-2)
    hinv, hchol2 = (diagonal.flip(0).float()[None] for diagonal in diagonals)
    return hinv, hchol2


def inverse_factor(hessian: Tensor, damping: float = DAMPINGS[0]) -> Tensor:
    """U, upper triangular [in, in] float64 (float32 on MPS), with Uᵀ U = (H + λI)⁻¹: SparseGPT's factor.

    Args:
        hessian: H, [in, in] float32, symmetric, non-negative diagonal.
        damping: the least, see `damped_cholesky`.

    Raises:
        EvopruneError: the matrix is not positive definite, even damped.
    """
    return _reversed_factors(wide(hessian), damping)[1].flip(0, 1)


def wide(matrix: Tensor) -> Tensor:
    """`matrix` in float64, or as it is on MPS, which has none."""
    return matrix if matrix.device.type == "mps" else matrix.to(torch.float64)


def _reversed_factors(hessian: Tensor, damping: float = DAMPINGS[0]) -> tuple[Tensor, Tensor]:
    """The lower Cholesky factor of the damped Hessian with both axes reversed, and its inverse.

    With both axes reversed, H = L Lᵀ becomes H = R Rᵀ with R upper, so U = R⁻¹: one factorisation serves both.
    """
    factor, _ = damped_cholesky(hessian.flip(0, 1), damping)
    identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    return factor, torch.linalg.solve_triangular(factor, identity, upper=False)
