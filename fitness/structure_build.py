"""Building the structure database: Gram matrices of what output matrices read, block by block.

What a block reads depends on what became of those before it. Modes: ``dense``, they are whole, so that blocks do not
depend on each other; ``expectation``, what attentions and MLPs before it give is the mean over all widths, each by the
share that stays; ``path``, they are cut to given shapes, such as the best of a search so far, and each output makes up
for a part of what was changed before it.
Source: Li et al. 2025 (Týr-the-Pruner, arXiv:2503.09657); layerwise sparsity allocation, sections 4.1 (ii) and 5.6.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any, get_args

import torch
from torch import Tensor

from evoprune.fitness.block_walk import BlockWalk
from evoprune.fitness.dense_stream import CORRECTION, DenseStream, dense_stream
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.parcels import deliver, find
from evoprune.fitness.samples import Samples, Sequences
from evoprune.fitness.statistics_forward import InputSums
from evoprune.fitness.structure_database import (
    Mode,
    StructureDatabase,
    block_prefix,
    check_disk,
    database_prefix,
    read_block,
    structure_recipe,
    write_block,
    write_manifest,
)
from evoprune.fitness.structure_parts import (
    Part,
    Stored,
    attention_tensors,
    columns_of,
    mixture,
    mlp_tensors,
    refitted,
)
from evoprune.fitness.units import AttentionUnits, BlockUnits, PartName
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.shape import BlockShape

Progress = Callable[[int, int], None]


def build_structure_database(
    language_model: LanguageModel,
    units: Sequence[BlockUnits],
    windows: Sequences | Sequence[Sequences],
    *,
    mode: Mode = "expectation",
    path: Sequence[BlockShape] | None = None,
    correction: float = CORRECTION,
    progress: Progress = lambda done, total: None,
) -> StructureDatabase:
    """Order and factor the units of all blocks, or find that it was done before, here or in the cluster.

    What an interrupted build has finished is not done again. The hidden states of the whole text before and behind a
    block, along a path six such, and the matrices of one part at a time, are in memory beside the model, whose weights
    are as before at the end.

    Args:
        language_model: the dense model.
        units: of all of its blocks; see `evoprune.fitness.units.find_units`.
        windows: text A, [n, window] int64 token ids or samples; or several texts, of whose tokens all weigh alike.
        mode: what a block reads; see above.
        path: what is kept of each block, with the mode ``path`` and with no other.
        correction: along a path, how much of what outputs can make up for they do, in [0, 1]; with 0 each keeps its own
            output, as published. See `evoprune.fitness.dense_stream`, also for what blocks it passes by.
        progress: called with (done, total) in blocks.

    Raises:
        InvalidInput: no such mode or correction, shapes that do not fit, a Gram matrix that cannot be inverted even
            damped, or the disk is full or read-only.
    """
    texts = texts_of(windows)
    _check_mode(mode, path)
    if path is not None:
        check_path(units, path)
    recipe = structure_recipe(language_model, units, texts, mode, path, correction)
    known = find(database_prefix(recipe))
    if known is None:
        names = _build(language_model, units, texts, recipe, path, range(len(units)), progress)
        known = write_manifest(recipe, names)
        deliver(known)
    return StructureDatabase.open(known, language_model, units)


def build_structure_block(
    language_model: LanguageModel, units: Sequence[BlockUnits], windows: Sequences | Sequence[Sequences], block: int
) -> str:
    """Build one block of the database of the mode ``dense``; returns the name of its parcel.

    Once all blocks are built, on whichever workers of a cluster, `build_structure_database` has nothing to compute.
    Arguments and errors as there; `block` is the index.
    """
    texts = texts_of(windows)
    recipe = structure_recipe(language_model, units, texts, "dense", None, 0.0)
    return _build(language_model, units, texts, recipe, None, range(block, block + 1), lambda done, total: None)[0]


def texts_of(windows: Sequences | Sequence[Sequences]) -> list[Sequences]:
    """One text, or several, as a list."""
    return [windows] if isinstance(windows, (Tensor, Samples)) else list(windows)


def _check_mode(mode: Mode, path: Sequence[BlockShape] | None) -> None:
    """Refuse a mode that there is not, or a path that does not belong to it."""
    if mode not in get_args(Mode):
        raise InvalidInput(f"no accumulation mode {str(mode)[:40]!r}; there are {', '.join(get_args(Mode))}")
    if (path is not None) != (mode == "path"):
        raise InvalidInput("shapes of blocks go with the accumulation mode 'path', which needs them, and no other")


def check_path(units: Sequence[BlockUnits], path: Sequence[BlockShape]) -> None:
    """Refuse shapes that are not those of a model.

    Raises:
        InvalidInput: there are more or fewer than blocks, or one does not fit its block.
    """
    if len(path) != len(units):
        raise InvalidInput(f"{len(path)} shapes do not fit a model of {len(units)} blocks: give one for each")
    for block, shape in zip(units, path, strict=True):
        shape.check(block.block, block.widths)


@torch.no_grad()
def _build(
    language_model: LanguageModel,
    units: Sequence[BlockUnits],
    texts: Sequence[Sequences],
    recipe: dict[str, Any],
    path: Sequence[BlockShape] | None,
    wanted: range,
    progress: Progress,
) -> list[str]:
    """Names of the parcels of the blocks that are wanted."""
    found = {block: find(block_prefix(recipe, block)) for block in wanted}
    missing = [block for block in wanted if found[block] is None]
    if missing:
        check_disk([units[block] for block in missing])
        walk = BlockWalk(language_model, [block.name for block in units], texts)
        if recipe["mode"] == "dense":
            made = _independent(walk, units, missing)
        else:
            stream = dense_stream(language_model, units, texts, recipe.get("correction", 0.0), walk)
            made = _accumulated(walk, units, found, missing[-1], path, stream)
        # Closed whatever happens, so that the model's weights are its own again.
        with closing(made):
            for block, parts in made:
                found[block] = name = write_block(block_prefix(recipe, block), parts)
                deliver(name)
                progress(block + 1 - wanted.start, len(wanted))
    progress(len(wanted), len(wanted))
    return [parcel for block in wanted if (parcel := found[block]) is not None]


def _independent(
    walk: BlockWalk, units: Sequence[BlockUnits], missing: Sequence[int]
) -> Generator[tuple[int, dict[PartName, Stored]], None, None]:
    """The parts of the missing blocks, each of which reads what it reads in the dense model."""
    walk.run({}, to=missing[0])
    for block, following in zip(missing, [*missing[1:], None], strict=True):
        attention, mlp = units[block].attention, units[block].mlp
        grams = part_grams(walk, [attention, mlp], following)
        yield block, {"attention": _tensors(attention, grams[0]), "mlp": _tensors(mlp, grams[1])}


def _accumulated(
    walk: BlockWalk,
    units: Sequence[BlockUnits],
    found: dict[int, str | None],
    last: int,
    path: Sequence[BlockShape] | None,
    stream: DenseStream | None,
) -> Generator[tuple[int, dict[PartName, Stored]], None, None]:
    """The parts of the missing blocks up to the last, each of which reads what is left of those before it."""
    for block in range(last + 1):
        name, shape = found[block], path[block] if path is not None else None
        known = read_block(name) if name is not None else {}
        if stream is not None:
            stream.enter(units[block])
        parts: dict[PartName, Stored] = {}
        with ExitStack() as stack:
            for part_name, part in named_parts(units[block]):
                parts[part_name] = known.get(part_name) or _tensors(part, *part_sums(walk, part, stream))
                columns = None if shape is None else columns_of(part, shape)
                # A part that stays whole keeps its dense weight, whatever a search asks of it.
                whole = columns is not None and len(columns) == part.output.site.in_features
                if not whole and (part_name, block) != ("mlp", last):
                    new = _left(part, parts[part_name], columns)
                    stack.enter_context(replaced(part, new, dropped=columns == []))
            if name is None:
                yield block, parts
            if block < last:
                walk.run({}, to=block + 1)


def named_parts(block: BlockUnits) -> tuple[tuple[PartName, Part], ...]:
    """The parts of a block in the order of a forward pass, with their names."""
    return ("attention", block.attention), ("mlp", block.mlp)


def part_grams(walk: BlockWalk, parts: Sequence[Part], to: int | None = None) -> list[Tensor]:
    """[in, in] float32, mean of x xᵀ over tokens, of what the outputs of parts of the present block read."""
    outputs = [part.output for part in parts]
    sums = [InputSums(bound.site.in_features, bound.weight().device, frozenset({"H"})) for bound in outputs]

    def taken(inputs: InputSums, width: int) -> Callable[[Tensor], None]:
        return lambda rows: inputs.add(rows.reshape(-1, width))

    see = {bound.module: taken(inputs, bound.site.in_features) for bound, inputs in zip(outputs, sums, strict=True)}
    walk.run(see, to)
    return [inputs.results(1)["H"] for inputs in sums]


def part_sums(walk: BlockWalk, part: Part, stream: DenseStream | None) -> tuple[Tensor, Tensor | None]:
    """What a whole part of the present block is refitted by: its Gram matrix, and what it should put out beside.

    The stream has entered this block, and says the latter, see `DenseStream.sums`; without one there is nothing beside.
    """
    return (part_grams(walk, [part])[0], None) if stream is None else stream.sums(walk, part)


def _tensors(part: Part, gram: Tensor, missing: Tensor | None = None) -> Stored:
    if isinstance(part, AttentionUnits):
        return attention_tensors(part, gram, missing)
    return mlp_tensors(part, gram, missing)


def _left(part: Part, stored: Stored, columns: Sequence[int] | None) -> Tensor:
    """What the output of a part becomes on these columns, or without any the mean over all widths."""
    return mixture(part, stored) if columns is None else refitted(part, stored, columns)


@contextmanager
def replaced(part: Part, weight: Tensor, *, dropped: bool) -> Iterator[None]:
    """Inside, the output of a part has this weight.

    Args:
        part: bound to the live model.
        weight: [out, in], of any float type.
        dropped: the whole part goes, and the bias of its output with it.
    """
    bias = part.output.bias() if dropped else None
    live = [part.output.weight(), *([] if bias is None else [bias])]
    before = [tensor.clone() for tensor in live]
    try:
        live[0].copy_(weight)
        if bias is not None:
            bias.zero_()
        yield
    finally:
        for tensor, kept in zip(live, before, strict=True):
            tensor.copy_(kept)
