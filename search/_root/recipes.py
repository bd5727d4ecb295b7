"""Checkpoints made again from their recipes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from evoprune import api
from evoprune.calibration import Progress, silent
from evoprune.fitness.card import public_name
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.numerics import torch_threads
from evoprune.fitness.policy_file import LearnedPolicy
from evoprune.fitness.policy_file import from_json as policy_from_json
from evoprune.fitness.structure_weights import text_of, with_text
from evoprune.metrics.allocation_file import from_json as allocation_from_json
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.shape import Shape
from evoprune.metrics.shape_file import from_json as shape_from_json
from evoprune.outcomes import CutModel, Pruned
from evoprune.policies import prune_policy
from evoprune.recipe_file import Recipe, StoredRecipe, TextPart, criterion_of, read_recipe, spelled
from evoprune.shapes import prune_shape, prune_structure


def prune_recipe(
    recipe: str | Path | StoredRecipe,
    model: str | LanguageModel | None = None,
    *,
    out: str | Path | None = None,
    calibration: str | None = None,
    device: str | None = None,
    latency: bool = True,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Pruned | CutModel:
    """Do to a model what a recipe says: the same checkpoint again, on the same machine bit for bit.

    Args:
        recipe: a file, the folder of a checkpoint, or the `recipe` of what was pruned in this process.
        model: a folder, a Hub id, or a loaded model; None takes the one that the recipe names. Other weights than those
            of the recipe are pruned too, and `doubt` of the result says so.
        out: a new or empty folder, or an evoprune checkpoint, which is replaced; None writes nothing.
        calibration: where the text lies that the recipe names by the last part of its path.
        device: in place of the recipe's.
        latency: of what gets smaller; see `prune_shape`.
        trust_remote_code: run code that the model brings along, which no recipe asks for.
        progress: told what runs and how far it is.

    Raises:
        InvalidInput: no such recipe, a file that it names was changed, something given beside it contradicts it, or
            the model does not fit what it attaches; no checkpoint is written.
    """
    given = recipe if isinstance(recipe, StoredRecipe) else read_recipe(recipe)
    document = given.recipe
    policy = None if document.policy is None else policy_from_json(given.document(document.policy))
    shape = None if document.shape is None else shape_from_json(given.document(document.shape))
    text = _text(document, policy, shape, calibration)
    shown = document.model
    options: dict[str, Any] = {"form": document.form, "seed": document.seed, "out": out, "progress": progress}
    options["calibration"] = text.text
    if (trained := document.recovery) is not None:
        options |= {"recovery": trained.name, "recovery_tokens": trained.tokens, "recovery_loss": trained.loss}
        options["recovery_parameters"] = trained.parameters
    if isinstance(model, LanguageModel):
        _check_loaded(model, document)
    else:
        options |= {"dtype": shown.dtype, "device": device or shown.device, "trust_remote_code": trust_remote_code}
        if shown.components is not None:
            options["components"] = shown.components
        if model is None and shown.revision is not None:
            options["revision"] = shown.revision
    source = shown.name if model is None else model
    windows: dict[str, Any] = {"calibration_sequences": text.sequences, "calibration_window": text.window}
    done: Pruned | CutModel
    # Sums of floats come in an order that the threads decide.
    with torch_threads(document.threads):
        if (weights := document.weights) is not None:
            attached = weights.allocation
            done = api.prune(
                source,
                metric=criterion_of(given),
                sparsity=weights.sparsity,
                pattern=weights.pattern,
                group=weights.group,
                allocation=None if attached is None else allocation_from_json(given.document(attached)),
                compressor=spelled(weights.compressor),
                accumulation=weights.accumulation,
                tokens=text.chosen,
                **windows,
                **options,
            )
        elif shape is not None:
            if calibration is not None and text_of(shape) == public_name(calibration):
                shape = with_text(shape, calibration)
            done = prune_shape(source, shape, latency=latency, **options)
        elif (method := document.method) is not None:
            parts: dict[str, Any] = {"sparsity": method.sparsity, "parameters": method.parameters}
            done = prune_structure(source, method.name, latency=latency, **parts, **windows, **options)
        else:
            assert policy is not None
            if policy.calibration is not None and calibration is not None:
                said = policy.calibration
                if said.text == public_name(calibration):
                    policy = replace(policy, calibration=replace(said, text=calibration))
            done = prune_policy(
                source,
                policy,
                refit=document.refit or "none",
                correction=document.correction or 0.0,  # as recipes that do not say it meant
                latency=latency,
                **options,
            )
    doubt = _doubt(document, done)
    return done if doubt is None else replace(done, doubt=doubt)


def _text(document: Recipe, policy: LearnedPolicy | None, shape: Shape | None, calibration: str | None) -> TextPart:
    """The recipe's text, and where it lies.

    Raises:
        InvalidInput: another one was given.
    """
    said = document.calibration or TextPart()
    if calibration is None:
        return said
    names = [
        None if document.calibration is None else said.text,
        None if policy is None or policy.calibration is None else policy.calibration.text,
        None if shape is None else text_of(shape),
    ]
    read = {name for name in names if name is not None}
    if public_name(calibration) not in read:
        what = " and ".join(repr(name) for name in sorted(read)) or "no text"
        raise InvalidInput(f"the recipe reads {what}, not {public_name(calibration)!r}: leave out the calibration")
    return said.model_copy(update={"text": calibration}) if said.text == public_name(calibration) else said


def _check_loaded(language_model: LanguageModel, document: Recipe) -> None:
    """Refuse a loaded model that computes otherwise, or of which other matrices are pruned."""
    dtype = str(language_model.model.dtype).removeprefix("torch.")
    if document.model.dtype not in ("auto", dtype):
        raise InvalidInput(f"the recipe is for a model in {document.model.dtype}, not {dtype}: load it with this dtype")
    found = None if language_model.components is None else list(language_model.components)
    if document.model.components != found:
        raise InvalidInput(f"the recipe prunes components {document.model.components}, and the model has {found}")


def _doubt(document: Recipe, done: Pruned | CutModel) -> str | None:
    """What of the model and of the text is not as the recipe says, in a line."""
    if done.recipe is None:
        return None
    made, was = done.recipe.recipe, document.model.fingerprint
    if was not in (None, made.model.fingerprint):
        here = str(made.model.fingerprint)[:12]
        return f"the recipe was made on other weights (fingerprint {str(was)[:12]}, here {here}): the result differs"
    texts = [None if part is None else part.sha256 for part in (document.calibration, made.calibration)]
    if None not in texts and texts[0] != texts[1]:
        return "the calibration text has other tokens than the recipe's, of the same name: the result differs"
    return None
