"""What a metric search found: winner and baselines on held-out text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evoprune.fitness.objectives import OBJECTIVES
from evoprune.fitness.prepare import Summary
from evoprune.metrics.allocation import Allocation
from evoprune.metrics.criterion import CRITERIA, Metric
from evoprune.metrics.emit import latex
from evoprune.metrics.errors import EvopruneError, InvalidInput
from evoprune.metrics.exported import load_metric
from evoprune.metrics.expression import Expression
from evoprune.metrics.files import content_hash, write_atomically
from evoprune.search.calibration import calibration_facts
from evoprune.search.candidate import Candidate
from evoprune.search.config_metric import MetricSearchConfig
from evoprune.search.engine.executor import Job, Outcome
from evoprune.search.level_result import write_whole
from evoprune.search.metric_export import readme, winner_export
from evoprune.search.metric_search import MetricSearch
from evoprune.search.objective_words import objective_facts
from evoprune.search.replaying import replay_job, replayed_facts
from evoprune.search.result import failure, measured_facts, paired_difference, summary
from evoprune.search.rundir import RunDirectory

# Named criteria that every result is compared with, as far as their statistics are there.
BASELINES = ("random", "magnitude", "wanda", "ria", "gblm", "gblm-gradient", "pruner-zero")

# Whose masks the winner's are compared with, matrix by matrix.
_COMPARED_MASKS = ("wanda", "magnitude")


@dataclass(frozen=True)
class Finalist:
    """A candidate that was measured once more.

    Attributes:
        candidate: with its fitness.
        losses: in nats per token, by window of text B.
    """

    candidate: Candidate
    losses: Sequence[float]

    @property
    def loss(self) -> float:
        """Mean of `losses`."""
        return math.fsum(self.losses) / len(self.losses)

    def score(self, objective: str) -> float:
        """What the winner has the lowest of: loss, plus the fitness if that is a loss or a divergence too.

        The divergence from the dense model is the steadier number on little text, the loss is what a user sees; what
        is good in one of them by chance is seldom good in both.
        """
        return self.loss + (self.candidate.value if OBJECTIVES[objective].role == "quality" else 0.0)


def finalists(search: MetricSearch) -> list[Candidate]:
    """The best of the top rung whose fitness no baseline beats; without any, the best that there is.

    Raises:
        InvalidInput: no candidate has a fitness.
    """
    power = search.power if search.power is not None and len(search.power.rungs) == search.racing.rungs else None
    chosen = [*search.finalists, *([power] if power is not None and power not in search.finalists else [])]
    # The baselines run the whole ladder.
    fitness = [search.seed_fitness[name] for name in BASELINES if name in search.seed_fitness]
    best_baseline = min([*fitness, *([power.value] if power is not None else [])], default=math.inf)
    chosen = [member for member in chosen if member.value <= best_baseline]
    if not chosen and search.best is not None:
        chosen.append(search.best)
    if not chosen:
        raise InvalidInput("no candidate could be evaluated; `evoprune show` counts the reasons")
    return chosen


class MetricComparison:
    """The winner of a search beside the baselines.

    Args:
        config: of the run.
        identity: hash of everything that an evaluation depends on beside its candidate.
        prepared: what candidates share.
        search: at its end.
        finalists: one of them wins.
        allocation: what candidates were masked at; None if all matrices had the target's sparsity.

    Raises:
        EvopruneError: no finalist could be measured.
    """

    def __init__(
        self,
        config: MetricSearchConfig,
        identity: str,
        prepared: Summary,
        search: MetricSearch,
        finalists: Sequence[Finalist],
        allocation: Allocation | None = None,
    ) -> None:
        if not finalists:
            raise EvopruneError("no finalist could be measured; the event log says why")
        self._finalists = sorted(finalists, key=lambda it: (it.score(config.objective), it.candidate.birth))
        best = self._finalists[0].candidate
        self._config = config
        self._identity = identity
        self._prepared = prepared
        self._search = search
        self._best = best
        self._rule = config.target.rule
        self._allocation = allocation
        self._winner: Mapping[str, Any] = {}
        self._entrants: dict[str, dict[str, Any] | None] = {"dense": None, "winner": criterion_json(best.expression)}
        for name in BASELINES:
            if CRITERIA[name].needs <= config.terminals:
                self._entrants[name] = {"name": name}
        if search.power is not None:
            self._entrants["power"] = criterion_json(search.power.expression)

    def jobs(self) -> list[Job]:
        """What has to be measured: every entrant on held-out text, then the agreement of masks."""
        jobs = [
            self._job("heldout", criterion, {"prepared": self._prepared.name, "criterion": criterion})
            for criterion in self._entrants.values()
        ]
        winner = self._entrants["winner"]
        others = {name: {"name": name} for name in _COMPARED_MASKS if name in self._entrants}
        payload = {"prepared": self._prepared.name, "criterion": winner, "others": others}
        return [*jobs, self._job("agreement", winner, payload)]

    def replay(self) -> Job | None:
        """See `Replayable`."""
        criterion = criterion_json(self._best.expression)
        compressor, name = self._config.target.compressor, self._prepared.name
        return replay_job(self._identity, name, criterion, compressor, self._rule, self._allocation)

    def replayed(self, outcome: Outcome) -> dict[str, Any]:
        """See `Replayable`."""
        return replayed_facts(outcome, self._winner)

    def result(self, run_id: str, evaluations: int, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """The content of ``result.json``, from the outcomes of `jobs`.

        Raises:
            EvopruneError: the dense model or the winner could not be measured.
        """
        *measured, agreement = outcomes
        losses = {
            name: outcome.values
            for name, outcome in zip(self._entrants, measured, strict=True)
            if outcome.status == "ok"
        }
        for name, outcome in zip(self._entrants, measured, strict=True):
            if name in ("dense", "winner") and outcome.status != "ok":
                raise failure(outcome)
        config, search = self._config, self._search
        self._winner = losses["winner"]
        return {
            "run": run_id,
            "kind": "metric",
            "model": config.model.name,
            "target": str(self._rule),
            "group": self._rule.group,
            "allocation": None if self._allocation is None else described_allocation(self._allocation),
            "compressor": config.target.compressor,
            **objective_facts(config),
            "seed": config.seed,
            "evaluations": evaluations,
            "births": search.births,
            "distinct": search.distinct,
            "evolved_parents": search.evolved_parents,
            "origins": dict(sorted(search.origins.items())),
            "reasons": dict(sorted(search.reasons.items())),
            "rung_tokens": [windows * config.data.window for windows in config.racing.rungs],
            "rung_correlations": search.racing.correlations(),
            "window": config.data.window,
            "data": config.data.source,
            "calibration": calibration_facts(config.data),
            "dense": {"heldout": summary(losses["dense"])},
            "baselines": [
                self._baseline(name, values, losses["winner"])
                for name, values in losses.items()
                if name not in ("dense", "winner")
            ],
            "best": {**_described(self._best), "heldout": summary(losses["winner"])},
            "finalists": [
                {
                    "birth": it.candidate.birth,
                    "expression": it.candidate.expression.text,
                    "fitness": it.candidate.value,
                    "loss": it.loss,
                    "winner_minus_this": paired_difference({"nll": self._finalists[0].losses}, {"nll": it.losses}),
                }
                for it in self._finalists
            ],
            # A reconstruction error cannot be added to a loss.
            "final_score": "fitness plus loss" if OBJECTIVES[config.objective].role == "quality" else "loss",
            "final_tokens": len(self._finalists[0].losses) * config.data.window,
            "front": [_described(member) for member in search.archive.front],
            "classes": {
                name: None if member is None else _described(member)
                for name, member in search.archive.by_class().items()
            },
            "agreement": agreement.values.get("agreement", {}),
        }

    def export(self, run: RunDirectory, result: Mapping[str, Any]) -> None:
        """Write the winner's files into the run, beside the allocation that it was found at, and read them back.

        Raises:
            EvopruneError: a file does not give the winner back.
        """
        folder = run.path / "export"
        folder.mkdir(exist_ok=True)
        dtype = measured_facts(self._prepared.facts)["dtype"]
        export = winner_export(
            self._config, run.identity, result, self._best.expression, dtype=dtype, seconds=run.seconds
        )
        for suffix in ("json", "py", "tex"):
            export.write(folder / f"metric.{suffix}")
        write_atomically(folder / "README.md", readme(result, export))
        if self._allocation is not None:
            write_whole(self._allocation, folder / "allocation.json")
        for suffix in ("json", "py"):
            read = load_metric(str(folder / f"metric.{suffix}"))
            if not isinstance(read, Metric) or read.expression != self._best.expression:
                raise EvopruneError(f"{folder / f'metric.{suffix}'} does not give the winner back")

    def _job(self, kind: str, criterion: dict[str, Any] | None, payload: dict[str, Any]) -> Job:
        return Job(content_hash([self._identity, kind, criterion]), kind, payload)

    def _baseline(self, name: str, values: Mapping[str, Any], winner: Mapping[str, Any]) -> dict[str, Any]:
        power = self._search.power
        fitness: float | None
        if name == "power" and power is not None:
            fitness, expression = power.value, power.expression.text
        else:
            criterion = CRITERIA[name]
            fitness = self._search.seed_fitness.get(name)
            expression = criterion.expression.text if isinstance(criterion, Metric) else name
        return {
            "name": name,
            "fitness": fitness,
            "expression": expression,
            "heldout": summary(values),
            "winner_minus_this": paired_difference(winner, values),
        }


def described_allocation(allocation: Allocation) -> dict[str, Any]:
    """What a result says of the allocation that candidates were masked at: who made it, and what matrices lose.

    Also for which compressor it was searched, if it says so.
    """
    searched = {name: value for name, value in allocation.parameters.items() if name == "compressor"}
    described = {"allocator": allocation.allocator, "sparsity": allocation.sparsity, "sites": allocation.by_name()}
    return described | searched


def criterion_json(expression: Expression) -> dict[str, Any]:
    """An expression as jobs spell it."""
    return {"expression": expression.to_json()}


def _described(candidate: Candidate) -> dict[str, Any]:
    return {
        "birth": candidate.birth,
        "expression": candidate.expression.text,
        "latex": latex(candidate.expression),
        "fitness": candidate.value,
        "stderr": candidate.stderr,
        "rungs": list(candidate.rungs),
        "complexity": candidate.complexity,
        "origin": candidate.origin,
        "parents": list(candidate.parents),
        "statistics": sorted(candidate.expression.statistics),
    }
