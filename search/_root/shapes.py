"""Models cut to a shape, given or by a published method, and written in a form that loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from evoprune.api import own_copy
from evoprune.calibration import TEXT, Progress, default_window, loaded, silent
from evoprune.fitness.card import Cut, public_name
from evoprune.fitness.checkpoint import check_out_dir, write_checkpoint
from evoprune.fitness.examples import read_side
from evoprune.fitness.methods import Evidence, ModelEdit, apply_edit, configured
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.numerics import torch_threads
from evoprune.fitness.pruning import PrunedLayer
from evoprune.fitness.structure_build import build_structure_database
from evoprune.fitness.structure_weights import MERGED, DatabaseRecipe, merges_in, refitted_outputs
from evoprune.fitness.surgeon import Surgeon
from evoprune.fitness.units import BlockUnits, PartName, find_units
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.files import content_hash
from evoprune.metrics.parameters import parameters_of
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
    edit = _edit(given, language_model, units, progress)
    fitted, chosen = apply_edit(language_model, edit, form)
    recipe = {"shape": to_json(given), "form": chosen}
    done = CutModel(
        language_model=fitted,
        shape=given,
        form=chosen,
        layers=layers,
        parameters=_parameters(fitted.model),
        dense_parameters=dense,
        foreign=given.fingerprint != language_model.fingerprint,
    )
    return _written(done, language_model, recipe, out, progress)


def prune_structure(
    model: str | LanguageModel = "reference",
    method: str = "shortgpt",
    *,
    sparsity: float | None = None,
    parameters: Mapping[str, Any] | None = None,
    form: str = "auto",
    out: str | Path | None = None,
    calibration: str = "corpus",
    calibration_sequences: int = TEXT.calibration_sequences,
    calibration_window: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
    **loading: Any,
) -> CutModel:
    """Make a model smaller by a published method, and write a checkpoint if asked to.

    Args:
        model: `reference`, a folder, a Hub id, or a loaded model, which stays as it is: the result has a copy.
        method: a name of `evoprune list methods`.
        sparsity: fraction of the prunable weights that goes, in (0, 1), whole blocks rounded down; None is 0.25, or
            what the parameters say.
        parameters: of the method, by name.
        form, out: as of `prune_shape`.
        calibration, calibration_sequences, calibration_window, seed: text A; see `collect_statistics`.
        progress: told what runs.
        loading: further arguments of `load_model`, where `model` is a name.

    Raises:
        InvalidInput: something of the above does not exist or does not fit; no checkpoint is written.
    """
    if out is not None:
        check_out_dir(out)
    chosen = configured(method, parameters)
    if sparsity is not None and not 0 < sparsity < 1:
        raise InvalidInput(f"sparsity {sparsity:g} is not between 0 and 1: give the fraction to remove, such as 0.25")
    language_model = own_copy(model) if isinstance(model, LanguageModel) else loaded(model, loading, progress)
    if language_model.cut:
        raise InvalidInput(f"model {language_model.name!r} is cut already: give the dense model")
    units = find_units(language_model)
    window = default_window(language_model, calibration_window)
    windows = read_side(language_model, calibration, "A", window=window, count=calibration_sequences, seed=seed)
    what = f"asking {method}"
    progress(what, 0, 1)
    edit = chosen.edit(Evidence(language_model, units, windows, sparsity, lambda done, of: progress(what, done, of)))
    dense = _parameters(language_model.model)
    layers = _layers(language_model, units, edit.blocks)
    fitted, written = apply_edit(language_model, edit, form)
    weights = {"method": method, "parameters": parameters_of(chosen)}
    name, widths = type(fitted.model).__name__, tuple(block.widths for block in units)
    shape = Shape(name, language_model.fingerprint, edit.blocks, widths, weights, {"sparsity": sparsity})
    done = CutModel(
        language_model=fitted,
        shape=shape,
        form=written,
        layers=layers,
        parameters=_parameters(fitted.model),
        dense_parameters=dense,
        method=method,
        found=edit.found,
    )
    recipe = {
        "method": method,
        "source": chosen.source,
        "found": edit.found,
        "shape": to_json(shape),
        "form": written,
        "calibration": {
            "text": public_name(calibration),
            "side": "A",
            "sequences": len(windows),
            "window": window,
            "seed": seed,
        },
    }
    return _written(done, language_model, recipe, out, progress)


def _written(
    done: CutModel, dense: LanguageModel, recipe: dict[str, Any], out: str | Path | None, progress: Progress
) -> CutModel:
    """The same with the checkpoint that was asked for, and a fingerprint of its own."""
    fitted = done.language_model
    if out is not None:
        progress("writing the checkpoint", 0, 1)
        kept = ("removed", "prunable", "parameters", "dense_parameters", "layers")
        report = {name: value for name, value in done.to_json().items() if name in kept}
        cut = Cut(done.form, done.dense_parameters)
        done = replace(done, out=write_checkpoint(fitted, out, recipe=recipe, report=report, cut=cut))
        progress("writing the checkpoint", 1, 1)
    # Statistics are cached by fingerprint, and the dense model's are not those of this one.
    fingerprint = content_hash([dense.fingerprint, recipe])
    return replace(done, language_model=replace(fitted, fingerprint=fingerprint))


def _edit(shape: Shape, language_model: LanguageModel, units: list[BlockUnits], progress: Progress) -> ModelEdit:
    """What a shape does to a model: what is cut, merged, and refitted."""
    method = shape.weights["method"]
    if method == "none":
        return ModelEdit(shape.blocks)
    if method not in ("database", MERGED):
        raise InvalidInput(
            f"the shape makes its output projections by {method[:40]!r}, which this version does not know"
        )
    recipe, merges = DatabaseRecipe.read(shape.weights), merges_in(shape)
    surgeon = Surgeon(language_model, units)
    merged: dict[str, Tensor] = {}
    for (block, part), sources in merges.items():
        merged |= surgeon.merged(block, part, sources)
    with torch_threads(recipe.threads):
        windows = recipe.windows(language_model)
        database = build_structure_database(
            language_model,
            units,
            windows,
            mode=recipe.accumulation,
            progress=lambda done, total: progress("building the structured database", done, total),
        )
        device, dtype = language_model.device, language_model.model.dtype

        def solve(block: int, part: PartName, kept: BlockShape) -> Tensor:
            weight = merged.get(f"{getattr(units[block], part).output.site.name}.weight")
            return database.output(block, part, kept, device, weight).to(dtype)

        outputs = refitted_outputs(units, shape.blocks, solve)
    transposed = {f"{bound.site.name}.weight" for bound in language_model.sites if bound.transposed}
    replaced = {name: value.T if name in transposed else value for name, value in merged.items()}
    return ModelEdit(shape.blocks, replaced, outputs)


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
