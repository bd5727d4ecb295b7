"""Models larger than memory in Python: pruned and evaluated one block at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from evoprune.allocations import GivenAllocation
from evoprune.api import weights_recipe
from evoprune.calibration import (
    ALL_TOKENS,
    TEXT,
    Progress,
    calibration_windows,
    default_window,
    held_out_windows,
    silent,
    token_choice,
)
from evoprune.fitness.amia import TokenChoice
from evoprune.fitness.checkpoint import check_out_dir
from evoprune.fitness.compressors import Wrapping, compressor_of
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.numerics import torch_threads
from evoprune.fitness.pruning import needed_statistics
from evoprune.fitness.samples import Sequences, n_tokens
from evoprune.fitness.statistics import text_facts
from evoprune.fitness.streamed import Streamed, open_streamed
from evoprune.fitness.streamed_checkpoint import StreamedCheckpoint
from evoprune.fitness.streaming import (
    check_memory,
    check_streamed,
    evaluate_blocks,
    evaluation_bytes,
    memory_bytes,
    prune_blocks,
    pruning_bytes,
)
from evoprune.metrics.allocation import Allocation
from evoprune.metrics.allocation_file import to_json
from evoprune.metrics.criterion import Criterion, Metric
from evoprune.metrics.errors import Interrupted, InvalidInput
from evoprune.metrics.exported import load_metric
from evoprune.metrics.parameters import check_choice
from evoprune.metrics.records import MaskRule
from evoprune.outcomes import Evaluation, PrunedFiles, criterion_label
from evoprune.recipe_file import of_weights


def prune_streamed(
    model: str = "reference",
    *,
    memory: str | int,
    out: str | Path,
    metric: str | Criterion = "wanda",
    sparsity: float | None = None,
    pattern: str | None = None,
    group: str | None = None,
    allocation: str | Path | Allocation | None = None,
    allocation_parameters: Mapping[str, Any] | None = None,
    budgets: Mapping[str, float] | Literal["searched"] | None = None,
    compressor: str | None = None,
    accumulation: Literal["dense", "path"] | None = None,
    form: str = "auto",
    calibration: str = "corpus",
    calibration_sequences: int = TEXT.calibration_sequences,
    calibration_window: int | None = None,
    tokens: str | TokenChoice = ALL_TOKENS,
    seed: int = 0,
    progress: Progress = silent,
    **loading: Any,
) -> PrunedFiles:
    """`prune` of a model that need not fit into memory: one block of it is there at a time.

    The weights are those of `prune`, bit for bit. Blocks are written as they are done, into the hidden folder
    ``.<out>.streaming`` beside `out`: after an interrupt the same call goes on behind the last of them, and a call that
    differs in what decides the weights begins anew.

    Args:
        model: `reference`, a folder, or a Hub id.
        memory: bytes, or words such as ``2GiB``, by which the process grows at most: weights, statistics and what is
            computed with them. Reading the text is not in it.
        out: a new or empty folder for the checkpoint, or an evoprune checkpoint, which is replaced.
        metric, sparsity, pattern, group, allocation_parameters, compressor, accumulation: as of `prune`.
        allocation, budgets: as of `prune`; an allocation has to be given, or ``uniform``: allocators look at the whole
            model.
        form: ``auto`` or ``plain``; of a compressor that wraps sparse cores ``plain`` alone.
        calibration, calibration_sequences, calibration_window, tokens, seed: text A; see `collect_statistics`.
        progress: told what runs and how far it is.
        loading: ``dtype``, ``device``, ``revision`` and ``trust_remote_code`` of `load_model`.

    Raises:
        InvalidInput: something of the above does not exist or does not fit, `memory` is too little (it says how much
            is enough), or what is asked for needs the whole model: gradients, scores that are compared across all
            blocks, an allocator.
        Interrupted: Ctrl-C; the blocks that are written stay, and the same call goes on behind them.
    """
    limit = memory_bytes(memory) if isinstance(memory, str) else memory
    check_choice("accumulation", accumulation or "dense", ("dense", "path"))
    criterion = load_metric(metric) if isinstance(metric, str) else metric
    named = "uniform" if allocation is None and budgets else allocation
    given = GivenAllocation(named, allocation_parameters or {}, sparsity, pattern, group, budgets or {})
    if given.reads_model:
        raise InvalidInput(
            "an allocator looks at the whole model: leave out --memory, or give a file of sparsities, or uniform"
        )
    compressor = compressor or given.provenance.compressor or "mask"
    rule = given.rule(criterion, compressor)
    plugin = compressor_of(compressor)
    check_choice("form of a pruned model", form, ("auto", "plain", "modules"))
    if form == "modules" or (form == "auto" and isinstance(plugin, Wrapping)):
        raise InvalidInput("what is written block by block has no modules of its own: give --form plain")
    needs = needed_statistics(criterion, compressor)
    check_out_dir(out)
    streamed = _opened(model, loading, progress)
    language_model = streamed.language_model
    text: dict[str, Any] = {
        "calibration": calibration,
        "calibration_sequences": calibration_sequences,
        "calibration_window": calibration_window,
        "tokens": tokens,
        "seed": seed,
    }
    own = given.resolved(language_model, criterion, compressor, text | {"progress": progress})
    if own is not None and pattern is None:
        rule = MaskRule(own.sparsity)
    kind = accumulation or "dense"
    check_streamed(streamed, criterion, rule, compressor, own, kind)
    sequences: Tensor | None = None
    if needs or kind == "path":
        sequences = _text(
            calibration_windows(language_model, calibration, calibration_sequences, calibration_window, seed)
        )
    counted = torch.zeros(1, 1, dtype=torch.int64) if sequences is None else sequences
    maps = token_choice(tokens) is not None
    check_memory(limit, pruning_bytes(streamed, counted, needs, compressor, kind, maps=maps))
    with torch_threads(given.provenance.threads):
        identity = {
            "fingerprint": language_model.fingerprint,
            "computes": [str(streamed.dtype), streamed.device.type, torch.get_num_threads()],
            "criterion": _identity(metric, criterion),
            "rule": [rule.sparsity, rule.pattern, rule.group],
            "compressor": compressor,
            "accumulation": kind,
            "allocation": None if own is None else to_json(own),
            "text": None if sequences is None else text_facts(sequences),
            "tokens": None if (choice := token_choice(tokens)) is None else asdict(choice),
            "versions": {name: version(name) for name in ("evoprune", "torch", "transformers")},
        }
        exact = plugin.keeps_weights or language_model.stored_dtype == torch.float32
        stored_dtype = language_model.stored_dtype if exact else None
        checkpoint = StreamedCheckpoint(streamed, out, identity, stored_dtype or streamed.dtype)
        with _kept(checkpoint):
            done = prune_blocks(
                streamed,
                checkpoint,
                criterion,
                rule,
                sequences,
                compressor=compressor,
                allocation=own,
                accumulation=kind,
                tokens=token_choice(tokens),
                progress=lambda done, total: progress("pruning blocks", done, total),
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
            modules=False,
            statistics=done.statistics,
            accumulation=kind,
            recovers=False,
            text=text,
        )
    pruned = PrunedFiles(
        criterion=criterion_label(metric, criterion) if plugin.reads_criterion else None,
        rule=rule,
        compressor=compressor,
        accumulation=None if done.statistics is None else kind,
        layers=checkpoint.layers,
        allocation=own,
        doubt=None if own is None else own.doubt(language_model.fingerprint),
        merged=isinstance(plugin, Wrapping),
        recipe=stored,
        continued=done.continued,
        discarded=checkpoint.discarded,
    )
    recipe = weights_recipe(pruned, criterion, done.statistics, needs, calibration, seed)
    if isinstance(plugin, Wrapping):
        recipe["form"] = "plain"
    report = {name: value for name, value in pruned.to_json().items() if name in ("removed", "prunable", "layers")}
    progress("writing the checkpoint", 0, 1)
    files = None if stored is None else stored.files()
    with _kept(checkpoint):
        written = checkpoint.finish(recipe=recipe, report=report, sparsity=pruned.sparsity_report(), files=files)
    progress("writing the checkpoint", 1, 1)
    return replace(pruned, out=written)


@contextmanager
def _kept(checkpoint: StreamedCheckpoint) -> Iterator[None]:
    """Say where the blocks are that an interrupt inside leaves.

    Raises:
        Interrupted: Ctrl-C.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped; what is written stays in {checkpoint.folder}, and the same command goes on from there"
        ) from None


def evaluate_streamed(
    model: str | LanguageModel,
    dense: str | LanguageModel | None,
    memory: str | int,
    *,
    data: str,
    window: int | None,
    tokens: int | None,
    progress: Progress,
    **loading: Any,
) -> Evaluation:
    """`evaluate` of models that need not fit into memory; arguments as there.

    Raises:
        InvalidInput: see `evaluate`; or `memory` is too little, and it says how much is enough.
    """
    limit = memory_bytes(memory) if isinstance(memory, str) else memory
    streamed = _opened(model, loading, progress)
    reference = None if dense is None else _opened(dense, loading, progress)
    width = default_window(streamed.language_model, window)
    windows = _text(held_out_windows(streamed.language_model, data, width, tokens))
    check_memory(limit, evaluation_bytes([streamed] if reference is None else [streamed, reference], windows))
    held_out, zeros = evaluate_blocks(
        streamed,
        windows,
        dense=reference,
        progress=lambda done, total: progress(f"measuring on {n_tokens(windows):,} tokens", done, total),
    )
    dtype = str(streamed.dtype).removeprefix("torch.")
    return Evaluation(streamed.language_model.name, held_out, width, zeros, data, dtype)


def _opened(model: str | LanguageModel, loading: Mapping[str, Any], progress: Progress) -> Streamed:
    """The model, empty.

    Raises:
        InvalidInput: it is loaded already, or something goes with whole models alone.
    """
    if not isinstance(model, str):
        raise InvalidInput("a loaded model is in memory: give its name, or leave out memory")
    options = {name: value for name, value in loading.items() if value is not None}
    for name in ("components", "device_map"):
        if name in options:
            raise InvalidInput(f"{name} goes with a model that is loaded whole: leave out --memory")
    progress(f"opening {model}", 0, 1)
    streamed = open_streamed(model, **options)
    progress(f"opening {model}", 1, 1)
    return streamed


def _text(sequences: Sequences) -> Tensor:
    """Windows of text.

    Raises:
        InvalidInput: these are samples with images.
    """
    if not isinstance(sequences, Tensor):
        raise InvalidInput("images are read by models that are loaded whole: leave out --memory, or give a text")
    return sequences


def _identity(metric: str | Criterion, criterion: Criterion) -> str:
    """What a criterion is; one that only Python knows is never the same again."""
    known = isinstance(metric, str) or isinstance(criterion, Metric)
    return criterion_label(metric, criterion) if known else os.urandom(8).hex()
