"""What a joint search found: the pair of every round, and what each half of it does alone."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from evoprune.metrics.allocation_file import read_allocation
from evoprune.metrics.criterion import CRITERIA
from evoprune.metrics.expression import parse
from evoprune.metrics.files import content_hash
from evoprune.metrics.records import MaskRule
from evoprune.search.calibration import calibration_facts
from evoprune.search.config_joint import JointSearchConfig
from evoprune.search.engine.executor import Job, Outcome
from evoprune.search.joint_steps import Step
from evoprune.search.kinds.joint import KIND
from evoprune.search.metric_result import criterion_json
from evoprune.search.objective_words import objective_facts
from evoprune.search.replaying import replay_job, replayed_facts
from evoprune.search.result import failure, paired_difference, standard_error, summary
from evoprune.search.rundir import RunDirectory

REFERENCES = ("wanda", "magnitude")
"""The criterion to compare with: the first of these whose statistics there are."""
EXPORTS = {"metric": ("metric.json", "metric.py", "metric.tex"), "allocation": ("allocation.json", "allocation.txt")}

Text = Literal["search", "heldout"]


@dataclass(frozen=True)
class Entrant:
    """A model to measure.

    Attributes:
        criterion: as jobs spell it; None is the dense model.
        words: the criterion's name or expression.
        sparsities: by site name; empty for uniform sparsity.
        round: that found both; None for those to compare with.
    """

    criterion: Mapping[str, Any] | None
    words: str = ""
    sparsities: Mapping[str, float] = field(default_factory=dict)
    round: int | None = None


class JointComparison:
    """The pairs of all rounds beside uniform sparsity and the reference criterion.

    Args:
        config: of the run.
        identity: hash of everything that a measurement depends on beside its entrant.
        prepared: name of the prepared set.
        steps: lines of the history.
        found: results of all steps, in their order.
        folder: of the run.
    """

    def __init__(
        self,
        config: JointSearchConfig,
        identity: str,
        prepared: str,
        steps: Sequence[Mapping[str, Any]],
        found: Sequence[Mapping[str, Any]],
        folder: Path,
    ) -> None:
        self._config = config
        self._identity = identity
        self._prepared = prepared
        self._steps = steps
        self._found = found
        self._folder = folder
        self._heldout: Mapping[str, Any] = {}
        metrics, allocations = found[::2], found[1::2]
        terminals = config.context().statistics
        reference = next(name for name in REFERENCES if CRITERIA[name].needs <= {"W", *terminals})
        first, last = metrics[0]["best"]["expression"], allocations[-1]["best"]["allocation"]
        self._entrants = {
            "dense": Entrant(None),
            reference: Entrant({"name": reference}, reference),
            "metric-uniform": Entrant(criterion_json(parse(first)), first),
            f"{reference}-allocated": Entrant({"name": reference}, reference, last),
        }
        for number, (metric, allocation) in enumerate(zip(metrics, allocations, strict=True), 1):
            text, sparsities = metric["best"]["expression"], allocation["best"]["allocation"]
            self._entrants[f"round-{number}"] = Entrant(criterion_json(parse(text)), text, sparsities, number)
        self._search: dict[str, Mapping[str, Any]] = {}
        self._winner = ""

    def jobs(self, text: Text) -> list[Job]:
        """Every entrant on a text; the dense one on held-out text only, for its divergence from itself is known."""
        return [self._job(entrant, text) for name, entrant in self._entrants.items() if self._measured(name, text)]

    def choose(self, outcomes: Sequence[Outcome]) -> None:
        """Take the pair with the least KL on text B as the winner; of equal ones the earlier.

        Args:
            outcomes: of the jobs on the search text.

        Raises:
            EvopruneError: no pair could be measured.
        """
        names = [name for name in self._entrants if self._measured(name, "search")]
        self._search = {
            name: outcome.values for name, outcome in zip(names, outcomes, strict=True) if outcome.status == "ok"
        }
        pairs = [name for name, entrant in self._entrants.items() if entrant.round is not None and name in self._search]
        if not pairs:
            raise failure(outcomes[-1])
        self._winner = min(pairs, key=lambda name: _mean(self._search[name]["kl"]))

    def replay(self) -> Job | None:
        """What measures the best pair in replay; see `evoprune.search.replaying.Replayable`."""
        entrant = self._entrants[self._winner]
        assert entrant.criterion is not None and entrant.round is not None
        allocation = read_allocation(Step(2 * entrant.round - 1, self._folder).export("allocation.json"))
        target = self._config.target
        return replay_job(
            self._identity,
            self._prepared,
            entrant.criterion,
            target.compressor,
            MaskRule(target.sparsity),
            allocation,
        )

    def replayed(self, outcome: Outcome) -> dict[str, Any]:
        """What ``best`` of the result says of it, given the outcome; asked after `result`."""
        return replayed_facts(outcome, self._heldout)

    def result(self, run_id: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """The content of ``result.json``.

        Args:
            outcomes: of the jobs on held-out text.

        Raises:
            EvopruneError: the dense model or the winner could not be measured.
        """
        heldout = {}
        for name, outcome in zip(self._entrants, outcomes, strict=True):
            if outcome.status == "ok":
                heldout[name] = outcome.values
            elif name in ("dense", self._winner):
                raise failure(outcome)
        config, winner = self._config, self._entrants[self._winner]
        self._heldout = heldout[self._winner]
        reasons: Counter[str] = Counter()
        for one in self._found:
            reasons.update(one["reasons"])
        return {
            "run": run_id,
            "kind": KIND.name,
            "model": config.model.name,
            "target": f"{config.target.sparsity:g}",
            "compressor": config.target.compressor,
            **objective_facts(config),
            "seed": config.seed,
            "rounds": config.rounds,
            "evaluations": sum(one["evaluations"] for one in self._found),
            "births": sum(one["births"] for one in self._found),
            "distinct": sum(one["distinct"] for one in self._found),
            "reasons": dict(sorted(reasons.items())),
            "steps": list(self._steps),
            "final_tokens": config.context().rungs[-1] * config.data.window,
            "window": config.data.window,
            "data": config.data.source,
            "calibration": calibration_facts(config.data),
            "prunable": self._found[1]["prunable"],
            "dense": {"heldout": summary(heldout["dense"])},
            "baselines": [
                {
                    "name": name,
                    **self._described(name),
                    "heldout": summary(heldout[name]),
                    "winner_minus_this": paired_difference(heldout[self._winner], heldout[name]),
                }
                for name in self._entrants
                if name in heldout and name not in ("dense", self._winner)
            ],
            "best": {
                "round": winner.round,
                **self._described(self._winner),
                "removed": self._found[2 * (winner.round or 1) - 1]["best"]["removed"],
                "heldout": summary(heldout[self._winner]),
            },
            "front": [],
        }

    def export(self, run: RunDirectory, result: Mapping[str, Any]) -> None:
        """Copy the files of the two winners that make the best pair into the run, and read them back.

        Raises:
            EvopruneError: a file does not give its winner back.
        """
        folder = run.path / "export"
        folder.mkdir(exist_ok=True)
        number = 2 * (result["best"]["round"] - 1)
        for step in (Step(number, run.path), Step(number + 1, run.path)):
            for name in EXPORTS[step.kind]:
                shutil.copyfile(step.export(name), folder / name)
                KIND.check_export(folder / name, result)

    def _measured(self, name: str, text: Text) -> bool:
        return text == "heldout" or self._entrants[name].criterion is not None

    def _job(self, entrant: Entrant, text: Text) -> Job:
        asked = {"criterion": entrant.criterion, "sparsities": dict(entrant.sparsities), "text": text}
        return Job(content_hash([self._identity, "pair", asked]), "pair", {"prepared": self._prepared, **asked})

    def _described(self, name: str) -> dict[str, Any]:
        """What an entrant is, and its fitness on text B."""
        entrant = self._entrants[name]
        measured = self._search.get(name)
        return {
            "expression": entrant.words,
            "allocation": dict(entrant.sparsities) or None,
            "fitness": None if measured is None else _mean(measured["kl"]),
            "stderr": None if measured is None else standard_error(measured["kl"]),
        }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
