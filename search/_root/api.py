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
    token_choice,
)
from evoprune.fitness.activations import Thresholded
from evoprune.fitness.adapters import list_sites, rebind, zero_fraction
from evoprune.fitness.amia import TokenChoice
from evoprune.fitness.card import public_name
from evoprune.fitness.checkpoint import check_out_dir, write_checkpoint
from evoprune.fitness.compressors import AtRunTime, Wrapping, compressor_of
from evoprune.fitness.continuations import Continuation, check_continuations, continuations
from evoprune.fitness.evaluation import HeldOut, evaluate_language_model
from evoprune.fitness.mixed_precision import BitTarget
from evoprune.fitness.models import LanguageModel, load_model
from evoprune.fitness.modular import check_modular
from evoprune.fitness.numerics import torch_threads
from evoprune.fitness.policy_file import LearnedPolicy
from evoprune.fitness.pruning import check_rule, needed_statistics, prune_model, pruned_before
from evoprune.fitness.replay import Replay, check_replay, dense_names
from evoprune.fitness.samples import Samples, Sequences, n_tokens
from evoprune.fitness.statistics_reader import ModelStatistics
from evoprune.fitness.tasks import load_tasks
from evoprune.metrics.allocation import Allocation
from evoprune.metrics.allocation_file import to_json
from evoprune.metrics.criterion import Criterion
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.exported import load_metric
from evoprune.metrics.files import content_hash
from evoprune.metrics.parameters import check_choice, parameters_of
from evoprune.metrics.records import MaskRule
from evoprune.outcomes import CutModel, Evaluation, Pruned, Removal, criterion_label
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
    accumulation: Literal["dense", "path"] | None = None,
    bits: float | None = None,
    bit_levels: str | Sequence[int] | None = None,
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

    `evoprune.prune_streamed` does so with one block of the model in memory at a time.

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
        accumulation: what calibration text has gone through when it reaches a block: ``dense`` blocks (the default), or
            those before it as they are now pruned, ``path``, which takes up no errors of theirs; see
            `evoprune.fitness.replay`. Gradients and allocators read the dense model in either case.
        bits: mean of them for a weight that stays, shared out over the matrices by an `allocation` such as ``dp``, or
            the same everywhere without one; see `allocate`. For a compressor that has bits: ``obq``, ``sparsegpt`` or
            ``awp``. Nothing is removed unless a `sparsity` or a `pattern` is given too.
        bit_levels: that a matrix may have; see `allocate`.
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
        out: a new or empty folder for a checkpoint, or that of an evoprune checkpoint, which is replaced; None writes
            nothing. Plain transformers loads it unless its form is ``modules``. Its ``recipe.yaml`` makes it again, see
            `prune_recipe`. While a recovery runs, its own checkpoints are in ``<out>.recovery``: after a kill the same
            call goes on from the last.
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
            "accumulation": accumulation,
            "bits": bits,
            "bit_levels": bit_levels,
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
    check_choice("accumulation", accumulation or "dense", ("dense", "path"))
    criterion = load_metric(metric) if isinstance(metric, str) else metric
    if bits is None and bit_levels is not None:
        raise InvalidInput("levels of bits go with bits: say how many on average, such as --bits 3.5")
    asked = None if bits is None else BitTarget.of(bits, bit_levels)
    named = "uniform" if allocation is None and (budgets or asked is not None) else allocation
    given = GivenAllocation(named, allocation_parameters or {}, sparsity, pattern, group, budgets or {}, asked)
    compressor = compressor or given.provenance.compressor or "mask"
    rule = given.rule(criterion, compressor)
    if given.has_bits and recovery is not None:
        raise InvalidInput(
            f"recovery {recovery!r} would train weights off the values that they are rounded to: recover first, "
            "and round the result"
        )
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
    if accumulation == "path":
        check_replay(language_model, rule, compressor)
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
    own = given.resolved(language_model, criterion, compressor, text)
    if own is not None and pattern is None:
        rule = MaskRule(own.sparsity)
    statistics: ModelStatistics | None = None
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
            if accumulation == "path":
                statistics = _replay(language_model, needs, **text)
            elif needs:
                statistics = collect_statistics(language_model, needs, **text)
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
        accumulation=accumulation or "dense",
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
        accumulation=None if statistics is None else accumulation or "dense",
        layers=layers,
        recovery=recovered,
        allocation=own,
        doubt=None if own is None else own.doubt(language_model.fingerprint),
        merged=isinstance(plugin, Wrapping) and not modules,
        thresholds=thresholds,
    )
    recipe = weights_recipe(pruned, criterion, statistics, needs, calibration, seed)
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
        sparsities = pruned.sparsity_report()
        written = write_checkpoint(language_model, out, recipe=recipe, report=report, files=files, sparsity=sparsities)
        pruned = replace(pruned, out=written)
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
    memory: str | int | None = None,
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
        memory: bytes, or words such as ``2GiB``, beyond which evaluating shall not grow: the blocks of a model that is
            given by name are then in memory one at a time. Not with tasks, samples or images.
        progress: told what runs.
        loading: further arguments of `load_model`, where a model is given by name.

    Raises:
        InvalidInput: no such model, text or task, too little text, or lm-eval is not installed.
    """
    _check_beside(tasks, {"tasks_path": tasks_path, "shots": shots, "limit": limit})
    if sample_tokens is not None and not samples:
        raise InvalidInput("sample_tokens goes with samples: say how many by --samples")
    if memory is not None:
        from evoprune.streaming import evaluate_streamed

        if tasks is not None or samples:
            raise InvalidInput("tasks and samples need the whole model: leave out --memory")
        return evaluate_streamed(
            model, dense, memory, data=data, window=window, tokens=tokens, progress=progress, **loading
        )
    suite = load_tasks(tasks, tasks_path, trust_remote_code=bool(loading.get("trust_remote_code")))
    language_model = loaded(model, loading, progress)
    width = default_window(language_model, window)
    windows = held_out_windows(language_model, data, width, tokens)
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


def _replay(
    language_model: LanguageModel,
    needs: Iterable[str],
    *,
    calibration: str,
    calibration_sequences: int,
    calibration_window: int | None,
    tokens: str | TokenChoice,
    seed: int,
    progress: Progress,
) -> Replay:
    """Statistics behind pruned blocks; arguments as of `collect_statistics`."""
    text: dict[str, Any] = {"calibration": calibration, "calibration_sequences": calibration_sequences, "seed": seed}
    text |= {"calibration_window": calibration_window, "tokens": tokens, "progress": progress}
    gradients = dense_names(needs)
    dense = collect_statistics(language_model, gradients, **text) if gradients else None
    windows = calibration_windows(language_model, calibration, calibration_sequences, calibration_window, seed)
    return Replay(language_model, windows, needs, dense=dense, tokens=token_choice(tokens))


def weights_recipe(
    pruned: Removal,
    criterion: Criterion,
    statistics: ModelStatistics | None,
    needs: Iterable[str],
    calibration: str,
    seed: int,
) -> dict[str, Any]:
    """What `evoprune.json` and the model card say of how single weights went, as JSON values.

    Args:
        pruned: what went.
        criterion: that scored the weights.
        statistics: that were read; None if none were.
        needs: names of those that criterion and compressor need.
        calibration, seed: the text, as given.
    """
    rule = pruned.rule
    return {
        "criterion": pruned.criterion,
        "source": None if pruned.criterion is None else criterion.source,
        "sparsity": rule.sparsity,
        "pattern": str(rule) if rule.pattern else None,
        "group": rule.group,
        "allocation": None if pruned.allocation is None else to_json(pruned.allocation),
        "compressor": pruned.compressor,
        "accumulation": pruned.accumulation,
        "calibration": None if statistics is None else _described(statistics, calibration, seed, needs),
    }


def _described(statistics: ModelStatistics, text: str, seed: int, needs: Iterable[str]) -> dict[str, Any]:
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
