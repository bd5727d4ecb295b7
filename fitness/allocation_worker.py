"""What runs in a worker process of an allocation search."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from evoprune.fitness.allocating import describe_model
from evoprune.fitness.allocator_worker import AllocatorWorker
from evoprune.fitness.candidate_worker import MAX_PREFIX_BYTES
from evoprune.fitness.compressors import stores_weights
from evoprune.fitness.context import EvaluationContext
from evoprune.fitness.latency import part_latencies, whole_latencies
from evoprune.fitness.level_evaluator import LevelEvaluator
from evoprune.fitness.levels import LevelDatabase, build_levels, criterion_key
from evoprune.fitness.model_worker import Handler, criterion_from
from evoprune.fitness.parcels import deliver
from evoprune.fitness.pruning import check_rule
from evoprune.fitness.resident_levels import Levels
from evoprune.fitness.site_statistics import reading
from evoprune.fitness.stored_levels import StoredLevels, build_stored_levels
from evoprune.metrics.errors import InvalidCandidate, InvalidInput


def build(context: dict[str, Any]) -> AllocationWorker:
    """The factory that executors call, with `EvaluationContext.to_json` as its argument."""
    return AllocationWorker(EvaluationContext.from_json(context))


class AllocationWorker(AllocatorWorker[LevelEvaluator]):
    """Answers jobs about levels: sparsities in steps of 1/256, one per site, in model order.

    Jobs (kind and payload):
        prepare: ``compressor``, if its levels will be stored: matrices that it cannot have are refused before anything
            is collected.
        database: ``prepared``, ``criterion``, ``compressor``, ``grid`` (the levels that are stored, where they are
            weights of their own); returns the name of the level ``database``, and the ``seconds`` that it took, few if
            it was there.
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

    @property
    def jobs(self) -> Mapping[str, Handler]:
        return {
            **super().jobs,
            "database": self._database,
            "describe": self._describe,
            "levels": self._levels,
            "heldout": self._heldout,
            "replayed": self._replayed,
            "latency": self._latency,
            "whole-latency": self._whole_latency,
        }

    def _prepare(self, payload: dict[str, Any]) -> dict[str, Any]:
        if "compressor" in payload:
            check_rule(self.language_model, self.context.rule, payload["compressor"])
        return super()._prepare(payload)

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

    def _database(self, payload: dict[str, Any]) -> dict[str, Any]:
        prepared, criterion = self.prepared(payload["prepared"]), criterion_from(payload["criterion"])
        key = criterion_key(payload["criterion"], criterion, prepared)
        compressor, device = payload["compressor"], self.language_model.device
        database: Levels
        began = time.perf_counter()
        try:
            if stores_weights(compressor):
                database = build_stored_levels(prepared, compressor, payload["grid"], criterion, key, device=device)
            else:
                database = build_levels(prepared, criterion, key, device=device)
        except InvalidCandidate as error:
            raise InvalidInput(f"this metric cannot rank the model's weights: {error}") from None
        seconds = time.perf_counter() - began
        deliver(database.name)
        return {"database": database.name, "seconds": seconds}

    def _levels(self, payload: dict[str, Any]) -> dict[str, Any]:
        return self._measured(payload, payload["levels"])

    def _heldout(self, payload: dict[str, Any]) -> dict[str, Any]:
        return self._heldout_of(payload, payload["levels"])

    def _latency(self, payload: dict[str, Any]) -> dict[str, Any]:
        self._restore()
        rest, parts = part_latencies(self.language_model, payload["parts"], payload["window"])
        return {"rest": rest, "parts": parts}

    def _whole_latency(self, payload: dict[str, Any]) -> dict[str, Any]:
        self._restore()
        return {"nanoseconds": whole_latencies(self.language_model, payload["absent"], payload["window"])}

    def candidate(self, spelled: Sequence[int]) -> dict[str, int]:
        sites = (bound.site.name for bound in self.language_model.sites)
        return dict(zip(sites, spelled, strict=True))

    def evaluator(self, payload: Mapping[str, Any]) -> LevelEvaluator:
        named = payload["prepared"], payload["database"]
        if self._kept is None or self._kept[0] != named:
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
            self._kept = named, evaluator
        return self._kept[1]
