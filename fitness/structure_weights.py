"""How a shape says that its output matrices are refitted, so that anybody can do it again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from torch import Tensor

from evoprune.fitness.dense_stream import CORRECTION
from evoprune.fitness.examples import read_side
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.part_merges import (
    Merged,
    Merges,
    merges_of,
    merging_from_json,
    merging_to_json,
)
from evoprune.fitness.samples import Sequences
from evoprune.fitness.structure_database import Mode
from evoprune.fitness.units import BlockUnits, PartName
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.shape import BlockShape, BlockWidths, Shape
from evoprune.metrics.shape_file import from_rows, to_rows

Method = Literal["database", "path-refit"]
METHODS: tuple[str, ...] = get_args(Method)

_MOST_THREADS = 1024
MERGED = "database+merges"
"""Method of a shape some of whose parts are merged into others before the database refits what is left of those."""


@dataclass(frozen=True)
class RefitRecipe:
    """What the output matrices of a shape were refitted with.

    Attributes:
        method: by the structure database, or `evoprune.fitness.path_refit` of this very shape. Of merged parts too it
            is the database; `with_merges` says what is merged.
        accumulation: mode of the build of the database, which a path refit has no need of.
        correction: along a path, and of a path refit of this shape whoever asks for it: how much of what they can make
            up for outputs do; see `evoprune.fitness.dense_stream`.
        text: source of text A; `sequences` windows of `window` tokens of it, drawn by `seed`.
        threads: of torch.
        path: what is kept of each block, with the mode ``path`` and with no other.
    """

    method: Method
    accumulation: Mode
    text: str
    sequences: int
    window: int
    seed: int
    threads: int
    path: tuple[BlockShape, ...] | None = None
    correction: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """What `read` reads, as ``weights`` of a shape."""
        return {
            "method": self.method,
            "accumulation": self.accumulation,
            "calibration": {"text": self.text, "sequences": self.sequences, "window": self.window},
            "seed": self.seed,
            "threads": self.threads,
            **({} if self.path is None else {"path": to_rows(self.path)}),
            "correction": self.correction,
        }

    @classmethod
    def read(cls, weights: Mapping[str, Any], widths: Sequence[BlockWidths]) -> RefitRecipe:
        """The recipe in a shape.

        Args:
            weights: of the shape.
            widths: what the dense blocks have.

        Raises:
            InvalidInput: it says something else than it should.
        """
        said = weights["method"]
        method: Any = "database" if said == MERGED else said
        if method not in METHODS:
            raise InvalidInput(
                f"the shape makes its output projections by {said[:40]!r}, which this version does not know"
            )
        calibration = weights.get("calibration")
        mode: Any = weights.get("accumulation")
        text = calibration.get("text") if isinstance(calibration, dict) else None
        if mode not in get_args(Mode) or not isinstance(calibration, dict) or not isinstance(text, str):
            raise InvalidInput("the shape's 'weights' do not say what they were refitted with: search it again")
        given = {**calibration, **weights}
        sequences, window, seed, threads = (
            _whole_number(given, name) for name in ("sequences", "window", "seed", "threads")
        )
        correction = weights.get("correction", 0.0)
        if isinstance(correction, bool) or not isinstance(correction, (int, float)) or not 0 <= correction <= 1:
            raise InvalidInput(
                f"the shape's 'weights' have correction {str(correction)[:40]!r}: give a number from 0 to 1"
            )
        path = None
        if mode == "path":
            try:
                path = from_rows(weights.get("path"), widths)
            except InvalidInput as error:
                raise InvalidInput(f"the 'path' in the shape's 'weights': {error}") from None
        return cls(method, mode, text, sequences, window, seed, threads, path, correction)

    def windows(self, language_model: LanguageModel) -> Sequences:
        """Text A.

        Raises:
            InvalidInput: the text is too short, or nowhere.
        """
        return read_side(language_model, self.text, "A", window=self.window, count=self.sequences, seed=self.seed)


def path_refit_recipe(
    text: str, sequences: int, window: int, seed: int, threads: int, correction: float = CORRECTION
) -> RefitRecipe:
    """The recipe of a path refit on a text A; arguments as of `RefitRecipe`."""
    return RefitRecipe("path-refit", "dense", text, sequences, window, seed, threads, correction=correction)


def text_of(shape: Shape) -> str | None:
    """Where text A lies that the output matrices of a shape were refitted with; None if they were not."""
    calibration = shape.weights.get("calibration")
    text = calibration.get("text") if isinstance(calibration, dict) else None
    return text if isinstance(text, str) else None


def with_text(shape: Shape, text: str) -> Shape:
    """The same shape, whose text A lies elsewhere."""
    return replace(shape, weights={**shape.weights, "calibration": {**shape.weights["calibration"], "text": text}})


def with_merges(weights: Mapping[str, Any], merging: Sequence[Merged]) -> dict[str, Any]:
    """``weights`` of a shape some of whose parts are merged; as they are if none is."""
    merges = merging_to_json(merging)
    return {**weights, "method": MERGED, "merges": merges} if merges else dict(weights)


def merging_in(shape: Shape) -> list[Merged]:
    """Whether attention and MLP of every block are merged into those of one before.

    Raises:
        InvalidInput: the shape says what cannot be.
    """
    merges = shape.weights.get("merges") if shape.weights["method"] == MERGED else []
    return merging_from_json(merges, len(shape.blocks))


def merges_in(shape: Shape) -> Merges:
    """What the parts that stay take in; errors as of `merging_in`."""
    stays = [(bool(block.groups), bool(block.neurons)) for block in shape.blocks]
    return merges_of(stays, merging_in(shape))


def _whole_number(given: Mapping[str, Any], name: str) -> int:
    value = given.get(name)
    most = _MOST_THREADS if name == "threads" else 1 << 63
    if type(value) is not int or not (name != "seed") <= value < most:
        raise InvalidInput(f"the shape's 'weights' have {name} {str(value)[:40]!r}: give a whole number")
    return value


def refitted_outputs(
    units: Sequence[BlockUnits], shape: Sequence[BlockShape], solve: Callable[[int, PartName, BlockShape], Tensor]
) -> dict[str, Tensor]:
    """[out, kept] each, by name: the output matrices of parts that lose something and are not dropped.

    A part that stays whole keeps its dense matrix, of which a solution has the rounding.

    Args:
        units: of the dense model.
        shape: what every block keeps.
        solve: the output matrix of a part, given the index of its block.
    """
    found = {}
    for block, (here, kept) in enumerate(zip(units, shape, strict=True)):
        parts: tuple[tuple[PartName, int, int], ...] = (
            ("attention", len(kept.heads), here.widths.heads),
            ("mlp", len(kept.neurons), here.widths.neurons),
        )
        for part, left, whole in parts:
            if 0 < left < whole:
                found[getattr(here, part).output.site.name] = solve(block, part, kept)
    return found
