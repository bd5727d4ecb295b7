"""LoRA: a low-rank change of every prunable matrix learns, and is added to the matrix at the end, under its mask."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from evoprune.fitness.models import LanguageModel
from evoprune.fitness.recoveries import RECOVERIES, Training
from evoprune.fitness.surgery import put_module
from evoprune.metrics.parameters import check_range

ADAPTER = "recovery"


@dataclass(frozen=True)
class Lora(Training):
    """Train a low-rank change of every prunable matrix, merged at the end; where a weight is gone it changes nothing.

    Attributes:
        rank: of the change; no more than the matrix has.
        alpha: the change is scaled by alpha / rank.
    """

    rank: int = 8
    alpha: float = 16.0

    # LLM-Pruner's 1e-4 at the width of 4,096.
    rate_by_width: ClassVar[float] = 0.4
    packages: ClassVar[tuple[str, ...]] = ("accelerate", "peft")
    source: ClassVar[str] = "Hu et al. 2022, arXiv:2106.09685; as in Ma et al. 2023 (LLM-Pruner), arXiv:2305.11627"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("rank", self.rank, 1, 1 << 16)
        check_range("alpha", self.alpha, 0, 1 << 16)

    def begin(self, language_model: LanguageModel, kept: Mapping[str, Tensor]) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        sites = language_model.sites
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # any number will do
            # As one expression: a list would be taken for ends of names.
            target_modules="|".join(re.escape(bound.site.name) for bound in sites),
            fan_in_fan_out=any(bound.transposed for bound in sites),
        )
        inject_adapter_in_model(config, language_model.model, ADAPTER)
        for bound in sites:
            keep = kept.get(f"{bound.site.name}.weight")
            if keep is not None:
                adapted = language_model.model.get_submodule(bound.site.name)
                adapted.register_forward_hook(_inside(keep, isinstance(bound.module, Conv1D)))

    @torch.no_grad()
    def end(self, language_model: LanguageModel, kept: Mapping[str, Tensor]) -> None:
        model = language_model.model
        for bound in language_model.sites:
            adapted: Any = model.get_submodule(bound.site.name)
            change: Tensor = adapted.get_delta_weight(ADAPTER)
            keep = kept.get(f"{bound.site.name}.weight")
            weight = bound.module.get_parameter("weight")
            weight.add_(change if keep is None else change.masked_fill(~keep, 0))
            put_module(model, bound.site.name, bound.module)
        del model.peft_config


def _inside(keep: Tensor, transposed: bool) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """A hook that takes back what the change does where no weight is: what is learned is what is merged."""

    def hook(adapted: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        outside = adapted.get_delta_weight(ADAPTER).masked_fill(keep, 0)
        return output - functional.linear(inputs[0], outside.T if transposed else outside)

    return hook


RECOVERIES.add("lora", Lora())
