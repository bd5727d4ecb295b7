"""What a criterion says each unit of a mask is worth: what a policy starts from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from evoprune.fitness.mask_units import UnitTable
from evoprune.fitness.maskers import ByMetrics, ByUnits, criterion_named, parts_of
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.pruning import site_scores
from evoprune.fitness.statistics import Statistics
from evoprune.fitness.unit_criteria import UnitCriterion, UnitScores, output_sums, score_units
from evoprune.fitness.units import find_units
from evoprune.metrics.criterion import Criterion
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.records import MaskRule


@torch.no_grad()
def mask_unit_scores(
    language_model: LanguageModel,
    table: UnitTable,
    criterion: UnitCriterion | Criterion,
    statistics: Statistics,
    sparsity: float,
) -> NDArray[np.float64]:
    """Scores of the units of a dense model.

    Args:
        language_model: dense.
        table: of the same model.
        criterion: of units; or of weights, then the scores of an output matrix are added up over the columns of a
            unit. Single weights have their own scores; where metrics are chosen from, the one that is the criterion
            has 1 in every matrix, and the others 0.
        statistics: at least those that it needs.
        sparsity: the terminal of that name, of a criterion of weights; that of a pattern goes before.

    Returns:
        [n], finite, low = removed first. Of several neurons, and of a whole part, the sum of their scores; of a block
        that of both parts.

    Raises:
        InvalidInput: a score is not finite, a statistic was not collected, or it cannot score these units.
    """
    masker = table.masker
    if isinstance(masker, ByUnits):
        return _added_up(table, _scored(language_model, criterion, statistics, sparsity))
    if not isinstance(criterion, Criterion):
        raise InvalidInput(f"a criterion of units does not score {masker.kind}: give one of weights, such as wanda")
    if isinstance(masker, ByMetrics):
        named = np.array([criterion_named(metric) == criterion for metric in masker.metrics], dtype=np.float64)
        if not named.any():
            raise InvalidInput(f"the criterion is none of {', '.join(masker.metrics)}: start from one of these")
        return np.tile(named, len(table.rows))
    rule = MaskRule(None, masker.pattern)
    scores = [site_scores(bound, criterion, rule, statistics).flatten().cpu() for bound in language_model.sites]
    return torch.cat(scores).double().numpy()


def neuron_orders(
    language_model: LanguageModel, criterion: UnitCriterion | Criterion, statistics: Statistics, sparsity: float
) -> dict[int, tuple[int, ...]]:
    """The neurons of every block by its index, the highest score first; of equal ones the lower index.

    Args:
        language_model, criterion, statistics, sparsity: see `mask_unit_scores`.

    Raises:
        InvalidInput: see `mask_unit_scores`.
    """
    found = _scored(language_model, criterion, statistics, sparsity)
    return {block: tuple(torch.argsort(-scores.neurons, stable=True).tolist()) for block, scores in enumerate(found)}


def _scored(
    language_model: LanguageModel, criterion: UnitCriterion | Criterion, statistics: Statistics, sparsity: float
) -> list[UnitScores]:
    """Scores of KV groups, query heads and neurons of every block."""
    if not isinstance(criterion, Criterion):
        return score_units(language_model, criterion, statistics)
    rule, weights = MaskRule(sparsity), criterion
    return [
        output_sums(block, lambda bound: site_scores(bound, weights, rule, statistics).sum(0))
        for block in find_units(language_model)
    ]


def _added_up(table: UnitTable, found: Sequence[UnitScores]) -> NDArray[np.float64]:
    """The scores of the blocks, by unit of the table."""
    parts = []
    for row in table.rows:
        scores = found[row.block]
        heads = scores.heads if row.kind == "query-head" else scores.groups
        values = [(scores.neurons if part == "mlp" else heads).double().cpu().numpy() for part in parts_of(row.kind)]
        if row.of == 1:
            parts.append(np.array([sum(value.sum() for value in values)]))
        else:
            dealt = values[0][list(row.order)] if row.order else values[0]
            parts.append(np.add.reduceat(dealt, np.arange(0, row.of, row.size)))
    return np.concatenate(parts)
