"""A joint search from configuration to result: metrics and allocations in turn, each at what the other found.

What a metric is best at shifts with what each matrix loses, and the other way round, so the two searches alternate.
Source: symbolic pruning metrics, P12; layerwise sparsity allocation, section 9.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any

from evoprune.fitness.prepare import Summary
from evoprune.metrics.errors import Interrupted
from evoprune.metrics.files import canonical_json
from evoprune.search.config_joint import JointSearchConfig
from evoprune.search.engine.events import SEARCHING
from evoprune.search.identity import git_commit, versions
from evoprune.search.joint_result import JointComparison
from evoprune.search.joint_steps import Step, history_line, step_config, steps_of
from evoprune.search.kinds import config_of
from evoprune.search.metric_run import seeds_from
from evoprune.search.replaying import PHASE
from evoprune.search.result import measured_facts
from evoprune.search.rundir import RunDirectory
from evoprune.search.session import carry_out
from evoprune.search.watch import EVENT_SECONDS
from evoprune.search.worker_session import WorkerSession


class JointRun(WorkerSession[JointSearchConfig]):
    """One session of a joint search."""

    worker_factory = "evoprune.fitness.joint_worker:build"
    pure_jobs = ("pair", "replayed")

    def seeds_identity(self) -> dict[str, Any]:
        return {name: seed.to_json() for name, seed in seeds_from(self.config.seed_from).items()}

    def execute(self, stopping: Callable[[], bool]) -> dict[str, Any]:
        """Go through all steps, compare what they found, write ``result.json`` and the exports; the result.

        Raises:
            Interrupted: `stopping` became true; the run can be resumed.
            InvalidInput: the configuration does not fit the model or the data, or the run's identity changed.
        """
        self._begin(stopping)
        try:
            # A step that has not begun could not know that the model is another: the run as a whole does.
            with self._workers() as executor:
                ask = partial(self._ask, executor, stopping)
                prepared = self.prepare(partial(self._first, executor, stopping), ask)
            self._announce()
            found = self._steps(stopping)
            result = self._compared(prepared, found, stopping)
        finally:
            self._end(stopping)
        self._run.write_result(result)
        return result

    def _announce(self) -> None:
        """How the budget is shared out."""
        config = self.config
        shares = []
        for step in (0, 1):
            evaluations = [] if config.evaluations is None else [f"{config.shares[step]} evaluations"]
            minutes = [] if config.minutes is None else [f"{config.minutes * config.weights[step]:g} min"]
            shares.append(", ".join([*evaluations, *minutes]))
        self.progress.line(f"{config.rounds} rounds, each of {shares[0]} for metrics, then {shares[1]} for allocations")

    def _steps(self, stopping: Callable[[], bool]) -> list[dict[str, Any]]:
        """The results of all steps, of which those that are finished are not done again."""
        committed = 0 if (state := self._run.restore()) is None else state["applied"]
        if not committed:
            self._commit([], [])  # from here on there is something to go on from
        found: list[dict[str, Any]] = []
        spent = 0.0
        for step in steps_of(self._run.path, self.config.rounds):
            self._run.events("info", "phase", phase=step.name)
            self.progress.begin_part(step.name, sum(result["evaluations"] for result in found), spent)
            run = self._step(step, found, stopping)
            assert run.result is not None
            found.append(run.result)
            spent += run.phase_seconds(SEARCHING)
            if step.number >= committed:
                self._commit([history_line(step, run.result)], found)
        self.progress.begin_part("", 0, 0.0)
        return found

    def _step(self, step: Step, found: list[dict[str, Any]], stopping: Callable[[], bool]) -> RunDirectory:
        """The run of a step, finished."""
        if stopping():
            raise Interrupted("stopped by the user; everything finished is saved")
        if step.exists:
            run = RunDirectory(step.path)
            if run.result is not None:
                return run
            run.lock()
            run.events("info", "resumed")
        else:
            shutil.rmtree(step.path, ignore_errors=True)
            config = step_config(self.config, step, found)
            identity = {"versions": versions(), "git": git_commit(), "part_of": self._run.run_id}
            run = RunDirectory.create(step.kind, config.model_dump(mode="json"), identity, run_dir=step.path)
        with closing(run):
            carry_out(run, config_of(run), self._resources, self.progress, self._alive(step, stopping))
        return run

    def _alive(self, step: Step, stopping: Callable[[], bool]) -> Callable[[], bool]:
        """`stopping`, which whoever works asks all the time, and which shows others meanwhile that this run goes on."""
        last = time.monotonic()

        def asked() -> bool:
            nonlocal last
            if time.monotonic() - last > EVENT_SECONDS:
                last = time.monotonic()
                self._run.beat()
                self._run.events("info", "progress", phase=step.name, evaluations=self.progress.evaluations)
            return stopping()

        return asked

    def _commit(self, lines: list[dict[str, Any]], found: list[dict[str, Any]]) -> None:
        evaluations = sum(result["evaluations"] for result in found)
        state = {"search": {}, "evaluations": evaluations, "applied": len(found), "pending": []}
        self._run.commit([canonical_json(line) for line in lines], state)

    def _compared(self, prepared: Summary, found: list[dict[str, Any]], stopping: Callable[[], bool]) -> dict[str, Any]:
        """The best of all rounds on text B, beside the others on text C, and its files in the run's folder."""
        steps = list(self._run.history())
        comparison = JointComparison(self.config, self.identity, prepared.name, steps, found, self._run.path)
        with self._workers() as executor:
            self.phase("comparing the rounds", " on text B")
            comparison.choose(self._ask(executor, stopping, comparison.jobs("search")))
            self.phase("measuring on held-out text")
            outcomes = self._ask(executor, stopping, comparison.jobs("heldout"))
            result = comparison.result(self._run.run_id, outcomes)
            if (job := comparison.replay()) is not None:
                self.phase(PHASE)
                result["best"] |= comparison.replayed(self._ask(executor, stopping, [job], limited=False)[0])
        result["bit_reproducible"] = not self._admission.mixed and all(one["bit_reproducible"] for one in found)
        result |= measured_facts(self._facts)
        comparison.export(self._run, result)
        return result
