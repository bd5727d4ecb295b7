"""What noise of the size of rounding errors in the inputs of a matrix does to the loss, to first order.

A sequence whose inputs X of a matrix are off by independent errors D of deviation σ has a loss that is off by the sum
of G ∘ D, G the gradient by these inputs; that sum is nearly normal, so its mean size is sqrt(2 / π) σ |G|. Rounded to b
bits the values of a range r lie r / (2^b - 1) apart, and σ is that over sqrt(12).
Source: pruning operators, section 12 (TDMPQ of CPTQuant, arXiv:2412.03599); Bennett 1948 (rounding errors).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import Tensor

from evoprune.fitness.adapters.base import SiteModule
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.samples import Sequences
from evoprune.fitness.statistics_gradient import Taps, gradient_pass, loss_scale
from evoprune.fitness.statistics_passes import PassSettings
from evoprune.metrics.errors import EvopruneError, InvalidInput
from evoprune.metrics.records import LANGUAGE


class NoiseSums(Taps):
    """Sums over sequences of |G|, and the range of the inputs, by site."""

    def __init__(self, sites: Iterable[SiteModule], scale: float = 1.0) -> None:
        super().__init__(sites, scale)
        self._norms = dict.fromkeys(self._sites, 0.0)
        self._ranges = dict.fromkeys(self._sites, (math.inf, -math.inf))
        self._counts = dict.fromkeys(self._sites, 0)

    def sizes(self) -> list[float]:
        """By site, sqrt(2 / π) / sqrt(12) times the mean of |G| times the range: over 2^b - 1, the change of the loss.

        Raises:
            EvopruneError: no gradient reached a site, or none that is finite.
        """
        found = []
        for name, norm in self._norms.items():
            count, (low, high) = self._counts[name], self._ranges[name]
            if not count or not math.isfinite(norm):
                raise EvopruneError(f"no finite gradient reaches {name}")
            found.append(math.sqrt(2 / math.pi / 12) * norm / count * (high - low))
        return found

    def _take(self, name: str, inputs: Tensor, output_gradient: Tensor) -> None:
        gradient = output_gradient @ self._sites[name].weight().float()
        self._norms[name] += gradient.double().norm().item()
        low, high = self._ranges[name]
        self._ranges[name] = min(low, inputs.min().item(), 0.0), max(high, inputs.max().item(), 0.0)
        self._counts[name] += 1


def noise_sizes(language_model: LanguageModel, sites: Sequence[SiteModule], text: Sequences) -> list[float]:
    """`NoiseSums.sizes` of some matrices on a text, in the order of `sites`, in nats per token.

    Args:
        language_model: in eval mode, its parameters frozen.
        sites: matrices of its decoder blocks.
        text: [n, window] int64, or samples.

    Raises:
        InvalidInput: a site is in a tower, which the gradient of the loss is not followed to.
        EvopruneError: see `NoiseSums.sizes`.
    """
    for bound in sites:
        if bound.site.component != LANGUAGE:
            raise InvalidInput(
                f"gradients are followed through the language model alone, and {bound.site.name} is in "
                f"{bound.site.component}: leave out that component, or choose an allocator without gradients"
            )
    scale = loss_scale(language_model.model.dtype)
    sums = NoiseSums(sites, scale)
    window = text.shape[1] if isinstance(text, Tensor) else 1
    settings = PassSettings().resolved(language_model, window)
    blocks = [block for _, block in language_model.blocks()]
    gradient_pass(
        language_model.model,
        sums,
        text,
        settings.gradient_batch or 1,
        language_model.device,
        scale,
        blocks,
        bool(settings.checkpointing),
        lambda rows: None,
    )
    return sums.sizes()
