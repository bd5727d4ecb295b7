"""Models cut to a shape, given or by a published method, and written in a form that loads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evoprune.api import own_copy
from evoprune.calibration import TEXT, Progress, default_window, loaded, silent
from evoprune.fitness.card import Cut, PassTimes, public_name
from evoprune.fitness.checkpoint import check_out_dir, write_checkpoint
from evoprune.fitness.dense_stream import CORRECTION
from evoprune.fitness.examples import read_side
from evoprune.fitness.forms import form_of, running_shapes
from evoprune.fitness.latency_passes import Work, shape_latencies
from evoprune.fitness.methods import Evidence, ModelEdit, apply_edit, configured
from evoprune.fitness.models import LanguageModel, refuse_cut
from evoprune.fitness.numerics import processor_name, torch_threads
from evoprune.fitness.path_refit import path_refits
from evoprune.fitness.pruning import PrunedLayer
from evoprune.fitness.structure_build import build_structure_database
from evoprune.fitness.structure_weights import (
    RefitRecipe,
    merges_in,
    merging_in,
    path_refit_recipe,
    refitted_outputs,
    text_of,
    with_text,
)
from evoprune.fitness.surgeon import Surgeon
from evoprune.fitness.units import BlockUnits, PartName, find_units
from evoprune.metrics.errors import InvalidInput, UnknownName
from evoprune.metrics.files import content_hash
from evoprune.metrics.parameters import parameters_of
from evoprune.metrics.shape import BlockShape, Shape
from evoprune.metrics.shape_file import read_shape, to_json
from evoprune.outcomes import CutModel, MeasuredRefit
from evoprune.recipe_file import StoredRecipe, of_method, of_shape
from evoprune.recoveries import Begun, given_recovery

REFITS: tuple[str, ...] = ("none", "path-refit")
"""What output matrices may become, by the names that shapes have for it."""

TIMING_SECONDS = 15.0
"""For the time of a pass, about: of a large model on a slow device fewer turns are taken."""


def prune_shape(
    model: str | LanguageModel = "reference",
    shape: str | Path | Shape = "shape.json",
    *,
    form: str = "auto",
    refit: str | None = None,
    recovery: str | None = None,
    recovery_tokens: int | None = None,
    recovery_loss: str | None = None,
    recovery_parameters: Mapping[str, Any] | None = None,
    calibration: str | None = None,
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
        refit: ``path-refit`` solves every output matrix for the units that stay, on what the cut blocks before it hand
            on (`evoprune.fitness.path_refit`), whatever the shape says of its weights; ``none`` leaves the weights that
            stay as they are in the dense model; None does as the shape says.
        recovery, recovery_tokens, recovery_loss, recovery_parameters: training of what is left; see `prune`.
        calibration, seed: the text that a path refit reads (None: that which the shape names), and that a recovery
            learns from, with the seed of what is drawn; where nobody names one, ``corpus``. Of the text that a shape
            was refitted on as many windows are drawn as the shape says, by its seed, wherever the text lies now.
        out: a new or empty folder, or an evoprune checkpoint, which is replaced; None writes nothing.
        latency: measure, where a checkpoint is written, how long the dense model and what stays of it take for prefill
            and for one more token, for the model card; on a CPU with one thread.
        progress: told what runs.
        loading: further arguments of `load_model`, where `model` is a name.

    Raises:
        InvalidInput: something of the above does not exist or does not fit; no checkpoint is written.
    """
    if out is not None:
        check_out_dir(out)
    source = calibration or "corpus"
    recovers = given_recovery(
        recovery, recovery_tokens, recovery_loss, recovery_parameters, source=source, seed=seed, out=out
    )
    given = shape if isinstance(shape, Shape) else read_shape(shape)
    if refit is not None and refit not in REFITS:
        raise UnknownName("refit", refit, REFITS)
    language_model = dense_model(model, loading, progress)
    if refit is not None:
        given = _with_refit(given, refit, language_model, calibration, seed)
    units = find_units(language_model)
    given.check(type(language_model.model).__name__, [block.widths for block in units])
    chosen = form_of(language_model, units, given.blocks, form)
    begun = None if recovers is None else recovers.started(language_model)
    edit = edit_of(given, language_model, units, progress)
    refitted_on = text_of(given)
    said = given if refitted_on is None else with_text(given, public_name(refitted_on))
    recipe = {"shape": to_json(said), "form": chosen}
    read = None if recovers is None else source
    stored = of_shape(language_model, loading, said, form=chosen, seed=seed, text=read)
    foreign = given.fingerprint != language_model.fingerprint
    plan = CutPlan(
        language_model=language_model,
        units=units,
        shape=given,
        edit=edit,
        form=chosen,
        recipe=recipe,
        stored=stored,
    )
    done = cut_and_written(plan, begun, out, latency=latency, progress=progress)
    return replace(done, foreign=foreign)


def prune_structure(
    model: str | LanguageModel = "reference",
    method: str = "shortgpt",
    *,
    sparsity: float | None = None,
    parameters: Mapping[str, Any] | None = None,
    form: str = "auto",
    recovery: str | None = None,
    recovery_tokens: int | None = None,
    recovery_loss: str | None = None,
    recovery_parameters: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    latency: bool = True,
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
        form, out, latency: as of `prune_shape`.
        recovery, recovery_tokens, recovery_loss, recovery_parameters: training of what is left; see `prune`.
        calibration, calibration_sequences, calibration_window, seed: text A; see `collect_statistics`. A recovery
            learns from another side of the same text.
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
    recovers = given_recovery(
        recovery, recovery_tokens, recovery_loss, recovery_parameters, source=calibration, seed=seed, out=out
    )
    language_model = dense_model(model, loading, progress)
    units = find_units(language_model)
    begun = None if recovers is None else recovers.started(language_model)
    window = default_window(language_model, calibration_window)
    windows = read_side(language_model, calibration, "A", window=window, count=calibration_sequences, seed=seed)
    what = f"asking {method}"
    progress(what, 0, 1)
    edit = chosen.edit(Evidence(language_model, units, windows, sparsity, lambda done, of: progress(what, done, of)))
    written = form_of(language_model, units, edit.blocks, form)
    weights = {"method": method, "parameters": parameters_of(chosen)}
    name, widths = type(language_model.model).__name__, tuple(block.widths for block in units)
    shape = Shape(name, language_model.fingerprint, edit.blocks, widths, weights, {"sparsity": sparsity})
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
    text = {
        "calibration": calibration,
        "calibration_sequences": calibration_sequences,
        "calibration_window": calibration_window,
        "seed": seed,
    }
    stored = of_method(language_model, loading, method, parameters_of(chosen), sparsity, form=written, text=text)
    plan = CutPlan(
        language_model=language_model,
        units=units,
        shape=shape,
        edit=edit,
        form=written,
        recipe=recipe,
        stored=stored,
    )
    done = cut_and_written(plan, begun, out, latency=latency, progress=progress)
    return replace(done, method=method, found=edit.found)


def _with_refit(shape: Shape, refit: str, language_model: LanguageModel, text: str | None, seed: int) -> Shape:
    """The same shape, whose weights are made in this way, whatever it says.

    Args:
        refit: one of `REFITS`.
        text: that a path refit reads; None is that of the shape, or ``corpus``.
        seed: that draws windows of it, where the shape names no text.

    Raises:
        InvalidInput: parts are merged.
    """
    if any(map(any, merging_in(shape))):
        raise InvalidInput("what is merged is refitted as the shape says: leave out --refit")
    if refit == "none":
        return replace(shape, weights={"method": "none"})
    if text_of(shape) is None:
        sequences, window = TEXT.calibration_sequences, default_window(language_model, None)
        recipe = path_refit_recipe(text or "corpus", sequences, window, seed, torch.get_num_threads())
    else:
        said = RefitRecipe.read(shape.weights, shape.widths)
        correction = said.correction if "correction" in shape.weights else CORRECTION
        drawn = said.sequences, said.window, said.seed, said.threads
        recipe = path_refit_recipe(text or said.text, *drawn, correction)
    return replace(shape, weights=recipe.to_json())


@dataclass(frozen=True, kw_only=True)
class CutPlan:
    """A dense model, what is to become of it, and what is said of that.

    Attributes:
        language_model: dense, nobody else's.
        units: of its blocks.
        shape, edit: what stays, and how.
        form: that `form_of` gave.
        recipe: what the checkpoint says of how it was made, but for the recovery.
        stored: what makes it again, but for the recovery.
        measured: what refits of the edit brought, of the model that is cut and not yet recovered; None if nobody asks.
    """

    language_model: LanguageModel
    units: list[BlockUnits]
    shape: Shape
    edit: ModelEdit
    form: str
    recipe: dict[str, Any]
    stored: StoredRecipe
    measured: Callable[[LanguageModel], MeasuredRefit] | None = None


def dense_model(model: str | LanguageModel, loading: Mapping[str, Any], progress: Progress) -> LanguageModel:
    """The model to cut, which is nobody else's.

    Raises:
        InvalidInput: it is cut already, or cannot be loaded.
    """
    found = own_copy(model) if isinstance(model, LanguageModel) else loaded(model, dict(loading), progress)
    refuse_cut(found)
    return found


def cut_and_written(
    plan: CutPlan, begun: Begun | None, out: str | Path | None, *, latency: bool, progress: Progress
) -> CutModel:
    """Cut a dense model, in place, let it recover, and write the checkpoint that was asked for.

    Args:
        plan: the model, and how it is cut.
        begun: the recovery that was asked for.
        out, latency, progress: as of `prune_shape`.
    """
    language_model, units, shape, form = plan.language_model, plan.units, plan.shape, plan.form
    recipe, stored = plan.recipe, plan.stored
    dense = _parameters(language_model.model)
    layers = _layers(language_model, units, shape.blocks)
    cut = Cut(form, dense, shape)
    if out is not None and latency and form != "masked":
        cut = replace(cut, times=_times(language_model, units, shape, form, progress), place=_place(language_model))
    fitted, _ = apply_edit(language_model, plan.edit, form)
    refit = None if plan.measured is None else plan.measured(fitted)
    recovered = None if begun is None else begun.run(fitted, progress)
    done = CutModel(
        language_model=fitted,
        shape=shape,
        form=form,
        layers=layers,
        recovery=recovered,
        parameters=_parameters(fitted.model),
        dense_parameters=dense,
        refit=refit,
        times=cut.times,
    )
    kept = ["removed", "prunable", "parameters", "dense_parameters", "milliseconds", "refit", "layers"]
    if begun is not None and recovered is not None:
        recipe = {**recipe, "recovery": begun.given.recipe(recovered.done.learning_rate)}
        kept.append("recovery")
        stored = stored.recovered(recipe["recovery"])
    done = replace(done, recipe=stored)
    if out is not None:
        progress("writing the checkpoint", 0, 1)
        report = {name: value for name, value in done.to_json().items() if name in kept}
        beside: dict[str, Any] = {"files": stored.files(), "sparsity": done.sparsity_report()}
        written = write_checkpoint(fitted, out, recipe=recipe, report=report, cut=cut, **beside)
        done = replace(done, out=written)
        progress("writing the checkpoint", 1, 1)
    if begun is not None:
        begun.given.finish()
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


def edit_of(shape: Shape, language_model: LanguageModel, units: list[BlockUnits], progress: Progress) -> ModelEdit:
    """What a shape does to a model: what is cut, merged, and refitted."""
    if shape.weights["method"] == "none":
        return ModelEdit(shape.blocks)
    recipe = RefitRecipe.read(shape.weights, shape.widths)
    device, dtype = language_model.device, language_model.model.dtype
    surgeon = Surgeon(language_model, units)
    merged: dict[str, Tensor] = {}
    for (block, part), sources in merges_in(shape).items():
        merged |= surgeon.merged(block, part, sources)
    with torch_threads(recipe.threads):
        windows = recipe.windows(language_model)
        if recipe.method == "path-refit":
            progress("refitting output matrices", 0, 1)
            refits = path_refits(language_model, units, windows, shape.blocks, recipe.correction)
            outputs = refitted_outputs(units, shape.blocks, lambda block, part, kept: refits[block][part].to(dtype))
            return ModelEdit(shape.blocks, outputs=outputs)
        database = build_structure_database(
            language_model,
            units,
            windows,
            mode=recipe.accumulation,
            path=recipe.path,
            correction=recipe.correction,
            progress=lambda done, total: progress("building the structured database", done, total),
        )

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
