"""Image classifiers in Python: loaded, pruned on images without labels, written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from evoprune.allocations import names_file
from evoprune.calibration import TEXT, Progress, silent
from evoprune.fitness.allocating import allocate_model, statistics_needed
from evoprune.fitness.allocators import configured
from evoprune.fitness.card import public_name
from evoprune.fitness.checkpoint import check_out_dir, write_checkpoint
from evoprune.fitness.classifiers import ImageClassifier, agreement, load_classifier, read_images
from evoprune.fitness.compressors import AtRunTime, compressor_of
from evoprune.fitness.pruning import check_rule, mask_rule, needed_statistics, prune_model
from evoprune.fitness.statistics import Statistics
from evoprune.fitness.statistics_images import image_statistics
from evoprune.metrics.allocation import Allocation
from evoprune.metrics.allocation_file import read_allocation, to_json
from evoprune.metrics.criterion import Criterion
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.exported import load_metric
from evoprune.metrics.records import MaskRule
from evoprune.outcomes import PrunedClassifier, criterion_label

__all__ = ["ImageClassifier", "load_classifier", "prune_classifier"]


def prune_classifier(
    model: str | ImageClassifier,
    *,
    images: str | Path | Tensor | None = None,
    metric: str | Criterion = "wanda",
    sparsity: float | None = None,
    pattern: str | None = None,
    group: str | None = None,
    allocation: str | Path | Allocation | None = None,
    allocation_parameters: Mapping[str, Any] | None = None,
    compressor: str = "mask",
    calibration_sequences: int = TEXT.calibration_sequences,
    seed: int = 0,
    out: str | Path | None = None,
    progress: Progress = silent,
    **loading: Any,
) -> PrunedClassifier:
    """Remove weights of the linear layers inside the blocks of an image classifier, such as a ViT.

    Args:
        model: a folder, a Hub id, or a loaded classifier, which stays as it is: the result has a copy.
        images: what statistics are of, without labels: a folder of images (a third of them, the rest for the report),
            rows that name images, or pixel values [n, channels, height, width] float32. None where nothing is read.
        metric, sparsity, pattern, group, compressor: as in `evoprune.prune`. Gradients, of ``gblm`` and the like, are
            those of the mean squared logits.
        allocation: a sparsity for each matrix: an `Allocation`, a file of one, or the name of an allocator that reads
            weights, scores or statistics, such as ``lpvit``.
        allocation_parameters: of that allocator.
        calibration_sequences: how many images of side A, at most.
        seed: draws them.
        out: a new or empty folder for a checkpoint that plain transformers loads; None writes nothing.
        progress: told what runs and how far it is.
        loading: further arguments of `load_classifier`, where `model` is a name.

    Raises:
        InvalidInput: something of the above does not exist or does not fit; no checkpoint is written.

    Source: block sparsity by slopes, Xu et al. 2024 (LPViT), arXiv:2407.02068, is ``compressor="block",
    allocation="lpvit"``.
    """
    criterion = load_metric(metric) if isinstance(metric, str) else metric
    own = _given(allocation)
    rule = _rule(criterion, own, sparsity, pattern, group, allocation, compressor)
    if isinstance(compressor_of(compressor), AtRunTime):
        raise InvalidInput(f"compressor {compressor!r} is of language models: give one of weights, such as block")
    if own is not None and allocation_parameters:
        raise InvalidInput(f"parameter {min(allocation_parameters)!r} is of an allocator, and this allocation is there")
    allocator = None if allocation is None or own is not None else configured(str(allocation), allocation_parameters)
    needs = needed_statistics(criterion, compressor)
    if allocator is not None:
        if allocator.uses - {"scores"}:
            raise InvalidInput(f"allocator {allocation!r} runs a language model on text: give one such as lpvit or owl")
        needs |= statistics_needed(allocator, criterion)
    if needs and images is None:
        raise InvalidInput(f"statistics ({', '.join(sorted(needs))}) are of images: give a folder of some")
    if out is not None:
        check_out_dir(out)
    loaded = model.copy() if isinstance(model, ImageClassifier) else load_classifier(model, **loading)
    check_rule(loaded, rule, compressor)
    read, held_out = _images(loaded, images, calibration_sequences, seed) if needs else (None, None)
    statistics: Statistics | None = None
    if read is not None:
        statistics = image_statistics(
            loaded, read, needs, progress=lambda done, total: progress("collecting statistics", done, total)
        )
    dense = None if held_out is None else loaded.logits(held_out)
    if allocator is not None:
        assert rule.sparsity is not None
        given: dict[str, Any] = {"criterion": criterion, "statistics": statistics, "progress": progress}
        own = allocate_model(loaded, str(allocation), allocator, rule.sparsity, **given)
        rule = MaskRule(own.sparsity)
    layers = prune_model(
        loaded,
        criterion,
        rule,
        statistics=statistics,
        compressor=compressor,
        allocation=own,
        progress=lambda done, total: progress("pruning matrices", done, total),
    )
    reads = compressor_of(compressor).reads_criterion
    pruned = PrunedClassifier(
        classifier=loaded,
        criterion=criterion_label(metric, criterion) if reads else None,
        rule=rule,
        compressor=compressor,
        accumulation=None if statistics is None else "dense",
        layers=layers,
        allocation=own,
        held_out=None if dense is None or held_out is None else agreement(dense, loaded.logits(held_out)),
    )
    if out is None:
        return pruned
    where = public_name(str(images)) if isinstance(images, (str, Path)) else None
    recipe: dict[str, Any] = {
        "criterion": pruned.criterion,
        "sparsity": rule.sparsity,
        "pattern": str(rule) if rule.pattern else None,
        "group": rule.group,
        "allocation": None if own is None else to_json(own),
        "compressor": compressor,
        "calibration": None
        if read is None
        else {"images": where, "side": "A", "count": len(read), "seed": seed, "statistics": sorted(needs)},
    }
    report = {name: value for name, value in pruned.to_json().items() if name in ("removed", "prunable", "layers")}
    report["held_out"] = pruned.held_out
    progress("writing the checkpoint", 0, 1)
    written = write_checkpoint(loaded, out, recipe=recipe, report=report, sparsity=pruned.sparsity_report())
    progress("writing the checkpoint", 1, 1)
    return replace(pruned, out=written)


def _given(allocation: str | Path | Allocation | None) -> Allocation | None:
    """The allocation that is there already; None if there is none, or an allocator makes it.

    Raises:
        InvalidInput: a file that is no allocation.
    """
    if isinstance(allocation, Allocation):
        return allocation
    return read_allocation(Path(allocation)) if allocation is not None and names_file(allocation) else None


def _rule(
    criterion: Criterion,
    own: Allocation | None,
    sparsity: float | None,
    pattern: str | None,
    group: str | None,
    allocation: object,
    compressor: str,
) -> MaskRule:
    """How much goes, in total where there is an allocation.

    Raises:
        InvalidInput: two things say it, or what says it cannot be.
    """
    if allocation is None:
        return mask_rule(criterion, sparsity, pattern, group, compressor)
    if pattern is not None or group is not None:
        raise InvalidInput("an allocation prunes by row: leave out the pattern and the group")
    if own is None:
        return MaskRule(mask_rule(criterion, sparsity, None, None, compressor).sparsity)
    if sparsity is not None and sparsity != own.sparsity:
        raise InvalidInput(f"the allocation's budget is {own.sparsity:g}, not {sparsity:g}: leave out the sparsity")
    return MaskRule(own.sparsity)


def _images(
    classifier: ImageClassifier, images: str | Path | Tensor | None, count: int, seed: int
) -> tuple[Tensor | None, Tensor | None]:
    """Images for statistics, and others for the report; no others of pixel values that were given."""
    if images is None or isinstance(images, Tensor):
        return images, None
    read = read_images(classifier, str(images), "A", count=count, seed=seed)
    return read, read_images(classifier, str(images), "C", count=count)
