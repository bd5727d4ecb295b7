"""Pipelines of diffusers in Python: loaded, pruned component by component, written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from evoprune.allocations import SEARCHED
from evoprune.calibration import Progress, silent
from evoprune.fitness.allocating import allocate_model, searched_budgets, statistics_needed
from evoprune.fitness.allocators import configured
from evoprune.fitness.generator_loss import GeneratorLoss, draw_triples
from evoprune.fitness.pipelines import Pipeline, load_pipeline
from evoprune.fitness.pruning import DEFAULT_SPARSITY, needed_statistics, prune_model
from evoprune.metrics.criterion import Criterion
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.exported import load_metric
from evoprune.metrics.files import user_path
from evoprune.metrics.records import MaskRule
from evoprune.outcomes import PrunedPipeline, criterion_label

__all__ = ["Pipeline", "load_pipeline", "prune_pipeline"]

COMPRESSOR = "mask"
MOST_PROMPTS = 32
"""Prompts of a file that noise is compared for: each is a pass of the text encoder and two of the UNet a trial."""


def read_prompts(source: str) -> list[str]:
    """The lines of a text file that are not empty, up to `MOST_PROMPTS`.

    Raises:
        InvalidInput: there is no such file, or nothing in it.
    """
    try:
        text = user_path(source).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise InvalidInput(f"no prompts in {source[:200]!r} ({reason}): give a text file with one a line") from None
    found = [line.strip() for line in text.splitlines() if line.strip()]
    if not found:
        raise InvalidInput(f"no prompts in {source[:200]!r}: give a text file with one a line")
    return found[:MOST_PROMPTS]


def prune_pipeline(
    pipeline: str | Pipeline,
    *,
    metric: str | Criterion = "magnitude",
    sparsity: float | None = None,
    budgets: Mapping[str, float] | Literal["searched"] | None = None,
    allocation: str = "uniform",
    allocation_parameters: Mapping[str, Any] | None = None,
    loss: Callable[[Pipeline], float] | None = None,
    prompts: Sequence[str] | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    progress: Progress = silent,
) -> PrunedPipeline:
    """Remove linear weights of the text encoders and the denoiser; convolutions and the VAE stay as they are.

    Args:
        pipeline: a folder that diffusers wrote, or a loaded pipeline, which stays as it is.
        metric: a criterion that needs no calibration, such as ``magnitude``.
        sparsity, budgets: see `evoprune.allocate`; components are ``text_encoder`` and ``denoiser``. ``searched`` needs
            `loss` or `prompts`.
        allocation, allocation_parameters: an allocator that reads weights and scores alone, run on each component.
        loss: measures a pipeline as it is, low is good.
        prompts: in place of a loss: the noise that is predicted for them is compared with the dense pipeline's, as in
            `evoprune.fitness.generator_loss`, and no component may fall off a cliff.
        seed: draws the latents of the prompts.
        out: a new or empty folder that diffusers then loads; None writes nothing.
        progress: told what runs and how far it is.

    Raises:
        InvalidInput: something of the above does not exist or does not fit.

    Source: Ramesh and Zhao 2024, arXiv:2411.15113, which prunes 47.5 % of the text encoder and 35 % of the denoiser.
    """
    criterion = load_metric(metric) if isinstance(metric, str) else metric
    allocator = configured(allocation, allocation_parameters)
    if needs := statistics_needed(allocator, criterion) | needed_statistics(criterion, COMPRESSOR):
        raise InvalidInput(f"a pipeline has no calibration for {min(needs)}: give a metric such as magnitude")
    tries = "loss" in allocator.uses or budgets == SEARCHED
    if tries and loss is None and not prompts:
        raise InvalidInput("to try things out on a pipeline prompts are needed: give captions, such as those of images")
    target = DEFAULT_SPARSITY if sparsity is None and (budgets == SEARCHED or not budgets) else sparsity
    if target is not None:
        MaskRule(target)
    loaded = pipeline.copy() if isinstance(pipeline, Pipeline) else load_pipeline(pipeline)
    measure: Callable[[], float] | None = None
    by_component: Callable[[], Mapping[str, float]] | None = None
    if loss is not None:
        measure = partial(loss, loaded)
    elif tries and prompts:
        noise = GeneratorLoss(loaded, draw_triples(loaded, prompts, seed))
        measure, by_component = noise, noise.by_component
    given: dict[str, Any] = {"criterion": criterion, "loss": measure, "progress": progress}
    if isinstance(budgets, str):
        if budgets != SEARCHED or target is None:
            raise InvalidInput(f"budgets are {budgets[:40]!r}: give sparsities by group, or {SEARCHED}")
        budgets = searched_budgets(loaded, allocation, allocator, target, losses=by_component, **given)
        target = None
    found = allocate_model(loaded, allocation, allocator, target, budgets=budgets, **given)
    rule = MaskRule(found.sparsity)
    layers = prune_model(
        loaded,
        criterion,
        rule,
        compressor=COMPRESSOR,
        allocation=found,
        progress=lambda done, total: progress("pruning matrices", done, total),
    )
    return PrunedPipeline(
        pipeline=loaded,
        criterion=criterion_label(metric, criterion),
        rule=rule,
        compressor=COMPRESSOR,
        layers=layers,
        out=None if out is None else loaded.save(out).resolve(),
        allocation=found,
    )
