"""Inputs of layers that are let go at run time: those near the value that most of them have."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Threshold:
    """A hook before a layer: x becomes the mode wherever |x - mode| ≤ threshold.

    The output is W (x - mode) + W mode + bias. The middle of it is the same for every token, so that a kernel for
    sparse vectors reads no column of W whose input was let go. Here the two are one product, so that nothing changes by
    a single bit at a threshold of 0.

    Attributes:
        mode: what most inputs are near.
        threshold: 0 lets nothing go.

    Source: Chua et al. 2024 (SCAP), arXiv:2412.07174.
    """

    mode: float
    threshold: float

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of the layer."""
        return self.applied(inputs[0]), *inputs[1:]

    def applied(self, inputs: Tensor) -> Tensor:
        """Inputs of any shape, in their dtype."""
        return torch.where(self.dropped(inputs), torch.tensor(self.mode, dtype=inputs.dtype), inputs)

    def dropped(self, inputs: Tensor) -> Tensor:
        """Which of the inputs are let go, bool."""
        return (inputs.float() - self.mode).abs() <= self.threshold


@dataclass(frozen=True, slots=True)
class Thresholded:
    """A layer with a threshold.

    Attributes:
        name: module path.
        threshold: what stands before it.
        sparsity: share of its inputs that is let go, on the text that set the threshold.
        error: what that loses of its output, as a fraction of the sum of its squares, on the same text.
    """

    name: str
    threshold: Threshold
    sparsity: float
    error: float


def threshold_of(module: nn.Module) -> Threshold | None:
    """The hook that a layer has, if it has one."""
    return next((hook for hook in module._forward_pre_hooks.values() if isinstance(hook, Threshold)), None)


def set_thresholds(layers: Iterable[tuple[nn.Module, Threshold]]) -> None:
    """Give layers their hooks, in place of those that they have."""
    for module, threshold in layers:
        clear_thresholds([module])
        module.register_forward_pre_hook(threshold)


def clear_thresholds(layers: Iterable[nn.Module]) -> None:
    """Take the hooks of layers away."""
    for module in layers:
        for key in [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, Threshold)]:
            del module._forward_pre_hooks[key]
