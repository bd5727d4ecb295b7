"""The search itself, on a planted target: nothing is mocked but the model."""

import itertools
import json
from pathlib import Path

import pytest

from evoprune.metrics.criterion import CRITERIA, Metric
from evoprune.metrics.errors import Interrupted
from evoprune.search.archive import Archive
from evoprune.search.engine.inline import InlineExecutor
from evoprune.search.engine.journal import EvaluationLog
from evoprune.search.loop import BirthLoop, Budget
from evoprune.search.metric_search import MetricSearch
from evoprune.search.racing import SuccessiveHalving
from evoprune.search.rundir import RunDirectory
from evoprune.search.searchers import SEARCHERS
from evoprune.search.spaces.symbolic import MetricSpace
from tests.search import planted

TERMINALS = frozenset({"W", "X_l2", "X_ss", "X_max", "G_l2", "G_mean"})
SEEDS = {
    name: criterion.expression
    for name in CRITERIA
    if isinstance(criterion := CRITERIA[name], Metric) and criterion.needs <= TERMINALS
}


class Session:
    """A search on the planted target in a run folder."""

    def __init__(self, folder: Path, seed: int = 0, searcher: str = "evolution", window: int = 16, executor=None):
        space, archive = MetricSpace(TERMINALS), Archive()
        options = {} if searcher == "random" else {"power_budget": 0, "population": 64}
        self.search = MetricSearch(
            space,
            SEARCHERS[searcher](space, archive, {"wanda": SEEDS["wanda"], "magnitude": SEEDS["magnitude"]}, **options),
            archive,
            SuccessiveHalving(2),
            planted.probe(),
            planted.RULE,
            seed=seed,
            prepared="",
            identity="planted",
            full_ladder=frozenset({"wanda"}),
        )
        exists = (folder / "run.json").exists()
        self.run = RunDirectory.open(folder) if exists else RunDirectory.create("metric", {}, {}, run_dir=folder)
        if exists:
            self.run.lock()
        self.log = EvaluationLog(folder / "evaluations.wal")
        self.executor = executor or InlineExecutor("tests.search.planted:build", {}, threads=1)
        self.executor.start()
        self.loop = BirthLoop(self.search, self.executor, self.log, self.run, window=window)
        self.loop.restore()

    def go(self, evaluations: int, stop_after: int | None = None) -> None:
        """Run; with `stop_after`, ask to stop after so many polls."""
        polls = itertools.count()
        stopping = (lambda: False) if stop_after is None else (lambda: next(polls) >= stop_after)
        try:
            self.loop.run(Budget(evaluations, stopping=stopping))
        finally:
            self.executor.close()
            self.log.close()
            self.run.close()

    @property
    def history(self) -> bytes:
        return (self.run.path / "history.jsonl").read_bytes()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    session = Session(tmp_path_factory.mktemp("run") / "r")
    session.go(120)
    return session


def lines(session):
    return [json.loads(line) for line in session.history.splitlines()]


def test_births_are_numbered_and_the_budget_is_exact(finished):
    births = lines(finished)
    assert [line["birth"] for line in births] == list(range(len(births)))
    assert sum("rungs" in line for line in births) == 120 == finished.loop.evaluations


def test_nothing_is_evaluated_twice(finished):
    evaluated = [line for line in lines(finished) if "rungs" in line]
    assert len({line["signature"] for line in evaluated}) == len(evaluated)
    assert len({line["expression"] for line in evaluated}) == len(evaluated)
    assert len(finished.log) == 120


def test_rejected_births_say_why_and_cost_nothing(finished):
    rejected = [line for line in lines(finished) if "rungs" not in line]
    assert rejected
    for line in rejected:
        assert line["reason"] in {"LIMIT", "NO_J", "NO_ELEM", "DUP_KEY", "DUP_SIG", "NONFINITE", "TIES", "STAT_MISSING"}
        assert (line["same_as"] is not None) == line["reason"].startswith("DUP")


def test_parents_are_older_than_the_window(finished):
    applied_before = {}
    evaluated: list[int] = []
    for line in lines(finished):
        applied_before[line["birth"]] = len(evaluated)
        if "rungs" in line:
            evaluated.append(line["birth"])
    for line in lines(finished):
        for parent in line["parents"]:
            behind = [birth for birth in evaluated if parent < birth < line["birth"]]
            assert parent in evaluated
            # The parent's result was applied, so at most window - 1 evaluated births came between.
            assert len(behind) >= 15


def test_who_did_not_finish_was_cut_and_says_so(finished):
    evaluated = [line for line in lines(finished) if "rungs" in line]
    assert {len(line["rungs"]) for line in evaluated} == {1, 2}
    assert all((len(line["rungs"]) < 2) == (line["reason"] == "CUT_F0") for line in evaluated)


def test_same_seed_same_history_other_seed_another(finished, tmp_path):
    again, other = Session(tmp_path / "again"), Session(tmp_path / "other", seed=1)
    again.go(120)
    other.go(120)
    assert again.history == finished.history
    assert other.history != finished.history


@pytest.mark.parametrize("stops", [(3,), (25, 40), (70, 1, 20)])
def test_a_stopped_search_continues_as_if_it_had_not_been(finished, tmp_path, stops):
    for stop in stops:
        with pytest.raises(Interrupted):
            Session(tmp_path / "run").go(120, stop_after=stop)
    session = Session(tmp_path / "run")
    session.go(120)
    assert session.history == finished.history
    assert session.search.state() == finished.search.state()
    assert len(session.log) == 120


def test_most_births_are_bred(finished):
    assert finished.search.evolved_parents > 0
    assert set(finished.search.origins) >= {"seed", "mutate", "crossover"}


def test_random_search_breeds_nothing(tmp_path):
    session = Session(tmp_path / "run", searcher="random")
    session.go(40)
    assert set(session.search.origins) == {"seed", "random"}
    assert session.search.evolved_parents == 0


def overlap(session) -> float:
    worker = planted.PlantedWorker()
    values = worker.distances(session.search.archive.best.expression)
    return 1 - sum(values) / len(values)


@pytest.mark.slow
def test_the_planted_metric_is_found(tmp_path):
    """Symbolic pruning metrics, check 14: 99 % overlap within 2,000 evaluations."""
    session = Session(tmp_path / "run")
    session.go(2000)
    assert overlap(session) >= 0.99


@pytest.mark.slow
def test_evolution_beats_random_search(tmp_path):
    """The same check: ten seeds, equal evaluations, exact paired sign-flip test of the mean difference below 0.05."""
    differences = []
    for seed in range(10):
        found = {}
        for searcher in ("evolution", "random"):
            session = Session(tmp_path / f"{searcher}-{seed}", seed=seed, searcher=searcher)
            session.go(400)
            found[searcher] = overlap(session)
        differences.append(found["evolution"] - found["random"])
    flipped = [
        sum(sign * difference for sign, difference in zip(signs, differences, strict=True))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    p = sum(total >= sum(differences) - 1e-12 for total in flipped) / len(flipped)
    assert p < 0.05, differences
