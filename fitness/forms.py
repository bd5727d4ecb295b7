"""The forms in which a cut model can be written: which classes load it, and how much of it is zeros.

Source: layerwise sparsity allocation, section 6.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product

from torch import Tensor

from evoprune.fitness.adapters import list_sites
from evoprune.fitness.compact import check_compact
from evoprune.fitness.models import LanguageModel, refuse_cut
from evoprune.fitness.stock import check_stock, keep_blocks
from evoprune.fitness.surgeon import Surgeon
from evoprune.fitness.units import BlockUnits, find_units
from evoprune.metrics.errors import InvalidInput, UnknownName
from evoprune.metrics.shape import BlockShape, BlockWidths

# Plain: smaller matrices of one width in all blocks, or whole blocks gone. Padded: filled up with zeros to one width.
# Compact: every block as small as it is. Masked: zeros in place of what went. Auto: plain if the shape allows it, else
# compact.
FORMS = ("auto", "plain", "padded", "compact", "masked")


def cut_model(
    language_model: LanguageModel,
    blocks: Sequence[BlockShape],
    outputs: Mapping[str, Tensor] | None = None,
    form: str = "auto",
) -> tuple[LanguageModel, str]:
    """Cut a model to a shape, in place.

    Args:
        language_model: dense.
        blocks: a shape for each block, in model order.
        outputs: weights of output projections; see `Surgeon.apply`.
        form: one of `FORMS`.

    Returns:
        The model with the sites that it has now, ready for `write_checkpoint`, and the form that it got.

    Raises:
        InvalidInput: the model cannot be cut, a block cannot have its shape, or the shape has no such form; the model
            is as it was.
        UnknownName: no such form.
    """
    refuse_cut(language_model)
    units = find_units(language_model)
    surgeon = Surgeon(language_model, units)
    try:
        surgeon.apply(blocks, outputs)
        chosen = form_of(language_model, units, blocks, form)
        stay, kept = _staying(units, blocks)
        if chosen == "masked":
            surgeon.masked(blocks, outputs)
        elif chosen == "padded":
            surgeon.restore()
            widths = padded_widths(language_model, stay, kept)
            surgeon.padded(blocks, [widths] * len(blocks), outputs)
            keep_blocks(language_model, stay, widths)
        elif chosen == "plain":
            keep_blocks(language_model, stay, _widths(kept[0]))
    except InvalidInput:
        surgeon.restore()
        raise
    sites = tuple(list_sites(language_model.model, language_model.components))
    return replace(language_model, sites=sites, cut=chosen == "compact"), chosen


def check_plain(language_model: LanguageModel, units: Sequence[BlockUnits], blocks: Sequence[BlockShape]) -> None:
    """Refuse a shape that the original class cannot have without zeros.

    Raises:
        InvalidInput: says why.
    """
    stay, kept = _staying(units, blocks)
    sizes = {_widths(shape) for shape in kept}
    if len(sizes) > 1:
        first, second = sorted(sizes, key=lambda widths: (widths.heads, widths.groups, widths.neurons))[:2]
        raise InvalidInput(f"its blocks differ: some keep {first}, some {second}")
    if any(not shape.groups or not shape.neurons for shape in kept):
        raise InvalidInput("an attention or an MLP is dropped without the rest of its block")
    if not stay:
        raise InvalidInput("no block stays")
    check_stock(language_model, stay, _widths(kept[0]))


def padded_widths(language_model: LanguageModel, stay: Sequence[BlockUnits], kept: Sequence[BlockShape]) -> BlockWidths:
    """The fewest heads and neurons that hold every block and that the original class can have.

    Args:
        language_model: dense.
        stay: units of the blocks of which something stays.
        kept: their shapes.

    Raises:
        InvalidInput: nothing stays of any block.
    """
    if not stay:
        raise InvalidInput("no block stays: give compact or masked")
    dense = stay[0].widths
    neurons = max(len(shape.neurons) for shape in kept) or dense.neurons
    groups = max(*(len(shape.groups) for shape in kept), 1)
    per_group = max(*(shape.heads_per_group for shape in kept), 1)
    sizes = product(range(groups, dense.groups + 1), range(per_group, dense.heads_per_group + 1))
    for count, heads in sorted(sizes, key=lambda size: (size[0] * (size[1] + 1), size)):
        widths = BlockWidths(count, count * heads, neurons)
        try:
            check_stock(language_model, stay, widths)
        except InvalidInput:
            continue
        return widths
    raise InvalidInput(f"{type(language_model.model).__name__} cannot be written with {neurons} neurons: give compact")


def form_of(
    language_model: LanguageModel, units: Sequence[BlockUnits], blocks: Sequence[BlockShape], form: str = "auto"
) -> str:
    """The form that `cut_model` takes; plain is tried first where the choice is free.

    Raises:
        InvalidInput: the shape has no such form.
        UnknownName: there is none.
    """
    if form not in FORMS:
        raise UnknownName("form", form, FORMS)
    if form in ("auto", "plain"):
        try:
            check_plain(language_model, units, blocks)
        except InvalidInput as error:
            if form == "plain":
                raise InvalidInput(
                    f"--form plain cannot hold this shape: {error}; give compact, padded or masked"
                ) from None
        else:
            return "plain"
    if form in ("auto", "compact"):
        check_compact(language_model)
        return "compact"
    return form


def running_shapes(
    language_model: LanguageModel, units: Sequence[BlockUnits], blocks: Sequence[BlockShape], form: str
) -> list[BlockShape]:
    """What every block computes with, zeros included, in a form that `form_of` gave.

    Raises:
        InvalidInput: the shape has no such form.
    """
    if form == "masked":
        return [block.widths.whole for block in units]
    if form != "padded":
        return list(blocks)
    widths = padded_widths(language_model, *_staying(units, blocks))
    return [
        block.widths.first(widths.groups, widths.heads // widths.groups, widths.neurons)
        if shape.groups or shape.neurons
        else shape
        for block, shape in zip(units, blocks, strict=True)
    ]


def _staying(units: Sequence[BlockUnits], blocks: Sequence[BlockShape]) -> tuple[list[BlockUnits], list[BlockShape]]:
    """Units and shapes of the blocks of which something stays."""
    pairs = [(block, shape) for block, shape in zip(units, blocks, strict=True) if shape.groups or shape.neurons]
    return [block for block, _ in pairs], [shape for _, shape in pairs]


def _widths(shape: BlockShape) -> BlockWidths:
    return BlockWidths(len(shape.groups), len(shape.heads), len(shape.neurons))
