"""Shapes in Python: a model is cut to one and written in a form that loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evoprune.api import own_copy
from evoprune.calibration import Progress, loaded, silent
from evoprune.fitness.card import Cut, PassTimes
from evoprune.fitness.checkpoint import check_out_dir, write_checkpoint
from evoprune.fitness.forms import cut_model, form_of, running_shapes
from evoprune.fitness.latency_passes import Work, shape_latencies
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.numerics import processor_name, torch_threads
from evoprune.fitness.path_refit import path_refits
from evoprune.fitness.pruning import PrunedLayer
from evoprune.fitness.structure_build import build_structure_database
from evoprune.fitness.structure_weights import RefitRecipe, refitted_outputs
from evoprune.fitness.units import BlockUnits, find_units
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.files import content_hash
from evoprune.metrics.shape import BlockShape, Shape
from evoprune.metrics.shape_file import read_shape, to_json
from evoprune.outcomes import CutModel
from evoprune.recoveries import given_recovery

TIMING_SECONDS = 15.0
"""For the time of a pass, about: of a large model on a slow device fewer turns are taken."""


def prune_shape(
    model: str | LanguageModel = "reference",
    shape: str | Path | Shape = "shape.json",
    *,
    form: str = "auto",
    recovery: str | None = None,
    recovery_tokens: int | None = None,
    recovery_loss: str | None = None,
    recovery_parameters: Mapping[str, Any] | None = None,
    calibration: str = "corpus",
    seed: int = 0,
    out: str | Path | None = None,
    latency: bool = True,
    progress: Progress = silent,
    **loading: Any,
) -> CutModel:
    """Cut a model to a shape, so that it is smaller, and write a checkpoint if asked to.

    Args:
        model: `reference`, a folder, a Hub id, or a loaded model, which stays as it is: the result has a copy.
        shape: what every block keeps: a `Shape`, or a file that holds one.
        form: what the checkpoint is like: ``plain`` (the original class loads it; all blocks have one width, or whole
            blocks are gone), ``padded`` (the same, blocks filled up with zeros to one width), ``compact`` (every block
            as small as it is; evoprune loads it, transformers with ``trust_remote_code=True``), ``masked`` (zeros,
            nothing smaller); ``auto`` is plain if the shape allows it, else compact.
        recovery, recovery_tokens, recovery_loss, recovery_parameters: training of what is left; see `prune`.
        calibration, seed: the text that a recovery learns from, and the seed of what it draws; nothing else reads them.
        out: a new or empty folder; None writes nothing.
        latency: measure, where a checkpoint is written, how long the dense model and what stays of it take for prefill
            and for one more token, for the model card; on a CPU with one thread.
        progress: told what runs.
        loading: further arguments of `load_model`, where `model` is a name.

    Raises:
        InvalidInput: something of the above does not exist or does not fit; no checkpoint is written.
    """
    if out is not None:
        check_out_dir(out)
    recovers = given_recovery(
        recovery, recovery_tokens, recovery_loss, recovery_parameters, source=calibration, seed=seed, out=out
    )
    given = shape if isinstance(shape, Shape) else read_shape(shape)
    language_model = own_copy(model) if isinstance(model, LanguageModel) else loaded(model, loading, progress)
    if language_model.cut:
        raise InvalidInput(f"model {language_model.name!r} is cut already: give the dense model")
    units = find_units(language_model)
    given.check(type(language_model.model).__name__, [block.widths for block in units])
    dense = _parameters(language_model.model)
    begun = None if recovers is None else recovers.started(language_model)
    layers = _layers(language_model, units, given.blocks)
    chosen = form_of(language_model, units, given.blocks, form)
    cut = Cut(chosen, dense)
    if out is not None and latency and chosen != "masked":
        cut = replace(cut, times=_times(language_model, units, given, chosen, progress), place=_place(language_model))
    fitted, _ = cut_model(language_model, given.blocks, _outputs(given, language_model, units, progress), chosen)
    recovered = None if begun is None else begun.run(fitted, progress)
    done = CutModel(
        language_model=fitted,
        shape=given,
        form=chosen,
        layers=layers,
        recovery=recovered,
        parameters=_parameters(fitted.model),
        dense_parameters=dense,
        times=cut.times,
        foreign=given.fingerprint != language_model.fingerprint,
    )
    recipe: dict[str, Any] = {"shape": to_json(given), "form": chosen}
    kept = ["removed", "prunable", "parameters", "dense_parameters", "milliseconds", "layers"]
    if recovers is not None and recovered is not None:
        recipe["recovery"] = recovers.recipe(recovered.done.learning_rate)
        kept.append("recovery")
    if out is not None:
        progress("writing the checkpoint", 0, 1)
        report = {name: value for name, value in done.to_json().items() if name in kept}
        folder = write_checkpoint(fitted, out, recipe=recipe, report=report, cut=cut)
        done = replace(done, out=folder)
        progress("writing the checkpoint", 1, 1)
    if recovers is not None:
        recovers.finish()
    # Statistics are cached by fingerprint, and the dense model's are not those of this one.
    fingerprint = content_hash([language_model.fingerprint, recipe])
    return replace(done, language_model=replace(fitted, fingerprint=fingerprint))


def _times(
    language_model: LanguageModel, units: list[BlockUnits], shape: Shape, form: str, progress: Progress
) -> tuple[PassTimes, ...]:
    """Prefill, and a token more, of the dense model and of what stays of it in this form."""
    shapes = [[block.widths.whole for block in units], running_shapes(language_model, units, shape.blocks, form)]
    found = []
    for done, decode in enumerate((False, True)):
        progress("measuring how fast it is", done, 2)
        work = Work.of(language_model, 1, None, decode=decode)
        # Of one thread it counts when it is at work, so that nothing else on the machine is measured.
        with torch_threads(1):
            dense, cut = shape_latencies(language_model, units, shapes, work, seconds=TIMING_SECONDS)
        found.append(PassTimes(work.words, dense, cut))
    progress("measuring how fast it is", 2, 2)
    return tuple(found)


def _place(language_model: LanguageModel) -> str:
    """The device of a model, for people."""
    device = language_model.device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"one thread of {processor_name()}"


def _outputs(
    shape: Shape, language_model: LanguageModel, units: list[BlockUnits], progress: Progress
) -> Mapping[str, Tensor]:
    """The output projections of what stays, where they are not those of the dense model."""
    if shape.weights["method"] == "none":
        return {}
    recipe = RefitRecipe.read(shape.weights, shape.widths)
    device, dtype = language_model.device, language_model.model.dtype
    with torch_threads(recipe.threads):
        windows = recipe.windows(language_model)
        if recipe.method == "path-refit":
            progress("refitting output matrices", 0, 1)
            refits = path_refits(language_model, units, windows, shape.blocks)
            return refitted_outputs(units, shape.blocks, lambda block, part, kept: refits[block][part].to(dtype))
        database = build_structure_database(
            language_model,
            units,
            windows,
            mode=recipe.accumulation,
            path=recipe.path,
            progress=lambda done, total: progress("building the structured database", done, total),
        )
        return refitted_outputs(
            units, shape.blocks, lambda block, part, kept: database.output(block, part, kept, device).to(dtype)
        )


def _layers(
    language_model: LanguageModel, units: list[BlockUnits], blocks: tuple[BlockShape, ...]
) -> tuple[PrunedLayer, ...]:
    """How much of every matrix goes."""
    kept: dict[str, int] = {}
    for block, shape in zip(units, blocks, strict=True):
        attention, mlp = block.attention, block.mlp
        heads = attention.rows(shape.groups, shape.heads)
        for part, rows, columns in (
            (attention, heads, attention.columns(shape.heads)),
            (mlp, mlp.rows(shape.neurons), shape.neurons),
        ):
            for bound, some in zip(part.inputs, rows, strict=True):
                kept[bound.site.name] = len(some) * bound.site.in_features
            kept[part.output.site.name] = len(columns) * part.output.site.out_features
    sites = [bound.site for bound in language_model.sites]
    return tuple(
        PrunedLayer(
            site.name, (site.out_features, site.in_features), site.weights - kept.get(site.name, site.weights), None
        )
        for site in sites
    )


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
