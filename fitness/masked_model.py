"""A model as a mask of its units leaves it, without a weight changed: hooks on what output matrices read and write."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evoprune.fitness.adapters import SiteModule
from evoprune.fitness.mask_units import Mask, UnitTable, unit_columns
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.units import BlockUnits
from evoprune.metrics.errors import InvalidInput


class MaskedModel:
    """Masks a dense model while it runs.

    The columns of the output matrices that belong to units that go read zeros, and an attention or MLP of which nothing
    stays writes zeros, its output bias included. So the model says what the compact model without these units says.
    Source: Gao et al. 2025 (arXiv:2406.10576), released code; masks act before the output and the down matrix.

    Args:
        language_model: dense; stays so.
        units: of all its blocks.
        table: of the same model.
    """

    def __init__(self, language_model: LanguageModel, units: Sequence[BlockUnits], table: UnitTable) -> None:
        bound = {site.site.name: site for site in language_model.sites}
        self._table = table
        self._outputs = [(bound[name], columns) for name, columns in unit_columns(table, units).items()]

    @contextmanager
    def kept(self, mask: Mask) -> Iterator[None]:
        """Inside, the model is what the mask leaves. Where all stays it is the model itself, to the last bit.

        Args:
            mask: [n] bool, True = keep.

        Raises:
            InvalidInput: it is no mask of these units.
        """
        self._table.check(mask)
        with ExitStack() as stack:
            for bound, columns in self._outputs:
                kept = mask[columns]
                if not kept.any():
                    stack.callback(bound.module.register_forward_hook(_nothing).remove)
                elif not kept.all():
                    gone = torch.from_numpy(~kept).to(bound.weight().device)
                    stack.callback(bound.module.register_forward_pre_hook(partial(_without, gone)).remove)
            yield

    @contextmanager
    def relaxed(self, values: Tensor) -> Iterator[None]:
        """Inside, what a unit gives is multiplied by its value; gradients with respect to values flow back.

        At zeros and ones this is what `kept` is. A part all of whose values are zero loses its output bias too, and
        passes gradients on.

        Args:
            values: [n] floating point, on any device.

        Raises:
            InvalidInput: there are not as many, or one is not finite.
        """
        if values.shape != (self._table.n,) or not bool(values.isfinite().all()):
            raise InvalidInput(f"values of shape {list(values.shape)} for {self._table.n} units: give as many, finite")
        with ExitStack() as stack:
            for bound, columns in self._outputs:
                weight = bound.weight()
                scale = values[torch.from_numpy(columns)].to(weight.device, weight.dtype)
                stack.callback(bound.module.register_forward_pre_hook(partial(_scaled, scale)).remove)
                if not values.detach()[np.unique(columns)].any():
                    stack.callback(bound.module.register_forward_hook(partial(_without_bias, bound)).remove)
            yield

    def restore(self) -> None:
        """The model is dense wherever no mask is on."""


def _without(gone: Tensor, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    # A product would keep a NaN.
    return (args[0].masked_fill(gone, 0), *args[1:])


def _nothing(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return torch.zeros_like(output)


def _scaled(scale: Tensor, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0] * scale, *args[1:])


def _without_bias(bound: SiteModule, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    bias = bound.bias()
    return output if bias is None else output - bias
