"""Score shapes with one resident model: candidates are cut, so that what they lose is not computed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache, partial

from torch import Tensor

from evoprune.fitness.models import LanguageModel
from evoprune.fitness.part_merges import Merges, Sources, merges_of, read_block
from evoprune.fitness.path_refit import path_refits
from evoprune.fitness.resident_evaluator import ResidentEvaluator
from evoprune.fitness.samples import Sequences
from evoprune.fitness.short_training import Training, TrainingText, trained
from evoprune.fitness.structure_database import StructureDatabase
from evoprune.fitness.structure_weights import refitted_outputs
from evoprune.fitness.surgeon import Surgeon
from evoprune.fitness.teacher import Teacher
from evoprune.fitness.units import PARTS, BlockUnits, PartName
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.shape import BlockShape

SHAPES = 512
"""Shapes of blocks that are remembered."""

MAX_SOLVED_BYTES = 1 << 30
"""What refitted output matrices may take that were used before, in one worker."""


Planned = tuple[int, int, int, Sources, Sources]
"""What becomes of a block: KV groups, query heads in each, neurons; whose attentions and whose MLPs it takes in."""


class StructureEvaluator(ResidentEvaluator[Sequence[Sequence[int]], tuple[Planned, ...]]):
    """A dense model that shapes are tried on: how many units every block keeps; the database says which, and refits.

    A block is given as [KV groups, query heads in each, neurons], as `spelled_block` has it.

    Args:
        language_model, windows, teacher, stride, max_prefix_bytes: see `ResidentEvaluator`.
        units: of this model.
        database: of the same model.

    Raises:
        InvalidInput: the database is of another model.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        units: Sequence[BlockUnits],
        database: StructureDatabase,
        windows: Sequences,
        teacher: Teacher | None,
        *,
        stride: int = 1,
        max_prefix_bytes: int | None = None,
    ) -> None:
        super().__init__(language_model, windows, teacher, stride=stride, max_prefix_bytes=max_prefix_bytes)
        self._units = list(units)
        self._database = database
        self._surgeon = Surgeon(language_model, self._units)
        # Children differ from their parent in a few blocks, and the database reads files.
        self._kept = lru_cache(SHAPES)(self._read)
        self._solved: OrderedDict[tuple[int, str, tuple[int, ...], Sources], Tensor] = OrderedDict()
        self._solved_bytes = 0

    def complete(self, given: Sequence[Sequence[int]]) -> tuple[Planned, ...]:
        read = [read_block(block) for block in given]
        whole = tuple(kept for kept, _ in read)
        if len(whole) != len(self._units):
            raise InvalidInput(f"a shape of {len(whole)} blocks for a model of {len(self._units)}")
        for block, (kept, units) in enumerate(zip(whole, self._units, strict=True)):
            widths = units.widths
            most = (widths.groups, widths.heads_per_group, widths.neurons)
            if not all(0 <= count <= limit for count, limit in zip(kept, most, strict=True)):
                raise InvalidInput(f"block {block} cannot keep {kept} of {most} groups, heads in each and neurons")
        stays = [(bool(groups), bool(neurons)) for groups, _, neurons in whole]
        merges = merges_of(stays, [merged for _, merged in read])
        return tuple(
            (*kept, merges.get((block, "attention"), ()), merges.get((block, "mlp"), ()))
            for block, kept in enumerate(whole)
        )

    def shape(self, given: Sequence[Sequence[int]]) -> tuple[BlockShape, ...]:
        """Which units stay, where so many do."""
        return tuple(self._kept(block, *planned[:3]) for block, planned in enumerate(self.complete(given)))

    def apply(self, given: Sequence[Sequence[int]]) -> None:
        shape = self.shape(given)
        merges: dict[tuple[int, PartName], Sources] = {}
        for block, (*_, attention, mlp) in enumerate(self.complete(given)):
            merges |= {(block, part): sources for part, sources in zip(PARTS, (attention, mlp), strict=True) if sources}
        outputs = refitted_outputs(self._units, shape, partial(self._output, merges))
        self._surgeon.apply(shape, outputs, merges)

    def apply_path_refit(self, given: Sequence[Sequence[int]], calibration: Sequences, correction: float) -> None:
        """`apply`, with each output solved for on what the candidate itself gives it, and not by the database.

        Args:
            given: the candidate, of which nothing is merged.
            calibration: text A.
            correction: as of `path_refits`.

        Raises:
            InvalidInput: see `complete`, something is merged, or a Gram matrix cannot be inverted even damped.
        """
        if any(attention or mlp for *_, attention, mlp in self.complete(given)):
            raise InvalidInput("what is merged has no path refit: give a shape whose parts stay or go")
        shape = self.shape(given)
        self.restore()
        refits = path_refits(self.language_model, self._units, calibration, shape, correction)
        dtype = self.language_model.model.dtype
        self._surgeon.apply(
            shape, refitted_outputs(self._units, shape, lambda block, part, kept: refits[block][part].to(dtype))
        )

    @contextmanager
    def trained(self, given: Sequence[Sequence[int]], training: Training, text: TrainingText) -> Iterator[None]:
        """Inside, the model is the candidate after a short training, with which it ends.

        Args:
            given: the candidate.
            training, text: see `evoprune.fitness.short_training.trained`.

        Raises:
            InvalidInput: see `complete`.
        """
        self.apply(given)
        with trained(self.language_model, self._units, self.head, training, text):
            yield

    def cut(self, shape: Sequence[BlockShape], additions: Mapping[str, Tensor | None]) -> AbstractContextManager[None]:
        """Inside, the model is cut to somebody else's choice of units; see `Surgeon.chosen`."""
        return self._surgeon.chosen(shape, additions)

    def restore(self) -> None:
        self._surgeon.restore()

    def differing(self, one: tuple[Planned, ...], other: tuple[Planned, ...]) -> int | None:
        return next((block for block, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)

    def _read(self, block: int, groups: int, heads: int, neurons: int) -> BlockShape:
        return BlockShape(*self._database.kept_heads(block, groups, heads), self._database.kept_neurons(block, neurons))

    def _output(self, merges: Merges, block: int, part: PartName, kept: BlockShape) -> Tensor:
        """The refitted output matrix, kept in the model's dtype for the next candidate that asks for it."""
        sources = merges.get((block, part), ())
        key = block, part, kept.heads if part == "attention" else (len(kept.neurons),), sources
        if key in self._solved:
            self._solved.move_to_end(key)
            return self._solved[key]
        model = self.language_model
        weight = None
        if sources:
            name = getattr(self._units[block], part).output.site.name
            weight = self._surgeon.merged(block, part, sources)[f"{name}.weight"]
        found = self._database.output(block, part, kept, model.device, weight).to(model.model.dtype)
        self._solved[key] = found
        self._solved_bytes += found.nbytes
        while self._solved_bytes > MAX_SOLVED_BYTES and len(self._solved) > 1:
            self._solved_bytes -= self._solved.popitem(last=False)[1].nbytes
        return found
