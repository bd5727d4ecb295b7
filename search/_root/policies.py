"""Models pruned as a policy search found: cut where a shape says what stays, else with zeros in place of what goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from evoprune.calibration import Progress, collect_statistics, held_out_windows, silent
from evoprune.fitness.card import public_name
from evoprune.fitness.checkpoint import check_out_dir, write_checkpoint
from evoprune.fitness.dense_stream import CORRECTION
from evoprune.fitness.forms import FORMS, form_of
from evoprune.fitness.masked_model import MaskedModel
from evoprune.fitness.maskers import ByUnits
from evoprune.fitness.methods import ModelEdit
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.numerics import torch_threads
from evoprune.fitness.policy_file import LearnedPolicy, apply_policy, policy_shape, read_policy
from evoprune.fitness.pruning import check_rule
from evoprune.fitness.samples import n_tokens
from evoprune.fitness.structure_weights import RefitRecipe, path_refit_recipe, with_text
from evoprune.fitness.units import BlockUnits, find_units
from evoprune.metrics.errors import InvalidInput, UnknownName
from evoprune.metrics.files import content_hash
from evoprune.metrics.records import MaskRule
from evoprune.metrics.shape_file import to_json
from evoprune.outcomes import CutModel, MeasuredRefit, Pruned, measured_summary
from evoprune.recipe_file import StoredRecipe, of_policy
from evoprune.recoveries import Begun, given_recovery
from evoprune.search.given import policy_file
from evoprune.shapes import REFITS, CutPlan, cut_and_written, dense_model, edit_of

FOREIGN = "the policy was found on other weights of this class"
_UNEVEN = "it keeps different numbers of query heads in the KV groups of a block"


def prune_policy(
    model: str | LanguageModel = "reference",
    policy: str | Path | LearnedPolicy = "policy.json",
    *,
    form: str = "auto",
    refit: str = "none",
    correction: float = CORRECTION,
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
) -> CutModel | Pruned:
    """Remove from a model what a policy search found can go, and write a checkpoint if asked to.

    Args:
        model: `reference`, a folder, a Hub id, or a loaded model, which stays as it is: the result has a copy.
        policy: a `LearnedPolicy`, a file that holds one, or a finished run that searched one.
        form: as of `prune_shape`, where a shape says what stays: heads, neurons and blocks. Query heads that differ in
            number between the KV groups of a block, and masks of matrices, are written with zeros: ``auto`` or
            ``masked``.
        refit: ``path-refit`` solves every output matrix anew for the units that stay, on the text A that the search
            read (`evoprune.fitness.path_refit`), where a shape says what stays; ``none`` leaves the weights that stay
            as they were, which is what the search measured. What it brings on text C stands in the result and in the
            model card.
        correction: of a path refit, how much of what they can make up for outputs do, in [0, 1]; see
            `evoprune.fitness.dense_stream`.
        recovery, recovery_tokens, recovery_loss, recovery_parameters: training of what is left; see `prune`.
        calibration, seed: the text that a recovery learns from, and the seed of what it draws. Masks of matrices are
            made from the text that the search read, which the policy names.
        out: a new or empty folder, or an evoprune checkpoint, which is replaced; None writes nothing.
        latency: of what gets smaller; see `prune_shape`.
        progress: told what runs.
        loading: further arguments of `load_model`, where `model` is a name.

    Raises:
        InvalidInput: something of the above does not exist or does not fit; no checkpoint is written.
    """
    if out is not None:
        check_out_dir(out)
    if form not in FORMS:
        raise UnknownName("form", form, FORMS)
    if refit not in REFITS:
        raise UnknownName("refit", refit, REFITS)
    recovers = given_recovery(
        recovery, recovery_tokens, recovery_loss, recovery_parameters, source=calibration, seed=seed, out=out
    )
    given = policy if isinstance(policy, LearnedPolicy) else read_policy(policy_file(str(policy)))
    if given.pattern is not None and form not in ("auto", "masked"):
        raise InvalidInput(f"--form {form} is of what gets smaller, and an N:M policy keeps every width: leave it out")
    refits = None if refit == "none" else _refit_recipe(given, correction)
    language_model = dense_model(model, loading, progress)
    given.check(language_model)
    units = find_units(language_model) if isinstance(given.table.masker, ByUnits) else []
    shape = policy_shape(given, units)
    summary = given.summary()
    rest = {"seed": seed, "text": None if recovers is None else calibration}
    if shape is None:
        if refits is not None:
            raise InvalidInput(f"{_UNEVEN}, which has no refit; leave out --refit")
        if form not in ("auto", "masked"):
            raise InvalidInput(f"--form {form} cannot hold this policy: {_UNEVEN}; give masked")
        begun = None if recovers is None else recovers.started(language_model)
        stored = of_policy(language_model, loading, given, form="masked", **rest)
        return _masked(language_model, given, begun, out, stored, progress)
    chosen = form_of(language_model, units, shape.blocks, form)
    begun = None if recovers is None else recovers.started(language_model)
    edit, measured = ModelEdit(shape.blocks), None
    said = shape
    if refits is not None:
        shape = replace(shape, weights=refits.to_json())
        said = with_text(shape, public_name(refits.text))
        measured = _refit_measured(language_model, units, given, refits, progress)
        edit = edit_of(shape, language_model, units, progress)
    recipe = {"shape": to_json(said), "form": chosen, "policy": summary}
    refitting = {} if refits is None else {"refit": refit, "correction": correction}
    stored = of_policy(language_model, loading, given, form=chosen, **refitting, **rest)
    plan = CutPlan(
        language_model=language_model,
        units=units,
        shape=shape,
        edit=edit,
        form=chosen,
        recipe=recipe,
        stored=stored,
        measured=measured,
    )
    done = cut_and_written(plan, begun, out, latency=latency, progress=progress)
    return replace(done, foreign=given.fingerprint != language_model.fingerprint, policy=summary)


def _refit_recipe(policy: LearnedPolicy, correction: float) -> RefitRecipe:
    """A refit on the text that the search read.

    Raises:
        InvalidInput: the policy is of matrices, or says no text.
    """
    if policy.pattern is not None:
        raise InvalidInput("--refit is of what gets smaller, and an N:M policy keeps every width: leave it out")
    if (text := policy.calibration) is None:
        raise InvalidInput(
            "the policy does not say what text it was found on ('calibration' is null): leave out --refit"
        )
    return path_refit_recipe(text.text, text.sequences, text.window, text.seed, text.threads, correction)


def _refit_measured(
    language_model: LanguageModel,
    units: Sequence[BlockUnits],
    policy: LearnedPolicy,
    refits: RefitRecipe,
    progress: Progress,
) -> Callable[[LanguageModel], MeasuredRefit]:
    """Measures what a policy leaves of a dense model, and then the model that is made of it."""
    windows = held_out_windows(language_model, refits.text)

    def summary(model: LanguageModel, when: str) -> dict[str, Any]:
        what = f"measuring on {n_tokens(windows):,} tokens {when} the refit"
        progress(what, 0, 1)
        found = measured_summary(model, windows)
        progress(what, 1, 1)
        return found

    with MaskedModel(language_model, units, policy.table).kept(policy.mask):
        before = summary(language_model, "before")
    return lambda cut: MeasuredRefit(refits.method, refits.text, before, summary(cut, "after"))


def _masked(
    language_model: LanguageModel,
    policy: LearnedPolicy,
    begun: Begun | None,
    out: str | Path | None,
    stored: StoredRecipe,
    progress: Progress,
) -> Pruned:
    """Zeros in place of what goes, in place, and the checkpoint that was asked for."""
    calibration, needs = policy.calibration, policy.needs
    if policy.pattern is not None:
        check_rule(language_model, MaskRule(None, policy.pattern))
    # The masks that the search measured come out again, bit for bit, from sums in the same order.
    with torch_threads(None if calibration is None else calibration.threads):
        statistics = None
        if needs:
            assert calibration is not None
            statistics = collect_statistics(
                language_model,
                needs,
                calibration=calibration.text,
                calibration_sequences=calibration.sequences,
                calibration_window=calibration.window,
                seed=calibration.seed,
                progress=progress,
            )
        progress("masking", 0, 1)
        layers = apply_policy(language_model, policy, statistics)
        progress("masking", 1, 1)
    removed, prunable = sum(layer.removed for layer in layers), sum(layer.weights for layer in layers)
    recovered = None if begun is None else begun.run(language_model, progress)
    pruned = Pruned(
        language_model=language_model,
        criterion=None,
        rule=MaskRule(removed / prunable) if policy.pattern is None else MaskRule(None, policy.pattern),
        compressor="mask",
        layers=layers,
        recovery=recovered,
        doubt=None if policy.fingerprint == language_model.fingerprint else FOREIGN,
        policy=policy.summary() | ({"sites": policy.choices} if policy.choices else {}),
    )
    recipe: dict[str, Any] = {
        "policy": pruned.policy,
        "pattern": str(pruned.rule) if policy.pattern else None,
        "compressor": "mask",
    }
    kept = ["removed", "prunable", "layers"]
    if begun is not None and recovered is not None:
        recipe["recovery"] = begun.given.recipe(recovered.done.learning_rate)
        kept.append("recovery")
        stored = stored.recovered(recipe["recovery"])
    pruned = replace(pruned, recipe=stored)
    if out is not None:
        progress("writing the checkpoint", 0, 1)
        report = {name: value for name, value in pruned.to_json().items() if name in kept}
        files = stored.files()
        sparsities = pruned.sparsity_report()
        written = write_checkpoint(language_model, out, recipe=recipe, report=report, files=files, sparsity=sparsities)
        pruned = replace(pruned, out=written)
        progress("writing the checkpoint", 1, 1)
    if begun is not None:
        begun.given.finish()
    # Statistics are cached by fingerprint, and the dense model's are not those of this one.
    fingerprint = content_hash([language_model.fingerprint, recipe])
    return replace(pruned, language_model=replace(language_model, fingerprint=fingerprint))
