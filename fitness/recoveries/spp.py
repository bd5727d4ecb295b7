"""SPP: every weight that is left is scaled by what its column and its row have learned; what is zero stays zero."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from evoprune.fitness.adapters import SiteModule
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.recoveries import RECOVERIES, Training
from evoprune.fitness.surgery import put_module
from evoprune.metrics.parameters import check_range


@dataclass(frozen=True)
class Spp(Training):
    """Train factors of the weights that are left, one for each column and group of rows, and one for each row.

    Attributes:
        rank: groups of rows; where it does not divide the rows, the largest number below that does.
        scale: of the change.
        dropout: share of the inputs that the change does not see in a step.
    """

    rank: int = 16
    scale: float = 2.0
    dropout: float = 0.05

    # The paper's 4e-3 at the width of 4,096.
    rate_by_width: ClassVar[float] = 16.0
    source: ClassVar[str] = "Lu et al. 2024 (SPP), arXiv:2405.16057"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("rank", self.rank, 1, 1 << 16)
        check_range("scale", self.scale, 0, 1 << 16)
        check_range("dropout", self.dropout, 0, 0.99)

    def begin(self, language_model: LanguageModel, kept: Mapping[str, Tensor]) -> None:
        for bound in language_model.sites:
            put_module(language_model.model, bound.site.name, Scaled(bound, self))

    @torch.no_grad()
    def end(self, language_model: LanguageModel, kept: Mapping[str, Tensor]) -> None:
        for bound in language_model.sites:
            scaled = language_model.model.get_submodule(bound.site.name)
            assert isinstance(scaled, Scaled)
            bound.weight().add_(scaled.change())  # zero where the weight is
            put_module(language_model.model, bound.site.name, bound.module)


class Scaled(nn.Module):
    """A linear layer whose change, s · Rep(A) ∘ b ∘ W, learns: A is [r, in], each row for out / r rows; b is [out, 1].

    Source: Lu et al. 2024, arXiv:2405.16057: A begins as a linear layer does, b at zero.
    """

    def __init__(self, bound: SiteModule, settings: Spp) -> None:
        super().__init__()
        weight = bound.weight()
        rows, columns = weight.shape
        rank = max(size for size in range(1, min(settings.rank, rows) + 1) if rows % size == 0)
        self.base = bound.module
        self._bound, self._scale, self._dropout = bound, settings.scale, settings.dropout
        self.columns = nn.Parameter(torch.empty(rank, columns, device=weight.device))
        nn.init.kaiming_uniform_(self.columns, a=math.sqrt(5))
        self.rows = nn.Parameter(torch.zeros(rows, 1, device=weight.device))
        self.train(bound.module.training)

    def change(self) -> Tensor:
        """[out, in]: what is added to the weight."""
        weight = self._bound.weight()
        groups = weight.unflatten(0, (len(self.columns), -1))
        return self._scale * self.rows * (groups * self.columns[:, None]).flatten(0, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., out] of [..., in]. The change is computed again on the way back: it is as large as the weight."""
        dropped = functional.dropout(inputs, self._dropout, self.training)
        found: Tensor = self.base(inputs)
        return found + checkpoint(self._changed, dropped, use_reentrant=False)

    def _changed(self, inputs: Tensor) -> Tensor:
        return functional.linear(inputs, self.change())


RECOVERIES.add("spp", Spp())
