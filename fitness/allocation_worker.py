"""What runs in a worker process of an allocation search."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from functools import cached_property
from typing import Any

from evoprune.fitness.allocating import allocate_model, ask_allocator, describe_model
from evoprune.fitness.allocators import ALLOCATORS, Use
from evoprune.fitness.compressors import stores_weights
from evoprune.fitness.context import EvaluationContext
from evoprune.fitness.latency import part_latencies, whole_latencies
from evoprune.fitness.level_evaluator import LevelEvaluator
from evoprune.fitness.levels import LevelDatabase, build_levels, criterion_key
from evoprune.fitness.model_worker import Handler, ModelWorker, criterion_from, heldout_answer
from evoprune.fitness.parcels import deliver
from evoprune.fitness.prepare import Prepared, calibration_windows
from evoprune.fitness.resident_levels import Levels
from evoprune.fitness.samples import Sequences
from evoprune.fitness.site_statistics import reading
from evoprune.fitness.stored_levels import StoredLevels, build_stored_levels
from evoprune.fitness.teacher import window_losses
from evoprune.metrics.errors import InvalidCandidate, InvalidInput

LOSS_WINDOWS = 8
"""Windows of text B on which an allocator that tries things out compares losses."""

MAX_PREFIX_BYTES = 1 << 30
"""What the parent's remembered hidden states may take in one worker."""

WORTHWHILE = 6
"""Candidates of a worker on one text that save more than the pass of their parent costs."""

# Restore the dense model and compare its checksum once in so many evaluations.
_CHECK_EVERY = 200


def build(context: dict[str, Any]) -> AllocationWorker:
    """The factory that executors call, with `EvaluationContext.to_json` as its argument."""
    return AllocationWorker(EvaluationContext.from_json(context))


class AllocationWorker(ModelWorker):
    """Answers jobs about levels: sparsities in steps of 1/256, one per site, in model order.

    Jobs (kind and payload):
        database: ``prepared``, ``criterion``, ``compressor``, ``grid`` (the levels that are stored, where they are
            weights of their own); returns the name of the level ``database``.
        allocate: ``prepared``, ``criterion``, ``allocator``, ``target``, ``repaired`` (brought to the target, or as
            they are asked for); returns ``sparsities``, one per site.
        describe: ``prepared``, ``criterion``, ``terminals``, ``target``; returns ``statistics``, one number per site
            for each terminal, and ``faults``, why others are not known.
        levels: what ``database`` was given and its name, ``levels``, ``parent`` (levels too), ``first``, ``last``;
            returns ``kl`` and ``nll`` on these windows of text B, and the standard error of the first.
        heldout: what ``database`` was given and its name, ``levels`` (None: the dense model); returns losses on text
            C, by window.
        latency: ``parts`` (places of the sites of each), ``window``; returns nanoseconds, of every one of the ``parts``
            and of the ``rest``. Like the next one a measurement, which the job alone does not determine.
        whole-latency: ``absent`` (for each measurement the parts that are gone, as the places of their sites),
            ``window``; returns ``nanoseconds``, of each.
    """

    def __init__(self, context: EvaluationContext) -> None:
        super().__init__(context)
        self._evaluator: tuple[str, str, LevelEvaluator] | None = None
        self._text: tuple[list[int], int, int] | None = None
        self._adopted = False
        self._candidates: Counter[int] = Counter()
        self._expected = 0
        self._evaluations = 0

    @property
    def jobs(self) -> Mapping[str, Handler]:
        return {
            **super().jobs,
            "database": self._database,
            "allocate": self._allocate,
            "describe": self._describe,
            "levels": self._levels,
            "heldout": self._heldout,
            "latency": self._latency,
            "whole-latency": self._whole_latency,
        }

    def _allocate(self, payload: dict[str, Any]) -> dict[str, Any]:
        self._restore()
        prepared = self.prepared(payload["prepared"])
        allocator = ALLOCATORS[payload["allocator"]]
        given = {
            "criterion": criterion_from(payload["criterion"]),
            "statistics": prepared.statistics(),
            **self._texts(prepared, allocator.uses),
        }
        if not payload["repaired"]:
            return {"sparsities": ask_allocator(self.language_model, allocator, payload["target"], **given)}
        allocation = allocate_model(self.language_model, payload["allocator"], allocator, payload["target"], **given)
        return {"sparsities": [site.sparsity for site in allocation.sites]}

    def _describe(self, payload: dict[str, Any]) -> dict[str, Any]:
        self._restore()
        prepared = self.prepared(payload["prepared"])
        found = describe_model(
            self.language_model,
            payload["terminals"],
            payload["target"],
            criterion=criterion_from(payload["criterion"]),
            statistics=prepared.statistics(),
            **self._texts(prepared, reading(payload["terminals"]).uses),
        )
        return {
            "statistics": {name: list(values) for name, values in found.values.items()},
            "faults": dict(found.faults),
        }

    def _texts(self, prepared: Prepared, uses: Set[Use]) -> dict[str, Any]:
        """The texts that these uses need, as `allocate_model` takes them."""
        return {
            "calibration": self._calibration if uses & {"outputs", "hidden"} else None,
            "search": prepared.text("search")[0][:LOSS_WINDOWS] if "loss" in uses else None,
        }

    @cached_property
    def _calibration(self) -> Sequences:
        """Text A, which takes its time to be found and cut into tokens."""
        return calibration_windows(self.language_model, self.context)

    def _prepare(self, payload: dict[str, Any]) -> dict[str, Any]:
        self._restore()
        return super()._prepare(payload)

    def _database(self, payload: dict[str, Any]) -> dict[str, Any]:
        prepared, criterion = self.prepared(payload["prepared"]), criterion_from(payload["criterion"])
        key = criterion_key(payload["criterion"], criterion, prepared)
        compressor, device = payload["compressor"], self.language_model.device
        database: Levels
        try:
            if stores_weights(compressor):
                database = build_stored_levels(prepared, compressor, payload["grid"], criterion, key, device=device)
            else:
                database = build_levels(prepared, criterion, key, device=device)
        except InvalidCandidate as error:
            raise InvalidInput(f"this metric cannot rank the model's weights: {error}") from None
        deliver(database.name)
        return {"database": database.name}

    def _levels(self, payload: dict[str, Any]) -> dict[str, Any]:
        evaluator = self.evaluator(payload)
        self._evaluations += 1
        if self._evaluations % _CHECK_EVERY == 0:
            evaluator.restore()
        parent, first, last = payload["parent"], payload["first"], payload["last"]
        adopting = self._adopts(payload["levels"], parent, first, last)
        if adopting:
            # Text before this one is drawn no more, so what is remembered of it would only take the room.
            evaluator.prefix.clear()
            self._adopted = True
        if adopting and payload["levels"] == parent:
            losses = evaluator.adopt(self._by_name(parent), first, last)
        else:
            if adopting:
                with suppress(InvalidCandidate):
                    evaluator.adopt(self._by_name(parent), first, last)
            losses = evaluator.evaluate(self._by_name(payload["levels"]), first, last)
        assert losses.kl is not None
        spread = (losses.kl.std() / len(losses.kl) ** 0.5).item() if len(losses.kl) > 1 else 0.0
        return {"kl": losses.kl.mean().item(), "nll": losses.nll.mean().item(), "stderr": spread}

    def _adopts(self, levels: list[int], parent: list[int], first: int, last: int) -> bool:
        """Whether the parent's own pass over this text is to be remembered now.

        It is where the parent itself is asked about. Else it costs a pass, which candidates have to save: so the first
        one on a text runs in full, and the second begins with it if the last text of this length had enough of them.
        """
        windows, text = last - first, (parent, first, last)
        if text == self._text:
            self._candidates[windows] += 1
            second = self._candidates[windows] == 2
            return not self._adopted and (levels == parent or (second and self._expected >= WORTHWHILE))
        self._expected = self._candidates.get(windows, WORTHWHILE)
        self._text, self._adopted, self._candidates[windows] = text, False, 1
        return levels == parent

    def _heldout(self, payload: dict[str, Any]) -> dict[str, Any]:
        evaluator = self.evaluator(payload)
        windows, teacher = self.prepared(payload["prepared"]).text("heldout")
        if payload["levels"] is None:
            evaluator.restore()
        else:
            evaluator.apply(self._by_name(payload["levels"]))
        return heldout_answer(window_losses(self.language_model.model, evaluator.head, windows, teacher), windows)

    def _latency(self, payload: dict[str, Any]) -> dict[str, Any]:
        self._restore()
        rest, parts = part_latencies(self.language_model, payload["parts"], payload["window"])
        return {"rest": rest, "parts": parts}

    def _whole_latency(self, payload: dict[str, Any]) -> dict[str, Any]:
        self._restore()
        return {"nanoseconds": whole_latencies(self.language_model, payload["absent"], payload["window"])}

    def _by_name(self, levels: Sequence[int]) -> dict[str, int]:
        sites = (bound.site.name for bound in self.language_model.sites)
        return dict(zip(sites, levels, strict=True))

    def evaluator(self, payload: Mapping[str, Any]) -> LevelEvaluator:
        """The resident model with the prepared set and the database of a job; kept until it names others."""
        named = payload["prepared"], payload["database"]
        if self._evaluator is None or self._evaluator[:2] != named:
            self._restore()
            prepared = self.prepared(payload["prepared"])
            key = criterion_key(payload["criterion"], criterion_from(payload["criterion"]), prepared)
            name, compressor = payload["database"], payload["compressor"]
            database: Levels
            if stores_weights(compressor):
                database = StoredLevels.open(name, prepared, compressor, payload["grid"], key)
            else:
                database = LevelDatabase.open(name, prepared, key)
            windows, teacher = prepared.text("search")
            evaluator = LevelEvaluator(
                self.language_model, prepared.dense, database, windows, teacher, max_prefix_bytes=MAX_PREFIX_BYTES
            )
            self._evaluator = (*named, evaluator)
        return self._evaluator[2]

    def _restore(self) -> None:
        """Make the model dense, for whoever reads its weights."""
        if self._evaluator is not None:
            self._evaluator[2].restore()
