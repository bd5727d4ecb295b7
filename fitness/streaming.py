"""Pruning and evaluating a model that need not fit into memory: one block of it is there at a time.

The text goes through the blocks as in `evoprune.fitness.block_walk`; what it is in front of a block is in a file.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from evoprune.fitness.amia import TokenChoice
from evoprune.fitness.block_walk import BlockWalk
from evoprune.fitness.cache import cache_folder, disk_errors
from evoprune.fitness.compressors import Cost, compressor_of
from evoprune.fitness.evaluation import TOKENS_PER_CHUNK, HeldOut, held_out_of, predictions
from evoprune.fitness.file_states import FileStates
from evoprune.fitness.heap import freed_tensors_released
from evoprune.fitness.pruning import check_allocation, check_rule, needed_statistics, prune_sites
from evoprune.fitness.replay import BlockByBlock, Replay, check_replay, dense_names
from evoprune.fitness.samples import Batch
from evoprune.fitness.statistics_passes import FORWARD_TOKENS
from evoprune.fitness.statistics_store import GRAM
from evoprune.fitness.streamed import Streamed
from evoprune.fitness.streamed_checkpoint import StreamedCheckpoint
from evoprune.metrics.allocation import Allocation
from evoprune.metrics.criterion import Criterion
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.records import MaskRule

Accumulation = Literal["dense", "path"]

# Windows in a forward pass of an evaluation, at most; as in `evaluate_language_model`.
EVALUATED_TOGETHER = 8
# Beside everything that is counted: the interpreter's own growth, threads and workspaces of torch's libraries.
_OWN_BYTES = 32 << 20
# Copies in float32 of the largest matrix that exist together with what ranks, solves or measures it, by cost.
_COPIES: dict[Cost, int] = {"mask": 10, "linear": 12, "cubic": 20, "cubic by row": 20}
# Copies in float32 of the Gram matrix of the widest inputs, beside the one that was collected, where one is read.
_GRAM_COPIES = 8
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def memory_bytes(spelled: str) -> int:
    """How much memory is meant by words such as ``2GiB`` or ``500MB``.

    Raises:
        InvalidInput: they say no size.
    """
    text = spelled.strip().upper()
    number = text.rstrip("BIKMG")
    try:
        size = float(number) * _UNITS[text[len(number) :].strip()]
    except (ValueError, KeyError):
        size = 0.0
    if not 0 < size < 1 << 60:
        raise InvalidInput(f"memory {spelled[:40]!r} is no size: give one such as 2GiB or 500MB")
    return int(size)


def check_memory(limit: int, needed: int) -> None:
    """Refuse a limit below what streaming needs.

    Raises:
        InvalidInput: says the smallest that works.
    """
    if needed > limit:
        smallest = -(-needed // (1 << 20))
        raise InvalidInput(
            f"{limit / 2**20:.0f} MiB are too little to stream this: give --memory {smallest}MiB or more"
        )


def pruning_bytes(
    streamed: Streamed,
    sequences: Tensor,
    names: Iterable[str],
    compressor: str,
    accumulation: Accumulation,
    *,
    maps: bool = False,
) -> int:
    """How much memory `prune_blocks` takes at most, beside what the process has before.

    Args:
        streamed: the model.
        sequences: text A, [n, window] int64.
        names: statistics that are needed.
        compressor: the compressor, with its parameters.
        accumulation: as of `prune_blocks`.
        maps: whether attention hands out its maps, as it does where tokens are chosen.
    """
    sites = streamed.language_model.sites
    grams = GRAM in names or not {"Hinv", "Hchol2"}.isdisjoint(names)
    tokens = min(sequences.numel(), max(FORWARD_TOKENS, sequences.shape[1]))
    walks = 2 if accumulation == "path" else 1
    peak = 0
    for block in range(streamed.n_blocks):
        own = [bound.site for bound in sites if bound.site.block == block]
        # Of inputs that matrices share one is collected; which do is known once they have run.
        sums = sum(48 * site.in_features + 4 * grams * site.in_features**2 for site in own) * walks
        widest = max(site.in_features for site in own)
        work = 4 * _COPIES[compressor_of(compressor).cost] * max(site.weights for site in own)
        work += 4 * grams * _GRAM_COPIES * widest**2
        passes = _pass_bytes(streamed, block, tokens, sequences.shape[1], maps)
        peak = max(peak, _block_bytes(streamed, block) + sums + max(work, passes))
    embedding = _resident_bytes(streamed, streamed.embeddings) + 4 * tokens * _hidden_size(streamed)
    last = _resident_bytes(streamed, streamed.head)
    return _always_bytes(streamed, sequences) + max(peak, embedding, last)


def evaluation_bytes(models: Iterable[Streamed], windows: Tensor) -> int:
    """How much memory `evaluate_blocks` takes at most, beside what the process has before.

    Args:
        models: that are evaluated, and compared with.
        windows: text C, [n, window] int64.
    """
    rows = _rows_together(windows)
    tokens = min(len(windows), rows) * windows.shape[1]
    always = peak = last = 0
    compared = list(models)
    # Log-probabilities of a chunk, and with a dense model all that the divergence is made of.
    per_chunk = 8 if len(compared) == 1 else 20
    for streamed in compared:
        always += _always_bytes(streamed, windows)
        for block in range(streamed.n_blocks):
            passes = _pass_bytes(streamed, block, tokens, windows.shape[1], False)
            peak = max(peak, _block_bytes(streamed, block) + passes)
        peak = max(peak, _resident_bytes(streamed, streamed.embeddings))
        vocabulary = streamed.model.get_input_embeddings().get_parameter("weight").shape[0]
        # Those of the batch before are there while the next are computed; a cap on them makes copies.
        capped = getattr(streamed.model.config.get_text_config(), "final_logit_softcapping", None) is not None
        logits = vocabulary * streamed.dtype.itemsize * tokens * (4 if capped else 2)
        logits += vocabulary * per_chunk * min(tokens, TOKENS_PER_CHUNK)
        last += _resident_bytes(streamed, streamed.head) + logits
    return always + max(peak, last)


@dataclass(frozen=True)
class StreamedPruning:
    """A checkpoint whose blocks are written.

    Attributes:
        checkpoint: what is left to do is to finish it.
        statistics: what the text told; None if nothing was asked for.
        continued: how many blocks had been written before.
    """

    checkpoint: StreamedCheckpoint
    statistics: BlockByBlock | None
    continued: int


@torch.no_grad()
def prune_blocks(
    streamed: Streamed,
    checkpoint: StreamedCheckpoint,
    criterion: Criterion,
    rule: MaskRule,
    sequences: Tensor | None,
    *,
    compressor: str = "mask",
    allocation: Allocation | None = None,
    accumulation: Accumulation = "dense",
    tokens: TokenChoice | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> StreamedPruning:
    """Prune a model block by block and write each as it is done; the result is that of `prune_model`, bit for bit.

    Args:
        streamed: the model, dense or pruned before.
        checkpoint: where the blocks go; those that it has already are not done again.
        criterion, rule, compressor, allocation: as of `evoprune.fitness.pruning.prune_model`.
        sequences: text A, [n, window] int64 token ids; None if no statistics are needed.
        accumulation: what the text has gone through when it reaches a block: ``dense`` blocks, or those before it as
            they are now pruned, ``path``.
        tokens: how the tokens are chosen that statistics are of; None takes all.
        progress: called with (done, total) in blocks.

    Raises:
        InvalidInput: see `check_streamed`; the disk is full or read-only; see also `prune_model`.
    """
    language_model, begin = streamed.language_model, checkpoint.done
    check_streamed(streamed, criterion, rule, compressor, allocation, accumulation)
    needs = needed_statistics(criterion, compressor)
    statistics: BlockByBlock | None = None
    with freed_tensors_released():
        if needs or accumulation == "path":
            assert sequences is not None
            kind = Replay if accumulation == "path" else BlockByBlock
            statistics = kind(
                language_model, sequences, needs, tokens=tokens, states=checkpoint.states, begin=checkpoint.done
            )
            if begin:
                checkpoint.resumed(statistics.walks)
            else:
                with streamed.resident(streamed.embeddings):
                    for walk in statistics.walks.values():
                        walk.run({}, to=0)
        for block in range(begin, streamed.n_blocks):
            progress(block, streamed.n_blocks)
            with streamed.resident(streamed.block(block)):
                layers = prune_sites(
                    language_model,
                    [bound for bound in language_model.sites if bound.site.block == block],
                    criterion,
                    rule,
                    statistics=statistics,
                    compressor=compressor,
                    allocation=allocation,
                )
                if statistics is not None:
                    statistics.leave()
                checkpoint.add(layers, {} if statistics is None else statistics.walks)
        progress(streamed.n_blocks, streamed.n_blocks)
    return StreamedPruning(checkpoint, statistics, begin)


def check_streamed(
    streamed: Streamed,
    criterion: Criterion,
    rule: MaskRule,
    compressor: str,
    allocation: Allocation | None,
    accumulation: Accumulation,
) -> None:
    """Refuse what cannot be done with a block at a time; worth asking before long work.

    Raises:
        InvalidInput: scores of all blocks are to be compared, gradients of the whole model are needed, or the
            compressor works at run time; see also `check_rule` and `check_allocation`.
    """
    check_rule(streamed.language_model, rule, compressor)
    check_replay(streamed.language_model, rule, compressor, "--memory")
    if gradients := dense_names(needed_statistics(criterion, compressor)):
        raise InvalidInput(
            f"{min(gradients)} is a gradient, for which the whole model has to be in memory: leave out --memory, or "
            "give a metric without"
        )
    if allocation is not None:
        check_allocation(streamed.language_model, allocation, rule)


@torch.inference_mode()
def evaluate_blocks(
    streamed: Streamed,
    windows: Tensor,
    *,
    dense: Streamed | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[HeldOut, float]:
    """Measure a model on windows of tokens, block by block.

    Args:
        streamed: the model.
        windows: text C, [n, window] int64 token ids.
        dense: the model before pruning; adds the KL divergence.
        progress: called with (done, total) in blocks.

    Returns:
        What `evaluate_language_model` says, and the fraction of the prunable weights that is exactly zero.

    Raises:
        InvalidInput: a window has no token to predict, the vocabularies differ, or the disk is full or read-only.
        InvalidCandidate: the model's output is not finite.
    """
    counts = predictions(windows)
    models = [streamed] if dense is None else [streamed, dense]
    total = sum(model.n_blocks for model in models)
    cache = cache_folder()
    with disk_errors(cache), freed_tensors_released(), ExitStack() as stack:
        cache.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".states-", dir=cache))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        walks, zeros, done = [], 0, 0
        for number, model in enumerate(models):
            walk = _walk(model, windows, folder / str(number))
            walks.append(walk)
            with model.resident(model.embeddings):
                walk.run({}, to=0)
            for block in range(model.n_blocks):
                progress(done, total)
                with model.resident(model.block(block)):
                    walk.run({}, to=block + 1)
                    if model is streamed:
                        zeros += _zeros(model, block)
                done += 1
        progress(total, total)
        for model in models:
            stack.enter_context(model.resident(model.head))
        held_out = held_out_of(counts, _outputs(models, walks))
    prunable = sum(bound.site.weights for bound in streamed.language_model.sites)
    return held_out, zeros / max(prunable, 1)


def _walk(streamed: Streamed, windows: Tensor, folder: Path) -> BlockWalk:
    """A walk that keeps states in two files, in turns."""
    folder.mkdir()
    turn = 0

    def states() -> FileStates:
        nonlocal turn
        turn = 1 - turn
        return FileStates(folder / str(turn))

    blocks = [name for name, _ in streamed.language_model.blocks()]
    return BlockWalk(streamed.language_model, blocks, [windows], states=states, batch=_rows_together(windows))


def _rows_together(windows: Tensor) -> int:
    return min(EVALUATED_TOGETHER, max(1, FORWARD_TOKENS // windows.shape[1]))


def _outputs(models: list[Streamed], walks: list[BlockWalk]) -> Iterator[tuple[Tensor, Tensor | None, Batch]]:
    logits = [walk.logits(model.model) for model, walk in zip(models, walks, strict=True)]
    for made in zip(*logits, strict=True):
        yield made[0][1], made[1][1] if len(made) > 1 else None, made[0][0]


def _zeros(streamed: Streamed, block: int) -> int:
    sites = [bound for bound in streamed.language_model.sites if bound.site.block == block]
    return sum(int((bound.weight() == 0).sum()) for bound in sites)


def _hidden_size(streamed: Streamed) -> int:
    return int(streamed.model.config.get_text_config().hidden_size)


def _size(streamed: Streamed, name: str) -> int:
    path, _, leaf = name.rpartition(".")
    shape: torch.Size = getattr(streamed.model.get_submodule(path), leaf).shape
    return shape.numel() * streamed.dtype.itemsize


def _resident_bytes(streamed: Streamed, names: Iterable[str]) -> int:
    """Of some tensors, with the one that is being read or written."""
    known = list(names)
    largest = max((max(_size(streamed, name), streamed.files.stored_bytes(name)) for name in known), default=0)
    return sum(_size(streamed, name) for name in known) + largest


def _block_bytes(streamed: Streamed, block: int) -> int:
    """Of a block's weights; in another dtype than the files have, they are there twice while they are written."""
    names = streamed.block(block)
    stored = sum(streamed.files.stored_bytes(name) for name in names)
    own = sum(_size(streamed, name) for name in names)
    return _resident_bytes(streamed, names) + (stored if stored != own else 0)


def _pass_bytes(streamed: Streamed, block: int, tokens: int, window: int, maps: bool) -> int:
    """Of what is there of some tokens while they go through a block, with the sums that are taken of them."""
    own = [bound.site for bound in streamed.language_model.sites if bound.site.block == block]
    widest = max(max(site.in_features, site.out_features) for site in own)
    config = streamed.model.config.get_text_config()
    # A fused kernel has no map of who looks at whom; the others have one for each head, in float32 and once more.
    seen = config.num_attention_heads * window if maps or config._attn_implementation == "eager" else 0
    return tokens * (streamed.dtype.itemsize * (4 * widest + 8 * _hidden_size(streamed)) + 16 * widest + 8 * seen)


def _always_bytes(streamed: Streamed, sequences: Tensor) -> int:
    return _OWN_BYTES + sum(_size(streamed, name) for name in streamed.beside) + 2 * 8 * sequences.numel()
