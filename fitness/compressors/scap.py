"""SCAP: small inputs of linear layers are let go at run time, by a threshold that a text has set.

Layer by layer in the order of a forward pass, those before it with their thresholds already: the threshold lets a share
of all entries of the inputs go, those nearest to a centre, which is 0, the median, or the most frequent value.
Source: Chua et al. 2024, arXiv:2412.07174. There the density is of samples of three sizes; here it is of all
entries, in 2,000 bins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from evoprune.fitness.activations import Threshold, Thresholded, clear_thresholds, set_thresholds
from evoprune.fitness.adapters import SiteModule
from evoprune.fitness.block_walk import BlockWalk
from evoprune.fitness.compressors import COMPRESSORS, Cost, Goal
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.samples import Sequences
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.parameters import check_choice, check_range
from evoprune.metrics.records import Group, is_attention, removed_count

CENTRES = ("best", "zero", "median", "mode")
# What a threshold is the quantile of, and what the output is compared on.
_ENTRIES, _TOKENS = 1 << 25, 4096
_BINS = 2000
# Of what lies between these the density is taken: a few inputs of LLMs are hundreds of times as large as the others.
_RANGE = (0.005, 0.995)


@dataclass(frozen=True)
class Scap:
    """No weight goes: inputs near their centre are let go while the model runs, and with them columns of the matrix.

    Attributes:
        mlp_inputs: share of the inputs that go of the matrices that read the residual stream in an MLP.
        mlp_outputs: of the matrix that writes it.
        attention: of all matrices of the attention.
        centre: ``zero``, ``median``, ``mode``, or ``best`` for the one that loses least of the output.
    """

    mlp_inputs: float = 0.35
    mlp_outputs: float = 0.55
    attention: float = 0.0
    centre: str = "best"

    needs: ClassVar[frozenset[str]] = frozenset()
    reads_criterion: ClassVar[bool] = False
    keeps_mask: ClassVar[bool] = False
    keeps_weights: ClassVar[bool] = True
    groups: ClassVar[frozenset[Group]] = frozenset()
    cost: ClassVar[Cost] = "mask"
    source: ClassVar[str] = "Chua et al. 2024 (SCAP), arXiv:2412.07174"

    def __post_init__(self) -> None:
        for name in ("mlp_inputs", "mlp_outputs", "attention"):
            check_range(name, getattr(self, name), 0, 1)
        check_choice("centre", self.centre, CENTRES)

    def check(self, out_features: int, in_features: int, pattern: tuple[int, int] | None) -> None:
        """Refuse a pattern.

        Raises:
            InvalidInput: there is one.
        """
        if pattern is not None:
            raise InvalidInput(
                f"compressor 'scap' lets single inputs go, not {pattern[0]}:{pattern[1]}: give a sparsity"
            )

    def compress(
        self, weight: Tensor, goals: Iterable[Goal], statistics: Mapping[str, Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Refuses: a matrix alone has no inputs.

        Raises:
            InvalidInput: always.
        """
        raise InvalidInput(
            "compressor 'scap' removes no weights: prune by another one, and give the result thresholds by `prune "
            "--compressor scap`"
        )

    @torch.no_grad()
    def attach(
        self,
        language_model: LanguageModel,
        text: Sequences,
        sparsity: float | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> tuple[Thresholded, ...]:
        """Give layers their thresholds; see `evoprune.fitness.compressors.AtRunTime`."""
        blocks = [name for name, _ in language_model.blocks()]
        clear_thresholds(bound.module for bound in language_model.sites)
        walk = BlockWalk(language_model, blocks, [text])
        found: dict[str, Thresholded] = {}
        for at in range(len(blocks)):
            left = [bound for bound in language_model.sites if bound.site.block == at]
            last = [bound.site.name for bound in left if not is_attention(bound.site.kind)][-1:]
            while left:
                target = self._target(left[0], last) if sparsity is None else sparsity
                inputs, sharing = _inputs(walk, left)
                layers = [bound.module for bound in sharing]
                threshold, error = self._calibrated(inputs, layers, target)
                if target > 0:
                    set_thresholds((layer, threshold) for layer in layers)
                    share = threshold.dropped(inputs).float().mean().item()
                    for bound in sharing:
                        found[bound.site.name] = Thresholded(bound.site.name, threshold, share, error)
                left = [bound for bound in left if bound not in sharing]
            if at + 1 < len(blocks):
                walk.run({}, to=at + 1)
            progress(at + 1, len(blocks))
        return tuple(found[bound.site.name] for bound in language_model.sites if bound.site.name in found)

    def _target(self, bound: SiteModule, last: Sequence[str]) -> float:
        if is_attention(bound.site.kind):
            return self.attention
        return self.mlp_outputs if bound.site.name in last else self.mlp_inputs

    def _calibrated(self, inputs: Tensor, layers: Sequence[nn.Module], target: float) -> tuple[Threshold, float]:
        """The threshold of the centre that loses least of the output, and the relative output error.

        Args:
            inputs: [tokens, in].
            layers: that read them.
            target: share of the entries that goes.
        """
        makers: Mapping[str, Callable[[Tensor], float]] = {
            "zero": lambda values: 0.0,
            "median": lambda values: float(_smallest(values, (len(values) + 1) // 2)),
            "mode": _mode,
        }
        names = list(makers) if self.centre == "best" else [self.centre]
        values = inputs.flatten().float().cpu()
        some = inputs[:: -(-len(inputs) // _TOKENS)]
        whole = sum(_size(layer(some) - layer(torch.zeros_like(some[:1]))) for layer in layers)
        tried = []
        for name in names:
            centre = makers[name](values)
            count = removed_count(target, len(values))
            threshold = Threshold(centre, float(_smallest((values - centre).abs(), count)) if count else 0.0)
            changed = threshold.applied(some)
            lost = sum(_size(layer(changed) - layer(some)) for layer in layers)
            tried.append((lost / whole if whole > 0 else 0.0, threshold))
        error, best = min(tried, key=lambda found: found[0])
        return best, error


def _inputs(walk: BlockWalk, sites: Sequence[SiteModule]) -> tuple[Tensor, list[SiteModule]]:
    """What the first of some layers of the present block is given, [tokens, in], and which are given the same."""
    first: dict[str, Tensor] = {}
    seen: list[Tensor] = []

    def remember(name: str) -> Callable[[Tensor], None]:
        def see(inputs: Tensor) -> None:
            rows = inputs.reshape(-1, inputs.shape[-1])
            if name == sites[0].site.name:
                seen.append(rows.clone())
            first.setdefault(name, rows.clone())

        return see

    walk.run({bound.module: remember(bound.site.name) for bound in sites})
    leader = first[sites[0].site.name]
    rows = torch.cat(seen)
    rows = rows[:: max(1, -(-rows.numel() // _ENTRIES))]
    return rows, [bound for bound in sites if torch.equal(first[bound.site.name], leader)]


def _smallest(values: Tensor, count: int) -> float:
    """The `count`-th smallest of some values, from 1."""
    return float(np.partition(values.numpy(), count - 1)[count - 1])


def _mode(values: Tensor) -> float:
    """Where a Gaussian kernel density is highest, at half of Scott's bandwidth."""
    sample = values[:: -(-len(values) // _ENTRIES)].double()
    low, high = (_smallest(sample, max(1, round(share * len(sample)))) for share in _RANGE)
    inside = sample[(sample >= low) & (sample <= high)]
    if high <= low:
        return low
    step = (high - low) / _BINS
    width = 0.5 * len(inside) ** -0.2 * inside.std().item()
    counts = torch.histc(inside, _BINS, low, high)
    reach = min(_BINS, math.ceil(5 * width / step) + 1)
    apart = torch.arange(-reach, reach + 1, dtype=torch.float64) * step
    kernel = (-0.5 * (apart / max(width, step / 10)).square()).exp()
    density = functional.conv1d(counts[None, None], kernel[None, None], padding=reach)[0, 0]
    return low + (int(density.argmax()) + 0.5) * step


def _size(outputs: Tensor) -> float:
    return outputs.double().square().sum().item()


COMPRESSORS.add("scap", Scap())
