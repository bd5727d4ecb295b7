"""Relative output error of each layer: a proxy that needs no forward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from evoprune.fitness.objectives import OBJECTIVES, Measured, Role
from evoprune.metrics.criterion import Tags


class Reconstruction:
    """tr(D H D^T) / tr(W H W^T) with D the removed weights and H the full Gram matrix, one value a site.

    With only the diagonal of H, Wanda minimises this by construction, so a diagonal would find nothing better.
    """

    role: Role = "predicted"
    needs: frozenset[str] = frozenset({"H"})
    unit = "relative squared error"
    tags = Tags()

    def measure(self, measured: Measured, first: int, last: int) -> Tensor:
        return torch.tensor(list(measured.reconstruction_errors().values()), dtype=torch.float64)


OBJECTIVES.add("reconstruction", Reconstruction())
