"""Score a candidate with one resident model: write pruned weights into it, run forward, measure.

The dense weights of the prunable matrices lie in a memory-mapped file that all workers of a node share. A candidate
overwrites the model's own copy, so there is no second copy in a worker and no undo log; the next candidate, or
`restore`, writes from the file again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evoprune.fitness.compressing import Compressing
from evoprune.fitness.compressors import stores_weights
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.objectives import Objective
from evoprune.fitness.resident import ResidentWeights
from evoprune.fitness.samples import Sequences
from evoprune.fitness.statistics import Statistics
from evoprune.fitness.teacher import Teacher, WindowLosses, linear_head, window_losses
from evoprune.metrics.criterion import Criterion
from evoprune.metrics.errors import InvalidCandidate
from evoprune.metrics.interpreter import free_inputs
from evoprune.metrics.mask import check_finite, global_masks, mask, own_rule
from evoprune.metrics.records import MaskRule, Site


class Evaluator:
    """A dense model that candidates are tried on.

    Args:
        language_model: its weights are overwritten; `restore` brings them back.
        dense: safetensors file with the dense [out, in] weight of every site, by site name.
        statistics: of the dense model.
        windows: of text B.
        teacher: of the same windows; None if no objective needs it.
        rule: how many weights go.
        own: sparsity of every site by name, in [0, 1], in place of one; empty if there is one. `rule` is then their
            budget, by row.
        compressor: that reads a criterion: what becomes of the weights that a mask keeps; its `needs` are among the
            statistics.

    Attributes:
        own: as given. What is applied next reads it, so that one model can be tried at several.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        dense: Path,
        statistics: Statistics,
        windows: Sequences,
        teacher: Teacher | None,
        rule: MaskRule,
        own: Mapping[str, float] | None = None,
        compressor: str = "mask",
    ) -> None:
        self.language_model = language_model
        self.windows = windows
        self.teacher = teacher
        self.rule = rule
        self.own: Mapping[str, float] = own or {}
        self.statistics = statistics
        self.head = linear_head(language_model.model, windows)
        self._resident = ResidentWeights(language_model, dense)
        self._compressing = Compressing(compressor, self._given) if stores_weights(compressor) else None

    @property
    def sites(self) -> list[Site]:
        """The prunable matrices, in model order."""
        return [bound.site for bound in self.language_model.sites]

    def inputs(self, site: Site, needs: frozenset[str]) -> dict[str, Tensor]:
        """Float32 terminals of a site by name: the free ones and `needs`."""
        weight = self._resident.dense(site.name).to(self.language_model.device)
        return {
            **free_inputs(site, weight, self.rule.fraction),
            **self.statistics.site_statistics(site.name, needs, weight.device),
        }

    def _given(self, site: Site, needs: frozenset[str]) -> tuple[Tensor, Mapping[str, Tensor]]:
        weight = self._resident.dense(site.name).to(self.language_model.device)
        return weight, self.statistics.site_statistics(site.name, needs, weight.device)

    def masks(self, criterion: Criterion, max_tied: float | None = None) -> Iterator[tuple[Site, Tensor]]:
        """(site, [out, in] bool mask, True = keep) for every site, one at a time unless the group is global.

        Args:
            max_tied: as `mask` takes it.

        Raises:
            InvalidCandidate: scores that are not finite, tie too often, or need a statistic that is not there.
        """
        if self.rule.group == "global" and self.rule.sparsity is not None:
            scores = [criterion.score(site, self.inputs(site, criterion.needs)) for site in self.sites]
            yield from zip(self.sites, global_masks(scores, self.rule.sparsity), strict=True)
            return
        for site in self.sites:
            rule = own_rule(self.rule, self.own, site.name)
            if rule is None:
                shape, device = (site.out_features, site.in_features), self.language_model.device
                yield site, torch.zeros(shape, dtype=torch.bool, device=device)
                continue
            # Scores are those of the budget whatever a matrix loses, as in `prune_model`.
            scores_of_site = criterion.score(site, self.inputs(site, criterion.needs))
            if scores_of_site.shape != (site.out_features, site.in_features):
                raise InvalidCandidate("TYPE", f"scores of shape {tuple(scores_of_site.shape)} for {site.name}")
            check_finite(scores_of_site)
            yield site, mask(scores_of_site, rule, max_tied=max_tied)

    @torch.no_grad()
    def apply(self, criterion: Criterion, max_tied: float | None = None) -> int:
        """Write what the compressor makes of every site by its mask into the model; the number of weights removed.

        Of a site at sparsity 1 the bias goes too. Nothing but `restore` brings it back.

        Raises:
            InvalidCandidate: see `masks`, or weights that are not finite; the model is then partly overwritten, as the
                next `apply` expects.
            InvalidInput: the compressor can make nothing of the statistics.
        """
        bound = {entry.site.name: entry for entry in self.language_model.sites}
        removed = 0
        for site, keep in self.masks(criterion, max_tied):
            if self.own.get(site.name) == 1:
                self._resident.empty(bound[site.name])
            elif self._compressing is None:
                self._resident.write(bound[site.name], keep)
            else:
                weight = self._compressing.weight(site, keep, self.rule.pattern)
                self._resident.write_weight(bound[site.name], weight)
            removed += site.weights - int(keep.sum())
        return removed

    def restore(self) -> None:
        """Write the dense weights back.

        Raises:
            AuditFailed: the restored model differs from the one that was loaded.
        """
        self._resident.restore()

    @contextmanager
    def applied(self, criterion: Criterion) -> Iterator[int]:
        """`apply` inside the block, `restore` after it, whatever happens."""
        try:
            yield self.apply(criterion)
        finally:
            self.restore()

    def losses(self, first: int, last: int) -> WindowLosses:
        """Losses of the model as it stands on windows `first` to `last` of text B."""
        teacher = None if self.teacher is None else self.teacher[slice(first, last)]
        return window_losses(self.language_model.model, self.head, self.windows[first:last], teacher)

    @torch.no_grad()
    def reconstruction_errors(self) -> Mapping[str, float]:
        """tr(D H D^T) / tr(W H W^T) of every site, D the difference between the dense and the resident weight."""
        errors = {}
        for entry in self.language_model.sites:
            gram = self.statistics.tensor(entry.site.name, "H", self.language_model.device)
            dense = self._resident.dense(entry.site.name).to(gram.device).float()
            lost = dense - entry.weight().float()
            above, below = (((m @ gram) * m).sum(dtype=torch.float64).item() for m in (lost, dense))
            errors[entry.site.name] = above / below if below else 0.0
        return errors

    def evaluate(
        self,
        criterion: Criterion,
        objective: Objective,
        rungs: Sequence[int],
        thresholds: Sequence[float | None],
        max_tied: float | None = None,
    ) -> dict[str, Any]:
        """Fitness of a criterion, rung by rung until it is cut.

        Args:
            rungs: windows of text B seen up to each rung, increasing.
            thresholds: per rung but the last, the largest fitness that goes on; None lets all through.
            max_tied: as `mask` takes it.

        Returns:
            ``rungs`` (the fitness at each rung that ran), ``stderr`` (over the values of the last one), ``removed``
            (weights).

        Raises:
            InvalidCandidate: see `masks`; or NONFINITE, the fitness is.
        """
        removed = self.apply(criterion, max_tied)
        values = torch.empty(0, dtype=torch.float64)
        fitness: list[float] = []
        for rung, last in enumerate(rungs):
            first = rungs[rung - 1] if rung else 0
            values = torch.cat([values, objective.measure(self, first, last)])
            if not torch.isfinite(values).all():
                raise InvalidCandidate("NONFINITE", "the pruned model's loss is not finite")
            fitness.append(values.mean().item())
            threshold = thresholds[rung] if rung < len(thresholds) else None
            if threshold is not None and fitness[-1] > threshold:
                break
        stderr = (values.std() / len(values) ** 0.5).item() if len(values) > 1 else 0.0
        return {"rungs": fitness, "stderr": stderr, "removed": removed}
