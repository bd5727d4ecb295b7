"""A metric search from configuration to result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evoprune.fitness.prepare import Summary
from evoprune.metrics.allocation_file import from_json
from evoprune.metrics.criterion import CRITERIA, Metric
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.exported import load_metric
from evoprune.metrics.expression import Expression, parse
from evoprune.metrics.files import content_hash
from evoprune.search.archive import Archive
from evoprune.search.candidate import Candidate
from evoprune.search.config_metric import MetricSearchConfig
from evoprune.search.engine.executor import Job
from evoprune.search.kinds.metric import KIND
from evoprune.search.metric_result import BASELINES, Finalist, MetricComparison, criterion_json, finalists
from evoprune.search.metric_search import MetricSearch
from evoprune.search.racing import RACING_RULES
from evoprune.search.rundir import RunDirectory
from evoprune.search.search_run import Plan, SearchRun
from evoprune.search.searchers import SEARCHERS
from evoprune.search.spaces.symbolic import MetricSpace
from evoprune.search.worker_session import Ask


class MetricRun(SearchRun[MetricSearchConfig, MetricSearch]):
    """One session of a metric search."""

    kind = KIND
    worker_factory = "evoprune.fitness.worker:build"
    pure_jobs = ("evaluate", "finals", "heldout", "agreement", "replayed")

    def seeds_identity(self) -> dict[str, Any]:
        return {name: seed.to_json() for name, seed in self._seeds().items()}

    def given_facts(self) -> dict[str, str]:
        own = self.context.own
        return {"allocation": content_hash(own)} if own else {}

    def plan(self) -> Plan:
        config = self.config
        rungs = [windows * config.data.window for windows in config.racing.rungs]
        per_candidate = sum(
            (after - before) * config.racing.keep**rung
            for rung, (before, after) in enumerate(zip([0, *rungs], rungs, strict=False))
        )
        return Plan(
            rungs,
            "rung",
            per_candidate,
            config.window / 2,
            lambda workers: (
                f"a window of {config.window} births: some will wait; --window {2 * workers} keeps them busy (it is "
                "part of the run's identity)"
            ),
        )

    def build_search(self, prepared: Summary, ask: Ask) -> MetricSearch:
        config = self.config
        dead = frozenset(prepared.facts["dead"])
        if dead:
            self.progress.line(
                f"warning: {', '.join(sorted(dead))}: zero along 1 % or more of all rows, so no candidate may read it"
            )
        allocation = None if self.context.allocation is None else from_json(self.context.allocation)
        if allocation is not None and (doubt := allocation.doubt(prepared.facts["fingerprint"])):
            self.progress.line(f"warning: {doubt}")
        space = MetricSpace(
            config.terminals - dead,
            self.context.group,
            simplify=config.searcher.simplify,
            typical=prepared.probe.typical,
        )
        archive = Archive()
        seeds = self._seeds()
        options = config.searcher.model_dump(exclude={"name", "seeds", "simplify"})
        searcher = SEARCHERS[config.searcher.name](space, archive, seeds, **options)
        make_rule = RACING_RULES[config.racing.rule]
        racing = make_rule(len(config.racing.rungs), config.racing.keep, config.racing.uniform)
        return MetricSearch(
            space,
            searcher,
            archive,
            racing,
            prepared.probe,
            self.context.rule,
            seed=config.seed,
            prepared=prepared.name,
            identity=self.identity,
            finalists=config.racing.finalists,
            full_ladder=frozenset(BASELINES),
            dead=dead,
            own=self.context.own,
        )

    def _seeds(self) -> dict[str, Expression]:
        """Metrics to start from, by name; Wanda, or what comes closest to it, first."""
        config = self.config
        names = config.searcher.seeds if config.searcher.seeds is not None else tuple(CRITERIA)
        order = ("wanda", "magnitude", *BASELINES)
        seeds = {}
        for name in sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name)):
            criterion = CRITERIA[name]
            if isinstance(criterion, Metric) and criterion.needs <= config.terminals:
                seeds[name] = criterion.expression
        for name, expression in seeds_from(config.seed_from).items():
            seeds[name] = expression
        return seeds

    def comparison(self, prepared: Summary, search: MetricSearch, ask: Ask) -> MetricComparison:
        self.phase("comparing the finalists", " on more of text B")
        entrants = finalists(search)
        # Two jobs a finalist, so that few finalists keep more workers busy.
        searched, available = self.config.racing.rungs[-1], prepared.facts["final_windows"]
        parts = [(0, searched), (searched, available)] if available > searched else [(0, searched)]
        outcomes = ask([self._final(prepared, member, part) for member in entrants for part in parts])
        compared = []
        for number, member in enumerate(entrants):
            measured = outcomes[number * len(parts) : (number + 1) * len(parts)]
            if all(outcome.status == "ok" for outcome in measured):
                losses = [loss for outcome in measured for loss in outcome.values["nll"]]
                compared.append(Finalist(member, losses))
        allocation = None if self.context.allocation is None else from_json(self.context.allocation)
        return MetricComparison(self.config, self.identity, prepared, search, compared, allocation)

    def _final(self, prepared: Summary, member: Candidate, windows: tuple[int, int]) -> Job:
        """Losses of a finalist on some windows of text B."""
        criterion = criterion_json(member.expression)
        payload = {"prepared": prepared.name, "criterion": criterion, "windows": list(windows)}
        return Job(content_hash([self.identity, "finals", criterion, payload["windows"]]), "finals", payload)


def seeds_from(source: str | None) -> dict[str, Expression]:
    """Expressions to start from: an exported metric, the front of another run, or the metric of a joint one.

    Raises:
        InvalidInput: neither.
    """
    if source is None:
        return {}
    path = Path(source)
    if path.suffix in (".json", ".py") or not (path.is_dir() or source == "latest"):
        metric = load_metric(source)
        if not isinstance(metric, Metric):
            raise InvalidInput(f"{source} is no expression of this language, so it cannot be bred")
        return {"given": metric.expression}
    run = RunDirectory.open(source)
    if run.kind == "joint" and run.result is not None:
        return seeds_from(str(run.path / "export" / "metric.json"))
    if run.kind != KIND.name:
        raise InvalidInput(f"run {source} searched {run.kind}s: a run that searched metrics is needed to start from")
    result = run.result
    if result is None:
        raise InvalidInput(f"run {source} is not finished: resume it first")
    members = sorted(result["front"], key=lambda member: member["fitness"])
    return {f"given-{index}": parse(member["expression"]) for index, member in enumerate(members)}
