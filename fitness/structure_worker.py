"""What runs in a worker process of a structure search."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from evoprune.fitness.allocator_worker import AllocatorWorker
from evoprune.fitness.candidate_worker import MAX_PREFIX_BYTES
from evoprune.fitness.context import EvaluationContext
from evoprune.fitness.latency_measure import latency_table
from evoprune.fitness.latency_passes import Work, shape_latencies
from evoprune.fitness.latency_table import LatencyTable, place_of
from evoprune.fitness.methods import METHODS, Evidence
from evoprune.fitness.model_worker import Handler, heldout_answer
from evoprune.fitness.part_merges import read_block
from evoprune.fitness.prepare import calibration_windows
from evoprune.fitness.resident_evaluator import finite
from evoprune.fitness.samples import Sequences, n_tokens
from evoprune.fitness.short_training import Training, TrainingText, build_training_text
from evoprune.fitness.structure_build import build_structure_block, build_structure_database
from evoprune.fitness.structure_database import StructureDatabase
from evoprune.fitness.structure_evaluator import StructureEvaluator
from evoprune.fitness.teacher import linear_head, window_losses
from evoprune.fitness.unit_costs import kept_by
from evoprune.fitness.unit_worker import UnitWorker
from evoprune.fitness.units import PARTS
from evoprune.metrics.shape import BlockShape
from evoprune.metrics.shape_file import from_rows, to_rows


def build(context: dict[str, Any]) -> StructureWorker:
    """The factory that executors call, with `EvaluationContext.to_json` as its argument."""
    return StructureWorker(EvaluationContext.from_json(context))


class StructureWorker(AllocatorWorker[StructureEvaluator], UnitWorker):
    """Answers jobs about shapes: what every block keeps, as [KV groups, query heads in each, neurons], or is merged.

    Jobs (kind and payload), beside those of any `UnitWorker`:
        latency: ``batch``, ``sequence``, ``decode``, ``neurons`` to measure of each block, ``table`` (a document of
            another run's in place of that, or None); returns a `LatencyTable`.
        whole-latency: ``pass`` (a `Work`), ``shapes`` (None: the dense model); returns ``nanoseconds`` of each, end to
            end.
        database: ``prepared``, ``accumulation``, and for the mode ``path`` a ``path`` as `to_rows` spells it, with the
            ``correction`` of `build_structure_database`; returns the name of the structured ``database``.
        rebuilt: what ``database`` was given and its name, ``shape``, ``correction``; returns the name of a ``database``
            that is built around the units of this shape, and these as its ``path``.
        block: ``block``; builds this block of the database of dense accumulation, and returns its ``parcel``.
        method: ``method``, by its name, and the ``sparsity`` that it is asked for; returns what it ``kept``.
        errors: ``database``; returns output ``errors`` at every width, of the attention and the MLP of each block in
            turn.
        shape: what ``database`` was given and its name, ``shape``, ``parent`` (a shape too), ``first``, ``last``;
            returns ``kl`` and ``nll`` on these windows of text B, and the standard error of the first.
        training: a `Training`; returns how many ``tokens`` of text A a candidate is trained on.
        recovered: what ``database`` was given and its name, ``shape``, ``selection``: its ``method`` is ``path-refit``,
            with the ``correction`` of `path_refits`, or ``training-aware`` with ``training``, a `Training`; returns
            ``kl`` and ``nll`` of the candidate after it, by window of text B, and ``recovered``, the mean of the first.
        units: what ``database`` was given and its name, ``shape``; returns the units that stay of all ``blocks``.
        heldout: what ``database`` was given and its name, ``shape`` (None: the dense model) and maybe ``selection``, or
            what ``choose`` was given, for the model as that criterion leaves it; returns losses on text C, by window.
    """

    def __init__(self, context: EvaluationContext) -> None:
        super().__init__(context)
        self._trained_on: tuple[Training, TrainingText] | None = None

    @property
    def jobs(self) -> Mapping[str, Handler]:
        return {
            **super().jobs,
            "latency": self._latency,
            "whole-latency": self._whole_latency,
            "database": self._database,
            "rebuilt": self._rebuilt,
            "block": self._block,
            "method": self._method,
            "errors": self._errors,
            "shape": self._shape,
            "training": self._training,
            "recovered": self._recovered,
            "units": self._kept_units,
            "heldout": self._heldout,
        }

    @cached_property
    def _calibration(self) -> Sequences:
        """Text A."""
        return calibration_windows(self.language_model, self.context)

    def _latency(self, payload: dict[str, Any]) -> dict[str, Any]:
        self._restore()
        work = Work.of(self.language_model, payload["batch"], payload["sequence"], decode=payload["decode"])
        if payload["table"] is None:
            return latency_table(self.language_model, self._units, payload["neurons"], work).to_json()
        table = LatencyTable.from_json(payload["table"])
        table.check(place_of(self.language_model, work))
        return table.to_json()

    def _whole_latency(self, payload: dict[str, Any]) -> dict[str, Any]:
        self._restore()
        shapes = [self._first_units(spelled) for spelled in payload["shapes"]]
        times = shape_latencies(self.language_model, self._units, shapes, Work(**payload["pass"]))
        return {"nanoseconds": times}

    def _first_units(self, spelled: Sequence[Sequence[int]] | None) -> list[BlockShape]:
        """A shape of so many units, whichever, or of all."""
        widths = [block.widths for block in self._units]
        if spelled is None:
            return [width.whole for width in widths]
        return [width.first(*read_block(block)[0]) for width, block in zip(widths, spelled, strict=True)]

    def _database(self, payload: dict[str, Any]) -> dict[str, Any]:
        self._restore()
        rows = payload.get("path")
        path = None if rows is None else from_rows(rows, [block.widths for block in self._units])
        database = build_structure_database(
            self.language_model,
            self._units,
            self._calibration,
            mode=payload["accumulation"],
            path=path,
            correction=0.0 if path is None else payload["correction"],
        )
        return {"database": database.name}

    def _rebuilt(self, payload: dict[str, Any]) -> dict[str, Any]:
        path = to_rows(self.evaluator(payload).shape(self.candidate(payload["shape"])))
        asked = {"accumulation": "path", "path": path, "correction": payload["correction"]}
        return {**self._database(asked), "path": path}

    def _block(self, payload: dict[str, Any]) -> dict[str, Any]:
        self._restore()
        block = payload["block"]
        return {"parcel": build_structure_block(self.language_model, self._units, self._calibration, block)}

    def _method(self, payload: dict[str, Any]) -> dict[str, Any]:
        self._restore()
        evidence = Evidence(self.language_model, self._units, self._calibration, payload["sparsity"])
        return {"kept": [list(kept_by(block)) for block in METHODS[payload["method"]].edit(evidence).blocks]}

    def _errors(self, payload: dict[str, Any]) -> dict[str, Any]:
        database = StructureDatabase.open(payload["database"], self.language_model, self._units)
        blocks = range(len(self._units))
        return {"errors": [database.errors(block, part).tolist() for block in blocks for part in PARTS]}

    def _shape(self, payload: dict[str, Any]) -> dict[str, Any]:
        return self._measured(payload, payload["shape"])

    def _training(self, payload: dict[str, Any]) -> dict[str, Any]:
        return {"tokens": n_tokens(self._training_text(Training.from_json(payload)).windows)}

    def _training_text(self, training: Training) -> TrainingText:
        """What candidates are trained on; kept until another is asked for."""
        if self._trained_on is None or self._trained_on[0] != training:
            self._restore()
            context, model = self.context, self.language_model
            head = linear_head(model.model, self._calibration)
            source = context.place(context.calibration)
            window, seed = context.calibration_window, context.seed
            self._trained_on = training, build_training_text(model, head, training, source, window=window, seed=seed)
        return self._trained_on[1]

    def _recovered(self, payload: dict[str, Any]) -> dict[str, Any]:
        evaluator = self.evaluator(payload)
        with self._selected(payload):
            model, head = self.language_model.model, evaluator.head
            losses = finite(window_losses(model, head, evaluator.windows, evaluator.teacher))
        assert losses.kl is not None
        return {"kl": losses.kl.tolist(), "nll": losses.nll.tolist(), "recovered": losses.kl.mean().item()}

    @contextmanager
    def _selected(self, payload: dict[str, Any]) -> Iterator[None]:
        """Inside, the model is a candidate as the last stage measures it."""
        evaluator, given = self.evaluator(payload), self.candidate(payload["shape"])
        selection = payload["selection"]
        if selection["method"] == "path-refit":
            evaluator.apply_path_refit(given, self._calibration, selection["correction"])
            yield
            return
        training = Training.from_json(selection["training"])
        text = self._training_text(training)
        with evaluator.trained(given, training, text):
            yield

    def _kept_units(self, payload: dict[str, Any]) -> dict[str, Any]:
        blocks = self.evaluator(payload).shape(self.candidate(payload["shape"]))
        return {"blocks": [[list(block.groups), list(block.heads), list(block.neurons)] for block in blocks]}

    def _heldout(self, payload: dict[str, Any]) -> dict[str, Any]:
        if payload.get("selection") is not None:
            windows, teacher = self.prepared(payload["prepared"]).text("heldout")
            evaluator = self.evaluator(payload)
            with self._selected(payload):
                losses = window_losses(self.language_model.model, evaluator.head, windows, teacher)
            return heldout_answer(losses, windows)
        if "criterion" not in payload:
            return self._heldout_of(payload, payload["shape"])
        evaluator = self.evaluator(payload)
        return self._heldout_of_choice(payload, evaluator.head, evaluator.cut)

    def candidate(self, spelled: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        return spelled

    def evaluator(self, payload: Mapping[str, Any]) -> StructureEvaluator:
        named = payload["prepared"], payload["database"]
        if self._kept is None or self._kept[0] != named:
            self._restore()
            windows, teacher = self.prepared(payload["prepared"]).text("search")
            evaluator = StructureEvaluator(
                self.language_model,
                self._units,
                StructureDatabase.open(payload["database"], self.language_model, self._units),
                windows,
                teacher,
                max_prefix_bytes=MAX_PREFIX_BYTES,
            )
            self._kept = named, evaluator
        return self._kept[1]
