"""A policy search from configuration to result."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from evoprune.fitness.mask_units import UnitTable
from evoprune.fitness.maskers import ByMetrics, ByUnits
from evoprune.fitness.prepare import Summary
from evoprune.fitness.unit_costs import UnitCosts
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.exported import load_metric
from evoprune.metrics.files import content_hash
from evoprune.metrics.records import Site
from evoprune.search.config_policy import PolicySearchConfig
from evoprune.search.engine.executor import Job, Outcome
from evoprune.search.kinds.policy import KIND
from evoprune.search.learner_options import learner_options
from evoprune.search.learners import LEARNERS, Learner, Problem
from evoprune.search.level_run import criterion_json, sites_of
from evoprune.search.loop import Birth
from evoprune.search.policies import Budget
from evoprune.search.policies.start import FLAT, start_logits, z_scores
from evoprune.search.policy_budget import budget_of, keep_rates
from evoprune.search.policy_result import PolicyComparison, unit_rows
from evoprune.search.policy_search import FINALISTS, PolicySearch, Texts
from evoprune.search.policy_start import Start, check_start, given_start, logits_from, start_json
from evoprune.search.result import failure
from evoprune.search.search_run import Plan, SearchRun
from evoprune.search.worker_session import Ask, First

MANY_STEPS = 300
"""Steps that schedules are made for, where time is the only budget."""


class PolicyRun(SearchRun[PolicySearchConfig, PolicySearch]):
    """One session of a search by a policy."""

    kind = KIND
    worker_factory = "evoprune.fitness.policy_worker:build"
    pure_jobs: ClassVar[tuple[str, ...]] = ("units", "unit-scores", "costs", "mask", "gradient", "heldout")
    _costs: UnitCosts | None = None
    _table: UnitTable

    def seeds_identity(self) -> dict[str, Any]:
        given = given_start(self.config.seed_from)
        return {"prior": self._prior(), "given": None if given is None else start_json(given)}

    def prepare(self, first: First, ask: Ask) -> Summary:
        prepared = super().prepare(first, ask)
        target = self.config.target
        asked = {"prepared": prepared.name, "masker": self.config.masker, "quantity": target.cost}
        self._table = UnitTable.from_json(first("units", asked)["units"])
        if isinstance(self._table.masker, ByUnits):
            costs = {"quantity": target.cost, "batch": 1, "sequence": None}
            self._costs = UnitCosts.from_json(first("costs", costs))
        self._run.add_identity(units=self._table.hash, unit_rows=unit_rows(self._table))
        self.identity = content_hash([self.identity, self._table.hash])
        return prepared

    @property
    def counted_by_loop(self) -> bool:
        return False

    @property
    def _masks_of_step(self) -> int:
        samples = self.config.searcher.samples
        return 8 if samples == "auto" else samples

    @property
    def _steps(self) -> int:
        """How many steps the budget is enough for, about."""
        if self.config.evaluations is None:
            return MANY_STEPS
        each = self._masks_of_step + 1 / self.config.searcher.validate_every
        return max(1, math.floor((self.config.evaluations - 2 - FINALISTS) / each))

    def plan(self) -> Plan:
        searcher, window = self.config.searcher, self.config.data.window
        batch, held = searcher.batch * window, searcher.validation * window
        each = batch + held / searcher.validate_every / self._masks_of_step
        return Plan(
            [batch],
            "mask",
            each,
            self._masks_of_step,
            lambda workers: (
                f"{self._masks_of_step} masks in a step: some will wait; --population {workers} keeps them busy (it is "
                "part of the run's identity)"
            ),
        )

    def tokens_of(self, job: Job) -> int:
        return len(job.payload["windows"]) * self.config.data.window

    def tokens_asked(self, job: Job) -> int:
        if "windows" in job.payload:
            return self.tokens_of(job)
        return super().tokens_asked(job)

    def build_search(self, prepared: Summary, ask: Ask) -> PolicySearch:
        config, table = self.config, self._table
        payload = {"prepared": prepared.name, "masker": config.masker}
        scores = self._scores(payload, ask)
        budget = budget_of(table, config.target, scores)
        given = self._given(prepared)
        learner = self._learner(budget, scores, given, sites_of(prepared))
        if table.strata is not None and not learner.exact:
            raise InvalidInput(
                f"the learner {config.searcher.name} meets a budget on average, and a pattern binds every mask: give "
                "another --searcher, such as score-function"
            )
        starts = self._starts()

        def learner_from(mask: np.ndarray) -> Learner:
            return self._learner(budget, mask.astype(np.float64), None, ())

        return PolicySearch(
            learner,
            groups=table.groups,
            texts=Texts(config.searcher.windows, config.searcher.batch, config.searcher.validation),
            objective=config.objective,
            dense=self._dense(payload, ask) if config.objective == "ce-residual" else None,
            validate_every=config.searcher.validate_every,
            steps=self._steps,
            seed=config.seed,
            evaluations=config.evaluations,
            identity=self.identity,
            payload=payload,
            fixed=not bool(budget.open.any()),
            starts=starts,
            learner_from=learner_from if starts and given is None else None,
        )

    def _given(self, prepared: Summary) -> Start | None:
        """What ``seed_from`` names.

        Raises:
            InvalidInput: it is of another model, or of other units.
        """
        source = self.config.seed_from
        given = given_start(source)
        if given is not None and source is not None:
            widths = () if self._costs is None else self._costs.widths
            check_start(given, source, self._table, prepared.facts["model_class"], sites_of(prepared), widths)
        return given

    def _learner(self, budget: Budget, scores: np.ndarray, given: Start | None, sites: Sequence[Site]) -> Learner:
        """At its beginning.

        Args:
            scores: [n] by which the policy starts.
            given: what it starts from beside these; None is nothing.
            sites: the matrices of the model.
        """
        config, groups = self.config, self._table.groups
        mapping = config.searcher.mapping
        # From a flat start nobody is to know what the prior says, not even a step later.
        prior = np.zeros(len(groups)) if mapping == FLAT else z_scores(scores, groups)
        start = start_logits(mapping, scores, groups, keep_rates(budget), seed=config.seed)
        if given is not None:
            start = logits_from(given, self._table, prior, sites)
        problem = Problem(budget, groups, prior, start, self._steps, config.seed)
        return LEARNERS[config.searcher.name].build(problem, learner_options(config.searcher))

    def _applied(self, birth: Birth, line: Mapping[str, Any], outcome: Outcome | None) -> None:
        # A mask within the budget has a loss: one that has none is worth a line, which births of other kinds are not.
        if line["reason"] is not None:
            self._run.events("warning", "mask_failed", birth=line["birth"], step=line["step"], reason=line["reason"])
        super()._applied(birth, line, outcome)

    def comparison(self, prepared: Summary, search: PolicySearch, ask: Ask) -> PolicyComparison:
        return PolicyComparison(self.config, self.identity, search, self._table, self._costs, self._run)

    def _prior(self) -> str | dict[str, Any]:
        """What the policy starts from, as jobs spell it."""
        name = self.config.searcher.prior
        if self.config.prior_criterion is not None:
            return name
        return criterion_json(name, load_metric(name))

    def _scores(self, payload: dict[str, Any], ask: Ask) -> np.ndarray:
        """[n] scores of the units by the prior."""
        self.phase("scoring the units")
        asked = {**payload, "criterion": self._prior()}
        (outcome,) = ask(
            [Job(content_hash([self.identity, "unit-scores", asked]), "unit-scores", asked)], limited=False
        )
        if outcome.status != "ok":
            raise failure(outcome)
        return np.asarray(outcome.values["scores"], dtype=np.float64)

    def _starts(self) -> dict[str, np.ndarray]:
        """Masks to begin with beside the policy's own: every metric in all matrices."""
        table, masker = self._table, self._table.masker
        if not isinstance(masker, ByMetrics):
            return {}
        count = len(masker.metrics)
        return {name: np.tile(np.arange(count) == at, len(table.rows)) for at, name in enumerate(masker.metrics)}

    def _dense(self, payload: dict[str, Any], ask: Ask) -> Sequence[float]:
        """Cross entropy of the dense model by window of text B."""
        asked = {**payload, "kept": None, "windows": list(range(self.config.text_windows))}
        (outcome,) = ask([Job(content_hash([self.identity, "mask", None, asked["windows"]]), "mask", asked)])
        if outcome.status != "ok":
            raise failure(outcome)
        return list(outcome.values["nll"])
