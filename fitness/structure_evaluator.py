"""Score shapes with one resident model: candidates are cut, so that what they lose is not computed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache

from torch import Tensor, nn

from evoprune.fitness.models import LanguageModel
from evoprune.fitness.path_refit import path_refits
from evoprune.fitness.resident_evaluator import ResidentEvaluator
from evoprune.fitness.samples import Sequences
from evoprune.fitness.short_training import Training, TrainingText, trained
from evoprune.fitness.structure_database import PartName, StructureDatabase
from evoprune.fitness.structure_weights import refitted_outputs
from evoprune.fitness.surgeon import Surgeon
from evoprune.fitness.teacher import Teacher
from evoprune.fitness.unit_costs import Kept
from evoprune.fitness.units import BlockUnits
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.shape import BlockShape

SHAPES = 512
"""Shapes of blocks that are remembered."""

MAX_SOLVED_BYTES = 1 << 30
"""What refitted output matrices may take that were used before, in one worker."""


class StructureEvaluator(ResidentEvaluator[Sequence[Kept], tuple[Kept, ...]]):
    """A dense model that shapes are tried on: how many units every block keeps; the database says which, and refits.

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
        self._solved: OrderedDict[tuple[int, str, tuple[int, ...]], Tensor] = OrderedDict()
        self._solved_bytes = 0

    def complete(self, given: Sequence[Kept]) -> tuple[Kept, ...]:
        whole = tuple((int(groups), int(heads), int(neurons)) for groups, heads, neurons in given)
        if len(whole) != len(self._units):
            raise InvalidInput(f"a shape of {len(whole)} blocks for a model of {len(self._units)}")
        for block, (kept, units) in enumerate(zip(whole, self._units, strict=True)):
            widths = units.widths
            most = (widths.groups, widths.heads_per_group, widths.neurons)
            if not all(0 <= count <= limit for count, limit in zip(kept, most, strict=True)):
                raise InvalidInput(f"block {block} cannot keep {kept} of {most} groups, heads in each and neurons")
        return whole

    def shape(self, given: Sequence[Kept]) -> tuple[BlockShape, ...]:
        """Which units stay, where so many do."""
        return tuple(self._kept(block, *kept) for block, kept in enumerate(self.complete(given)))

    def apply(self, given: Sequence[Kept]) -> None:
        shape = self.shape(given)
        self._surgeon.apply(shape, refitted_outputs(self._units, shape, self._output))

    def apply_path_refit(self, given: Sequence[Kept], calibration: Sequences) -> None:
        """`apply`, with each output solved for on what the candidate itself gives it, and not by the database.

        Args:
            given: the candidate.
            calibration: text A.

        Raises:
            InvalidInput: see `complete`, or a Gram matrix cannot be inverted even damped.
        """
        shape = self.shape(given)
        self.restore()
        refits = path_refits(self.language_model, self._units, calibration, shape)
        dtype = self.language_model.model.dtype
        self._surgeon.apply(
            shape, refitted_outputs(self._units, shape, lambda block, part, kept: refits[block][part].to(dtype))
        )

    @contextmanager
    def trained(self, given: Sequence[Kept], training: Training, text: TrainingText) -> Iterator[None]:
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

    @contextmanager
    def cut(self, shape: Sequence[BlockShape], additions: Mapping[str, Tensor | None]) -> Iterator[None]:
        """Inside, the model is cut to somebody else's choice of units, whose weights stay as they are.

        Args:
            shape: what every block keeps.
            additions: [out] each, added to what the output matrix of this name gives; None adds nothing.
        """
        self._surgeon.apply(shape, {})
        with ExitStack() as stack:
            for name, added in additions.items():
                if added is not None:
                    stack.enter_context(_adding(self.language_model.model.get_submodule(name), added))
            yield

    def restore(self) -> None:
        self._surgeon.restore()

    def differing(self, one: tuple[Kept, ...], other: tuple[Kept, ...]) -> int | None:
        return next((block for block, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)

    def _read(self, block: int, groups: int, heads: int, neurons: int) -> BlockShape:
        return BlockShape(*self._database.kept_heads(block, groups, heads), self._database.kept_neurons(block, neurons))

    def _output(self, block: int, part: PartName, kept: BlockShape) -> Tensor:
        """The refitted output matrix, kept in the model's dtype for the next candidate that asks for it."""
        key = block, part, kept.heads if part == "attention" else (len(kept.neurons),)
        if key in self._solved:
            self._solved.move_to_end(key)
            return self._solved[key]
        model = self.language_model
        found = self._database.output(block, part, kept, model.device).to(model.model.dtype)
        self._solved[key] = found
        self._solved_bytes += found.nbytes
        while self._solved_bytes > MAX_SOLVED_BYTES and len(self._solved) > 1:
            self._solved_bytes -= self._solved.popitem(last=False)[1].nbytes
        return found


@contextmanager
def _adding(module: nn.Module, added: Tensor) -> Iterator[None]:
    """Inside, `module` gives [out] more."""

    def more(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + added.to(output.device, output.dtype)

    handle = module.register_forward_hook(more)
    try:
        yield
    finally:
        handle.remove()
