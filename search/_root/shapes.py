"""Shapes in Python: a model is cut to one and written in a form that loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from evoprune.api import own_copy
from evoprune.calibration import Progress, loaded, silent
from evoprune.fitness.card import Cut
from evoprune.fitness.checkpoint import check_out_dir, write_checkpoint
from evoprune.fitness.forms import cut_model
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.numerics import torch_threads
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


def prune_shape(
    model: str | LanguageModel = "reference",
    shape: str | Path | Shape = "shape.json",
    *,
    form: str = "auto",
    out: str | Path | None = None,
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
        out: a new or empty folder; None writes nothing.
        progress: told what runs.
        loading: further arguments of `load_model`, where `model` is a name.

    Raises:
        InvalidInput: something of the above does not exist or does not fit; no checkpoint is written.
    """
    if out is not None:
        check_out_dir(out)
    given = shape if isinstance(shape, Shape) else read_shape(shape)
    language_model = own_copy(model) if isinstance(model, LanguageModel) else loaded(model, loading, progress)
    if language_model.cut:
        raise InvalidInput(f"model {language_model.name!r} is cut already: give the dense model")
    units = find_units(language_model)
    given.check(type(language_model.model).__name__, [block.widths for block in units])
    dense = _parameters(language_model.model)
    layers = _layers(language_model, units, given.blocks)
    fitted, chosen = cut_model(language_model, given.blocks, _outputs(given, language_model, units, progress), form)
    done = CutModel(
        language_model=fitted,
        shape=given,
        form=chosen,
        layers=layers,
        parameters=_parameters(fitted.model),
        dense_parameters=dense,
        foreign=given.fingerprint != language_model.fingerprint,
    )
    recipe = {"shape": to_json(given), "form": chosen}
    if out is not None:
        progress("writing the checkpoint", 0, 1)
        kept = ("removed", "prunable", "parameters", "dense_parameters", "layers")
        report = {name: value for name, value in done.to_json().items() if name in kept}
        folder = write_checkpoint(fitted, out, recipe=recipe, report=report, cut=Cut(chosen, dense))
        done = replace(done, out=folder)
        progress("writing the checkpoint", 1, 1)
    # Statistics are cached by fingerprint, and the dense model's are not those of this one.
    fingerprint = content_hash([language_model.fingerprint, recipe])
    return replace(done, language_model=replace(fitted, fingerprint=fingerprint))


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
