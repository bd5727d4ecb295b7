"""N:M masks of a resident model, chosen matrix by matrix among metrics, or weight by weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evoprune.fitness.adapters import SiteModule
from evoprune.fitness.mask_units import Mask, UnitTable
from evoprune.fitness.maskers import ByMetrics, criterion_named
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.pruning import site_scores
from evoprune.fitness.resident import ResidentWeights
from evoprune.fitness.statistics_reader import Statistics
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.mask import mask as mask_of
from evoprune.metrics.records import MaskRule


class MatrixMasks(ABC):
    """Masks the matrices of a resident model; of two masks in turn, those matrices are rewritten that differ.

    Args:
        language_model: dense when it is handed over; its site weights are overwritten.
        dense: as `ResidentWeights` takes it.
        table: of units of the matrices of this model.
    """

    def __init__(self, language_model: LanguageModel, dense: Path, table: UnitTable) -> None:
        self._sites = language_model.sites
        self._weights = ResidentWeights(language_model, dense)
        self._table = table
        # What each matrix was masked by last; None: it is dense, or a write was interrupted.
        self._written: list[Mask | None] = [None] * len(self._sites)

    @abstractmethod
    def matrix(self, index: int, chosen: Mask) -> Tensor:
        """[out, in] bool on the CPU: which weights of a matrix stay.

        Args:
            index: of the matrix, in model order.
            chosen: [its units] bool.
        """

    @abstractmethod
    def factors(self, index: int, values: Tensor) -> Tensor:
        """[out, in] what the weights of a matrix are multiplied by; differentiable.

        Args:
            index: of the matrix, in model order.
            values: [its units], on the device of the matrix.
        """

    @contextmanager
    def kept(self, mask: Mask) -> Iterator[None]:
        """Inside, and until the next mask or `restore`, the model is what the mask leaves.

        Raises:
            InvalidInput: it is no mask of these units.
        """
        self._table.check(mask)
        for index, bound in enumerate(self._sites):
            chosen = mask[self._table.of_row(index)]
            written = self._written[index]
            if written is None or not np.array_equal(written, chosen):
                self._written[index] = None
                self._weights.write(bound, self.matrix(index, chosen).to(bound.weight().device))
                self._written[index] = chosen.copy()
        yield

    @contextmanager
    def relaxed(self, values: Tensor) -> Iterator[None]:
        """Inside, every weight is multiplied by the value of its unit, or by those of the metrics that keep it, added.

        Gradients with respect to values flow back; the memory is that of a second model.

        Args:
            values: [n] floating point.

        Raises:
            InvalidInput: there are not as many, or one is not finite.
        """
        if values.shape != (self._table.n,) or not bool(values.isfinite().all()):
            raise InvalidInput(f"values of shape {list(values.shape)} for {self._table.n} units: give as many, finite")
        with ExitStack() as stack:
            for index, bound in enumerate(self._sites):
                weight = self._weights.dense(bound.site.name).to(bound.weight().device)
                part = values[self._table.of_row(index)].to(weight.device, weight.dtype)
                stack.enter_context(_weight_is(bound, weight * self.factors(index, part)))
            yield

    def restore(self) -> None:
        """Write the dense weights back.

        Raises:
            AuditFailed: the restored model differs from the one that was handed over.
        """
        self._written = [None] * len(self._sites)
        self._weights.restore()


class MetricMasks(MatrixMasks):
    """One of several metrics masks each matrix. All masks are kept, packed: a bit for each weight and metric.

    Args:
        language_model, dense: see `MatrixMasks`.
        table: of units by metrics.
        statistics: at least those that the metrics need.

    Raises:
        InvalidInput: a metric cannot score a matrix.
    """

    def __init__(self, language_model: LanguageModel, dense: Path, table: UnitTable, statistics: Statistics) -> None:
        super().__init__(language_model, dense, table)
        assert isinstance(table.masker, ByMetrics)
        self._packed = [
            [
                np.packbits(metric_mask(bound, metric, table.masker.pattern, statistics).numpy())
                for metric in table.masker.metrics
            ]
            for bound in language_model.sites
        ]

    def matrix(self, index: int, chosen: Mask) -> Tensor:
        return self._unpacked(index, int(chosen.argmax()))

    def factors(self, index: int, values: Tensor) -> Tensor:
        terms = [
            value * self._unpacked(index, metric).to(values.device, values.dtype) for metric, value in enumerate(values)
        ]
        return torch.stack(terms).sum(0)

    def _unpacked(self, index: int, metric: int) -> Tensor:
        site = self._sites[index].site
        bits: NDArray[np.uint8] = np.unpackbits(self._packed[index][metric], count=site.weights)
        return torch.from_numpy(bits.view(np.bool_)).view(site.out_features, site.in_features)


class WeightMasks(MatrixMasks):
    """The mask itself says which weights stay."""

    def matrix(self, index: int, chosen: Mask) -> Tensor:
        site = self._sites[index].site
        return torch.from_numpy(chosen.copy()).view(site.out_features, site.in_features)

    def factors(self, index: int, values: Tensor) -> Tensor:
        site = self._sites[index].site
        return values.view(site.out_features, site.in_features)


@torch.no_grad()
def metric_mask(bound: SiteModule, metric: str, pattern: tuple[int, int], statistics: Statistics | None) -> Tensor:
    """[out, in] bool on the CPU, True = keep: the N:M mask of a dense matrix by a metric.

    Args:
        metric: as `criterion_named` takes it.
        pattern: (N, M).
        statistics: at least those that the metric needs; None if it needs none.

    Raises:
        InvalidInput: the metric cannot score this matrix, or M does not divide its width.
    """
    rule = MaskRule(None, pattern)
    return mask_of(site_scores(bound, criterion_named(metric), rule, statistics), rule).cpu()


@contextmanager
def _weight_is(bound: SiteModule, weight: Tensor) -> Iterator[None]:
    """Inside, a linear layer has this weight, [out, in], through which gradients flow."""
    parameters: dict[str, nn.Parameter | Tensor | None] = bound.module._parameters  # type: ignore[assignment]
    before = parameters["weight"]
    parameters["weight"] = weight.T if bound.transposed else weight
    try:
        yield
    finally:
        parameters["weight"] = before
