"""Every weight that is left learns, or those alone that write into the residual stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from evoprune.fitness.adapters import ADAPTERS
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.recoveries import RECOVERIES, Training
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.parameters import check_choice

TRAINED = ("all", "outputs")


@dataclass(frozen=True)
class Full(Training):
    """Train all weights, embeddings included, or the output projections of attention and MLP and all norms.

    Attributes:
        train: ``all``, or ``outputs`` for output projections and norms.
    """

    train: str = "all"

    # 2.4e-5 at the width of 4,096 where the specification says 1e-5, and 5e-4 for the reference model.
    rate_by_width: ClassVar[float] = 0.1
    source: ClassVar[str] = "Tang et al. 2025 (DarwinLM), arXiv:2502.07780, with masks that hold"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("train", self.train, TRAINED)

    def begin(self, language_model: LanguageModel, kept: Mapping[str, Tensor]) -> None:
        model = language_model.model
        if self.train == "all":
            model.requires_grad_(True)
            return
        family = model.config.get_text_config().model_type
        adapters = [ADAPTERS[family]] if family in ADAPTERS else []
        layouts = [layout for adapter in adapters for layout in (adapter.attention, adapter.mlp)]
        outputs = {layout.output for layout in layouts if layout is not None}
        if not outputs:
            raise InvalidInput(f"family {family!r} does not say which its output projections are: give train=all")
        for bound in language_model.sites:
            if bound.site.kind in outputs:
                bound.module.requires_grad_(True)
        for module in model.modules():
            if "norm" in type(module).__name__.lower():
                module.requires_grad_(True)

    def end(self, language_model: LanguageModel, kept: Mapping[str, Tensor]) -> None:
        """All of it is in the model already."""


RECOVERIES.add("full", Full())
