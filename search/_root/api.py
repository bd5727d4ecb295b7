"""What can be done with a model in Python: load it, collect statistics, prune it, evaluate it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, overload

from torch import Tensor

from evoprune.allocations import GivenAllocation, allocate
from evoprune.calibration import (
    ALL_TOKENS,
    TEXT,
    Progress,
    calibration_windows,
    collect_statistics,
    default_window,
    held_out_windows,
    loaded,
    silent,
)
from evoprune.fitness.activations import Thresholded
from evoprune.fitness.adapters import list_sites, rebind, zero_fraction
from evoprune.fitness.amia import TokenChoice
from evoprune.fitness.card import public_name
from evoprune.fitness.checkpoint import check_out_dir, write_checkpoint
from evoprune.fitness.compressors import AtRunTime, Wrapping, compressor_of
from evoprune.fitness.continuations import Continuation, check_continuations, continuations
from evoprune.fitness.evaluation import HeldOut, evaluate_language_model
from evoprune.fitness.examples import read_side
from evoprune.fitness.models import LanguageModel, load_model
from evoprune.fitness.modular import check_modular
from evoprune.fitness.numerics import torch_threads
from evoprune.fitness.policy_file import LearnedPolicy
from evoprune.fitness.pruning import check_rule, mask_rule, needed_statistics, prune_model, pruned_before
from evoprune.fitness.samples import Samples, Sequences, n_tokens
from evoprune.fitness.statistics import Statistics
from evoprune.fitness.tasks import load_tasks
from evoprune.metrics.allocation import Allocation
from evoprune.metrics.allocation_file import to_json
from evoprune.metrics.criterion import Criterion
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.exported import load_metric
from evoprune.metrics.files import content_hash
from evoprune.metrics.parameters import check_choice, parameters_of
from evoprune.metrics.records import MaskRule
from evoprune.outcomes import CutModel, Evaluation, Pruned, criterion_label
from evoprune.recipe_file import of_weights
from evoprune.recoveries import given_recovery

SAMPLE_TOKENS = 32

__all__ = ["Allocation", "Evaluation", "Pruned", "allocate", "collect_statistics", "evaluate", "load_model", "prune"]


@overload
def prune(model: str | LanguageModel = ..., *, policy: None = None, **options: Any) -> Pruned: ...


@overload
def prune(
    model: str | LanguageModel = ..., *, policy: str | Path | LearnedPolicy, **options: Any
) -> Pruned | CutModel: ...


def prune(
    model: str | LanguageModel = "reference",
    *,
    metric: str | Criterion = "wanda",
    sparsity: float | None = None,
    pattern: str | None = None,
    group: str | None = None,
    allocation: str | Path | Allocation | None = None,
    allocation_parameters: Mapping[str, Any] | None = None,
    budgets: Mapping[str, float] | Literal["searched"] | None = None,
    compressor: str | None = None,
    policy: str | Path | LearnedPolicy | None = None,
    recovery: str | None = None,
    recovery_tokens: int | None = None,
    recovery_loss: str | None = None,
    recovery_parameters: Mapping[str, Any] | None = None,
    form: str = "auto",
    out: str | Path | None = None,
    calibration: str = "corpus",
    calibration_sequences: int = TEXT.calibration_sequences,
    calibration_window: int | None = None,
    tokens: str | TokenChoice = ALL_TOKENS,
    seed: int = 0,
    progress: Progress = silent,
    **loading: Any,
) -> Pruned | CutModel:
    """Remove the weights that a criterion scores lowest, and write a checkpoint if asked to.

    Args:
        model: `reference`, a folder, a Hub id, or a loaded model, which stays as it is: the result has a copy.
        metric: a name of the criteria, an expression such as ``mul(abs(W),X_l2)``, an exported ``.json`` or ``.py``
            (read, never executed), or a criterion. A compressor that chooses by itself what goes does not read it; an
            allocator may.
        sparsity: fraction of the prunable weights to remove, in [0, 1); 0.5 unless `pattern` is given.
        pattern: ``N:M``, N kept of every M consecutive inputs.
        group: compare scores within a ``row``, a ``layer`` or the ``global`` model; None takes the criterion's own.
        allocation: a sparsity for each matrix, by row: an `Allocation`, a file that holds one (ours or EvoPress's
            text), or the name of an allocator, or a file that holds a formula, which are then run on this model.
            `sparsity` is the budget; a file of sparsities has its own.
        allocation_parameters: of that allocator; for EvoPress's text ``step``, the weights in a level.
        budgets: sparsity of each group of matrices; see `allocate`. Without an `allocation` each group is uniform.
        compressor: a name of `evoprune list compressors`, perhaps with parameters, such as ``obq:bits=3``: what happens
            to the weights that stay. ``mask`` leaves them as they are; ``sparsegpt`` chooses itself what goes, and lets
            the weights that stay make up for it. ``scap`` removes no weights: it lets that share of the inputs of every
            prunable matrix go at run time, or, without a `sparsity`, shares of its own by kind of matrix. None is the
            one that `allocation` was searched for, if its file says so, else ``mask``.
        policy: what a policy search keeps, in place of all of the above; see `prune_policy`, which gives more choice.
        recovery: a name of `evoprune list recoveries`: the weights that are left are trained afterwards, and what was
            removed stays zero, exactly. Needs ``pip install 'evoprune[recovery]'``.
        recovery_tokens: how many tokens it is trained on; None takes 300,000. They are from text A of `calibration`, of
            the embedded corpus from what is in none of its texts A, B and C.
        recovery_loss: ``distill`` (the default: KL divergence from the dense model) or ``lm`` (the next token).
        recovery_parameters: by name; `evoprune list recoveries` shows them with their defaults.
        form: for a compressor that wraps sparse cores in thin matrices, ``armor``: ``modules`` keeps the three of them
            apart, in modules that `load_model` loads and nothing else; ``plain`` gives every layer their product, which
            plain transformers loads and which has no zeros. ``auto`` is ``modules`` for these, else ``plain``. With a
            `policy` it is that of `prune_policy`.
        out: a new or empty folder for a checkpoint, which plain transformers loads unless its form is ``modules``; None
            writes nothing. Its ``recipe.yaml`` makes it again, see `prune_recipe`. While a recovery runs, its own
            checkpoints are in ``<out>.recovery``: after a kill the same call goes on from the last.
        calibration, calibration_sequences, calibration_window, tokens, seed: text A; see `collect_statistics`. Not
            read if the criterion needs no statistics.
        progress: told what runs and how far it is.
        loading: further arguments of `load_model`, where `model` is a name.

    Raises:
        InvalidInput: something of the above does not exist or does not fit; no checkpoint is written.
    """
    if policy is not None:
        from evoprune.policies import prune_policy

        beside = {
            "sparsity": sparsity,
            "pattern": pattern,
            "group": group,
            "allocation": allocation,
            "allocation_parameters": allocation_parameters,
            "budgets": budgets,
            "compressor": compressor,
        }
        if told := [name for name, value in beside.items() if value is not None]:
            raise InvalidInput(f"a policy says by itself what goes: leave out {told[0]}")
        return prune_policy(
            model,
            policy,
            recovery=recovery,
            recovery_tokens=recovery_tokens,
            recovery_loss=recovery_loss,
            recovery_parameters=recovery_parameters,
            form=form,
            calibration=calibration,
            seed=seed,
            out=out,
            progress=progress,
            **loading,
        )
    criterion = load_metric(metric) if isinstance(metric, str) else metric
    named = "uniform" if allocation is None and budgets else allocation
    given = GivenAllocation(named, allocation_parameters or {}, sparsity, pattern, group, budgets or {})
    compressor = compressor or given.provenance.compressor or "mask"
    rule = mask_rule(criterion, sparsity, pattern, group, compressor)
    plugin = compressor_of(compressor)
    modules = _modules(form, compressor, recovery)
    if isinstance(plugin, AtRunTime) and (allocation is not None or budgets):
        raise InvalidInput(
            f"compressor {compressor!r} has its own shares by kind of matrix: leave out allocation and budget"
        )
    needs = needed_statistics(criterion, compressor)
    if out is not None:
        check_out_dir(out)
    recovers = given_recovery(
        recovery, recovery_tokens, recovery_loss, recovery_parameters, source=calibration, seed=seed, out=out
    )
    language_model = own_copy(model) if isinstance(model, LanguageModel) else loaded(model, loading, progress)
    check_rule(language_model, rule, compressor)
    if modules:
        check_modular(language_model.model, cut=language_model.cut)
    begun = None if recovers is None else recovers.started(language_model)
    text: dict[str, Any] = {
        "calibration": calibration,
        "calibration_sequences": calibration_sequences,
        "calibration_window": calibration_window,
        "tokens": tokens,
        "seed": seed,
        "progress": progress,
    }
    own = given.resolved(language_model, criterion, text)
    if own is not None:
        rule = MaskRule(own.sparsity)
    statistics: Statistics | None = None
    thresholds: tuple[Thresholded, ...] = ()
    # Weights that a search has measured come out again, bit for bit, from sums in the same order.
    with torch_threads(given.provenance.threads):
        if isinstance(plugin, AtRunTime):
            thresholds = plugin.attach(
                language_model,
                calibration_windows(language_model, calibration, calibration_sequences, calibration_window, seed),
                sparsity,
                lambda done, total: progress("setting thresholds", done, total),
            )
            layers = pruned_before(language_model, {found.name: found.error for found in thresholds})
        else:
            statistics = collect_statistics(language_model, needs, **text) if needs else None
            layers = prune_model(
                language_model,
                criterion,
                rule,
                statistics=statistics,
                compressor=compressor,
                allocation=own,
                modules=modules,
                progress=lambda done, total: progress("pruning matrices", done, total),
            )
    stored = of_weights(
        language_model,
        loading,
        metric,
        criterion,
        rule=rule,
        sparsity=sparsity,
        compressor=compressor,
        allocation=own,
        modules=modules,
        statistics=statistics,
        recovers=recovers is not None,
        text=text,
    )
    if modules:
        sites = tuple(list_sites(language_model.model, language_model.components))
        language_model = replace(language_model, sites=sites)
    recovered = None if begun is None else begun.run(language_model, progress)
    pruned = Pruned(
        language_model=language_model,
        criterion=criterion_label(metric, criterion) if plugin.reads_criterion else None,
        rule=rule,
        compressor=compressor,
        layers=layers,
        recovery=recovered,
        allocation=own,
        doubt=None if own is None else own.doubt(language_model.fingerprint),
        merged=isinstance(plugin, Wrapping) and not modules,
        thresholds=thresholds,
    )
    recipe: dict[str, Any] = {
        "criterion": pruned.criterion,
        "source": None if pruned.criterion is None else criterion.source,
        "sparsity": rule.sparsity,
        "pattern": str(rule) if rule.pattern else None,
        "group": rule.group,
        "allocation": None if own is None else to_json(own),
        "compressor": compressor,
        "calibration": None if statistics is None else _described(statistics, calibration, seed, needs),
    }
    kept = ["removed", "prunable", "layers"]
    if isinstance(plugin, Wrapping):
        recipe["form"] = "modules" if modules else "plain"
    if isinstance(plugin, AtRunTime):
        shares = {"sparsity": sparsity, "parameters": parameters_of(plugin)}
        where = {"text": public_name(calibration), "side": "A", "sequences": calibration_sequences, "seed": seed}
        recipe |= {"form": "modules", "sparsity": None, "group": None, "thresholds": shares | where}
        kept.append("thresholds")
    if recovers is not None and recovered is not None:
        recipe["recovery"] = recovers.recipe(recovered.done.learning_rate)
        kept.append("recovery")
        stored = None if stored is None else stored.recovered(recipe["recovery"])
    pruned = replace(pruned, recipe=stored)
    if out is not None:
        progress("writing the checkpoint", 0, 1)
        report = {name: value for name, value in pruned.to_json().items() if name in kept}
        files = None if stored is None else stored.files()
        pruned = replace(pruned, out=write_checkpoint(language_model, out, recipe=recipe, report=report, files=files))
        progress("writing the checkpoint", 1, 1)
    if recovers is not None:
        recovers.finish()
    # Statistics are cached by fingerprint, and the dense model's are not those of this one.
    fingerprint = content_hash([language_model.fingerprint, recipe])
    return replace(pruned, language_model=replace(language_model, fingerprint=fingerprint))


def evaluate(
    model: str | LanguageModel = "reference",
    *,
    dense: str | LanguageModel | None = None,
    data: str = "corpus",
    window: int | None = None,
    tokens: int | None = None,
    tasks: Sequence[str] | None = None,
    tasks_path: str | Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    samples: int = 0,
    sample_tokens: int | None = None,
    progress: Progress = silent,
    **loading: Any,
) -> Evaluation:
    """Perplexity of a model on text C, its KL divergence from the dense model, and, if asked for, tasks and samples.

    Args:
        model: `reference`, a folder, a Hub id, or a loaded model.
        dense: the model before pruning; None leaves out the KL divergence. Tasks and samples are then also its own.
        data: `corpus`, a file, a folder, or a data set; its side C is read. For a model that reads images also a
            source of images with texts, of which the text is predicted.
        window: tokens in a window; None takes 256, or the model's context if that is shorter.
        tokens: how much text; None takes as much as a search's report, 20,480 tokens, or all there is.
        tasks: names of tasks, groups or tags of lm-evaluation-harness. Needs ``pip install 'evoprune[tasks]'``.
        tasks_path: a folder of tasks of one's own in its YAML; no Python that they name runs, unless `loading` has
            ``trust_remote_code=True``.
        shots: examples in the prompt of a task; None leaves each task its own number, and a task that says 0 keeps it.
        limit: examples of each task; None takes all.
        samples: how many windows of text C the model goes on with, greedily, from their first words.
        sample_tokens: that it writes for each; None takes 32.
        progress: told what runs.
        loading: further arguments of `load_model`, where a model is given by name.

    Raises:
        InvalidInput: no such model, text or task, too little text, or lm-eval is not installed.
    """
    _check_beside(tasks, {"tasks_path": tasks_path, "shots": shots, "limit": limit})
    if sample_tokens is not None and not samples:
        raise InvalidInput("sample_tokens goes with samples: say how many by --samples")
    suite = load_tasks(tasks, tasks_path, trust_remote_code=bool(loading.get("trust_remote_code")))
    language_model = loaded(model, loading, progress)
    width = default_window(language_model, window)
    count = None if tokens is None else tokens // width
    if count == 0:
        raise InvalidInput(f"{tokens} tokens do not fill one window of {width}: give more tokens or a shorter window")
    windows = (
        held_out_windows(language_model, data, width)
        if count is None
        else read_side(language_model, data, "C", window=width, count=count)
    )
    written = SAMPLE_TOKENS if sample_tokens is None else sample_tokens
    begun: Tensor | None = None
    if samples:
        if isinstance(windows, Samples):
            raise InvalidInput("samples go on with text: give --data a text without images")
        check_continuations(language_model, windows, samples, written)
        begun = windows
    reference = None if dense is None else loaded(dense, loading, progress)
    held_out = _held_out(language_model, windows, None if reference is None else reference.model, progress)
    texts: tuple[Continuation, ...] = ()
    if begun is not None:
        progress(f"writing {samples} samples", 0, 1)
        texts = continuations(language_model, begun, samples, written, reference)
        progress(f"writing {samples} samples", 1, 1)
    scores = dense_scores = None
    if suite is not None:
        scores = suite.run(language_model, progress, shots=shots, limit=limit)
        dense_scores = None if reference is None else suite.run(reference, progress, shots=shots, limit=limit)
    images = isinstance(windows, Samples)
    if images:
        width = round(n_tokens(windows) / len(windows))
    sparsity = zero_fraction(language_model.sites)
    dtype = str(language_model.model.dtype).removeprefix("torch.")
    return Evaluation(language_model.name, held_out, width, sparsity, data, dtype, images, scores, dense_scores, texts)


def _check_beside(tasks: Sequence[str] | None, options: Mapping[str, object]) -> None:
    """Refuse options of tasks where none are named, and numbers that make no sense.

    Raises:
        InvalidInput: one of these.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if tasks is None and given:
        raise InvalidInput(f"{next(iter(given))} goes with tasks: name some by --tasks")
    for name, least in (("shots", 0), ("limit", 1)):
        value = given.get(name)
        if isinstance(value, int) and value < least:
            raise InvalidInput(f"{name} {value} is too small: give {least} or more")


def _modules(form: str, compressor: str, recovery: str | None) -> bool:
    """Whether layers become modules of ours.

    Raises:
        InvalidInput: no such form, or not of this compressor or with this recovery.
    """
    check_choice("form of a pruned model", form, ("auto", "plain", "modules"))
    plugin = compressor_of(compressor)
    if isinstance(plugin, AtRunTime):
        if form == "plain":
            raise InvalidInput(f"what compressor {compressor!r} does is in no weight: leave out --form plain")
        if recovery is not None:
            raise InvalidInput(
                f"compressor {compressor!r} leaves nothing to recover by {recovery!r}: prune and recover first, and "
                "give the result thresholds"
            )
        return True
    if not isinstance(plugin, Wrapping):
        if form == "modules":
            raise InvalidInput(f"compressor {compressor!r} makes no modules of its own: leave out --form modules")
        return False
    if form != "plain" and recovery is not None:
        raise InvalidInput(
            f"recovery {recovery!r} trains no {plugin.wraps} around a core: leave it out, or give --form plain, which "
            "has neither wrappers nor zeros"
        )
    return form != "plain"


def own_copy(language_model: LanguageModel) -> LanguageModel:
    """The same model with weights of its own."""
    model = deepcopy(language_model.model)
    return replace(language_model, model=model, sites=rebind(language_model.sites, model))


def _described(statistics: Statistics, text: str, seed: int, needs: Iterable[str]) -> dict[str, Any]:
    """What a recipe says of the calibration."""
    return {
        "text": public_name(text),
        "side": "A",
        "sequences": statistics.manifest["sequences"],
        "window": statistics.manifest["window"],
        "seed": seed,
        "statistics": sorted(needs),
        "tokens": statistics.manifest["settings"]["tokens"],
    }


def _held_out(language_model: LanguageModel, windows: Sequences, dense: Any, progress: Progress) -> HeldOut:
    progress(f"measuring on {n_tokens(windows):,} tokens", 0, 1)
    held_out = evaluate_language_model(language_model.model, windows, dense=dense)
    progress(f"measuring on {n_tokens(windows):,} tokens", 1, 1)
    return held_out
