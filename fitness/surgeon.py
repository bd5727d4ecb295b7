"""Cutting a resident model to a shape, and back: candidates of a search run as small as they will be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from evoprune.fitness.adapters import Prunable
from evoprune.fitness.dropped import DroppedAttention, DroppedMlp
from evoprune.fitness.part_merges import NO_MERGES, Merges, Sources, merged_part
from evoprune.fitness.surgery import Part, Span, put_module
from evoprune.fitness.units import PARTS, AttentionUnits, BlockUnits, MlpUnits, PartName
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.shape import BlockShape, BlockWidths

# What attentions say of their heads, each family some of it; Phi-3 reads its config in every forward pass.
_OF_HEADS = (
    "num_heads",
    "num_attention_heads",
    "num_key_value_heads",
    "num_kv_heads",
    "num_key_value_groups",
    "split_size",
    "config",
)


MAX_MERGED_BYTES = 1 << 30
"""What merged parts may take that are remembered: children of one parent share most of theirs."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the units that stay go in a block that has room for more.

    Attributes:
        widths: of that block.
        shape: as many units as stay, as indices in it.
    """

    widths: BlockWidths
    shape: BlockShape


class Surgeon:
    """Cuts blocks in place. What is not cut is the model's own parameters and modules, untouched.

    Args:
        language_model: dense when it is handed over.
        units: of all its blocks, as `find_units` found them.
    """

    def __init__(self, language_model: Prunable, units: Sequence[BlockUnits]) -> None:
        self._model = language_model.model
        self._blocks = [_Block(language_model.model, block) for block in units]
        self._merged: dict[tuple[int, PartName, Sources], dict[str, Tensor]] = {}

    def apply(
        self,
        blocks: Sequence[BlockShape],
        outputs: Mapping[str, Tensor] | None = None,
        merges: Merges = NO_MERGES,
    ) -> None:
        """Make every block as small as its shape says; a part that is so already costs nothing.

        Rows of the matrices that read go with their units, biases with their rows, and columns of the matrix that
        writes. A dropped part adds zeros, and the norms that only it needed are gone.

        Args:
            blocks: a shape for each block, in model order.
            outputs: weights of output projections, [out, kept] in the order of the kept columns, by name of the site;
                what is not named keeps its dense columns. A tensor that is the same object as last time is the same.
            merges: what parts that stay take in before they are cut.

        Raises:
            InvalidInput: a shape that its block cannot have, or a tensor of another size.
        """
        self._cut(blocks, outputs, [None] * len(self._blocks), merges)

    @contextmanager
    def chosen(self, blocks: Sequence[BlockShape], additions: Mapping[str, Tensor | None]) -> Iterator[None]:
        """Inside, the model is cut to somebody's choice of units, whose weights stay as they are; cut it stays.

        Args:
            blocks: as in `apply`.
            additions: [out] each, added to what the output matrix of this name gives; None adds nothing.
        """
        self.apply(blocks, {})
        with ExitStack() as stack:
            for name, added in additions.items():
                if added is not None:
                    hook = partial(_more, added)
                    stack.callback(self._model.get_submodule(name).register_forward_hook(hook).remove)
            yield

    def merged(self, block: int, part: PartName, sources: Sources) -> dict[str, Tensor]:
        """Weights, [out, in], and biases of a part that has taken in those of other blocks, by full name."""
        key = block, part, sources
        if key not in self._merged:
            self._merged[key] = merged_part([other.parts[part].dense() for other in self._blocks], block, sources)
            while len(self._merged) > 1 and sum(map(_bytes, self._merged.values())) > MAX_MERGED_BYTES:
                del self._merged[next(iter(self._merged))]
        return self._merged[key]

    def masked(self, blocks: Sequence[BlockShape], outputs: Mapping[str, Tensor] | None = None) -> None:
        """Say the same with zeros: every module there and as large as it was; arguments as in `apply`."""
        widths = [block.units.widths for block in self._blocks]
        self._cut(blocks, outputs, [_Place(*place) for place in zip(widths, blocks, strict=False)])

    def padded(
        self,
        blocks: Sequence[BlockShape],
        widths: Sequence[BlockWidths],
        outputs: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Say the same with zeros in blocks of other widths, where the units that stay come first.

        Args:
            blocks, outputs: as in `apply`.
            widths: of each block, no smaller than what stays of it.
        """
        firsts = [
            width.first(len(shape.groups), shape.heads_per_group, len(shape.neurons))
            for shape, width in zip(blocks, widths, strict=True)
        ]
        self._cut(blocks, outputs, [_Place(*place) for place in zip(widths, firsts, strict=True)])

    def restore(self) -> None:
        """Put every parameter and module back: the objects that were there, not copies."""
        for block in self._blocks:
            block.restore()

    @torch.no_grad()
    def _cut(
        self,
        blocks: Sequence[BlockShape],
        outputs: Mapping[str, Tensor] | None,
        places: Iterable[_Place | None],
        merges: Merges = NO_MERGES,
    ) -> None:
        if len(blocks) != len(self._blocks):
            raise InvalidInput(f"the shape has {len(blocks)} blocks, the model {len(self._blocks)}")
        for index, (block, shape, place) in enumerate(zip(self._blocks, blocks, places, strict=True)):
            given = {part: self.merged(index, part, merges[index, part]) for part in PARTS if (index, part) in merges}
            block.cut(shape, outputs or {}, place, given)


class _Block:
    """One block, what was cut from it last, and how it was."""

    def __init__(self, model: nn.Module, units: BlockUnits) -> None:
        self.units = units
        attention, mlp = units.attention, units.mlp
        module = model.get_submodule(attention.name)
        self._model, self._config = model, getattr(module, "config", None)
        self._attention = Part(
            model,
            attention.inputs,
            attention.output,
            [(module, name) for name in _OF_HEADS],
            {attention.name: DroppedAttention(int(module.layer_idx))},  # type: ignore[arg-type]
        )
        self._mlp = Part(model, mlp.inputs, mlp.output, [], _dropped_mlp(units))
        self.parts: dict[PartName, Part] = {"attention": self._attention, "mlp": self._mlp}
        paths = units.gone_norms(BlockShape((), (), ()))
        # Those inside the attention or the MLP go when it goes.
        parts = tuple(f"{part.name}." for part in (attention, mlp) if part.name != units.name)
        own = [path for path in paths if not path.startswith(parts)]
        self._norms = {path: model.get_submodule(path) for path in own}
        self._gone: tuple[str, ...] = ()
        # What the parts were cut to last; None is whole.
        self._attention_is: Any = None
        self._mlp_is: Any = None

    def restore(self) -> None:
        self._attention.restore()
        self._mlp.restore()
        self._attention_is = self._mlp_is = None
        self._let_go(())

    def cut(
        self,
        shape: BlockShape,
        outputs: Mapping[str, Tensor],
        place: _Place | None,
        merged: Mapping[PartName, Mapping[str, Tensor]],
    ) -> None:
        attention, mlp = self.units.attention, self.units.mlp
        attention_output, mlp_output = outputs.get(attention.output.site.name), outputs.get(mlp.output.site.name)
        heads = _Wanted((shape.groups, shape.heads), attention_output, place, merged.get("attention"))
        neurons = _Wanted((shape.neurons,), mlp_output, place, merged.get("mlp"))
        if heads.differs(self._attention_is) or neurons.differs(self._mlp_is):
            shape.check(self.units.block, self.units.widths)
        if heads.differs(self._attention_is):
            self._attention_is = None
            if not shape.groups and place is None:
                self._attention.drop()
            else:
                config = copy(self._config)
                _cut_attention(self._attention, attention, config, shape, heads)
            self._attention_is = heads
        if neurons.differs(self._mlp_is):
            self._mlp_is = None
            if not shape.neurons and place is None:
                self._mlp.drop()
            else:
                _cut_mlp(self._mlp, mlp, shape, neurons)
            self._mlp_is = neurons
        self._let_go(self.units.gone_norms(shape) if place is None else ())

    def _let_go(self, norms: tuple[str, ...]) -> None:
        """Take away these norms, and bring the others back."""
        if norms != self._gone:
            for path, norm in self._norms.items():
                put_module(self._model, path, nn.Identity() if path in norms else norm)
            self._gone = norms


@dataclass(frozen=True, slots=True, eq=False)
class _Wanted:
    """What a part shall be.

    Attributes:
        kept: the indices that stay.
        output: what its kept columns are; None is the dense ones.
        place: where they go.
        given: what is cut; None is the dense matrices.
    """

    kept: tuple[tuple[int, ...], ...]
    output: Tensor | None
    place: _Place | None
    given: Mapping[str, Tensor] | None

    def differs(self, other: _Wanted | None) -> bool:
        """Whether a part that is `other` has to be cut anew."""
        return other is None or (
            self.output is not other.output
            or self.given is not other.given
            or self.kept != other.kept
            or self.place != other.place
        )

    @property
    def dense(self) -> bool:
        """Whether nothing is put in place of what the part has."""
        return self.output is None and self.place is None and self.given is None


def _more(added: Tensor, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output + added.to(output.device, output.dtype)


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _dropped_mlp(units: BlockUnits) -> dict[str, nn.Module]:
    mlp = units.mlp
    if mlp.name != units.name:
        return {mlp.name: DroppedMlp()}
    # Its layers lie in the block, which calls them one by one: the last has the say.
    return {bound.site.name: nn.Identity() for bound in mlp.inputs} | {mlp.output.site.name: DroppedMlp()}


def _cut_attention(part: Part, units: AttentionUnits, config: Any, shape: BlockShape, wanted: _Wanted) -> None:
    groups, heads, place = len(shape.groups), len(shape.heads), wanted.place
    rows, columns = units.rows(shape.groups, shape.heads), units.columns(shape.heads)
    if place is None:
        spans, across = [Span(kept) for kept in rows], Span(columns)
    else:
        groups, heads = place.widths.groups, place.widths.heads
        roomy = replace(units, groups=groups, heads=heads)
        sizes = roomy.rows(range(groups), range(heads))
        at = roomy.rows(place.shape.groups, place.shape.heads)
        spans = [Span(*span) for span in zip(rows, at, map(len, sizes), strict=True)]
        across = Span(columns, roomy.columns(place.shape.heads), heads * units.head_dim)
    if (groups, heads) == (units.groups, units.heads) and wanted.dense:
        part.restore()
        return
    if config is not None:
        config.num_attention_heads, config.num_key_value_heads = heads, groups
    values = (heads, heads, groups, groups, heads // groups, heads * units.head_dim, config)
    part.cut(spans, across, wanted.output, dict(zip(_OF_HEADS, values, strict=True)), wanted.given)


def _cut_mlp(part: Part, units: MlpUnits, shape: BlockShape, wanted: _Wanted) -> None:
    rows, place = units.rows(shape.neurons), wanted.place
    if place is None:
        if len(shape.neurons) == units.neurons and wanted.dense:
            part.restore()
            return
        part.cut([Span(kept) for kept in rows], Span(shape.neurons), wanted.output, {}, wanted.given)
        return
    roomy = replace(units, neurons=place.widths.neurons)
    sizes, at = roomy.rows(range(roomy.neurons)), roomy.rows(place.shape.neurons)
    spans = [Span(*span) for span in zip(rows, at, map(len, sizes), strict=True)]
    part.cut(spans, Span(shape.neurons, place.shape.neurons, roomy.neurons), wanted.output, {}, wanted.given)
