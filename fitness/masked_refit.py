"""The best weights on a mask: conjugate gradients on all rows of a matrix at once.

Every row has its own least-squares problem, on the columns that its mask keeps; all of them share one matrix, so that a
step of all rows is one product. The diagonal of the Gram matrix is the preconditioner.
Source: Meng et al. 2024 (ALPS, arXiv:2406.07831), section 3.3 and its reference code.
"""

from __future__ import annotations

import torch
from torch import Tensor

ITERATIONS = 200
"""Far more than all but the worst Gram matrices take."""

# The preconditioned residual of a row, squared, over that at its start: below it, float32 finds no better weights.
_DONE = 1e-12


def refit(weight: Tensor, keep: Tensor, hessian: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """V of the least tr((W - V) H (W - V)ᵀ) that is zero outside a mask.

    A row that loses nothing of its output by the mask keeps its weights as they are, bit for bit.

    Args:
        weight: W, [out, in] float32.
        keep: [out, in] bool, True = keep.
        hessian: H, [in, in] float32, positive definite: damped, which pulls the weights towards W.
        iterations: at most so many; a row ends sooner when it has converged.

    Returns:
        [out, in] float32.
    """
    new = weight.masked_fill(~keep, 0)
    diagonal = hessian.diagonal()
    residual = ((weight - new) @ hessian).masked_fill_(~keep, 0)
    scaled = residual / diagonal
    direction = scaled.clone()
    left = (residual * scaled).sum(1)
    goal = _DONE * left
    rows = (left > 0).nonzero()[:, 0]
    state = [part[rows] for part in (residual, direction, keep, left, goal)]
    change = torch.zeros_like(state[0])
    for _ in range(iterations):
        if not len(rows):
            break
        residual, direction, kept, left, goal = state
        image = (direction @ hessian).masked_fill_(~kept, 0)
        length = left / (direction * image).sum(1).clamp_(min=torch.finfo(left.dtype).tiny)
        change.addcmul_(direction, length[:, None])
        residual.addcmul_(image, length[:, None], value=-1)
        scaled = residual / diagonal
        after = (residual * scaled).sum(1)
        direction.mul_((after / left)[:, None]).add_(scaled)
        state[3] = after
        going = after > goal
        if not going.all():
            new[rows[~going]] += change[~going]
            rows, change, state = rows[going], change[going], [part[going] for part in state]
    new[rows] += change
    return new
