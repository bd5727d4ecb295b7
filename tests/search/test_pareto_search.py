"""A search for a front on a target that is a sum over parts, so that the exact front can be counted out."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from evoprune.metrics.errors import Interrupted
from evoprune.metrics.files import content_hash
from evoprune.metrics.ranks import GONE
from evoprune.metrics.records import Site
from evoprune.search.costs import Parameters
from evoprune.search.engine.executor import Job
from evoprune.search.engine.inline import InlineExecutor
from evoprune.search.engine.journal import EvaluationLog
from evoprune.search.loop import BirthLoop, Budget
from evoprune.search.pareto_search import ParetoSearch
from evoprune.search.rundir import RunDirectory
from evoprune.search.spaces.ranges import RangeSpace

BLOCKS = 7
SITES = [
    Site(f"layers.{block}.{kind}", kind, block, BLOCKS, rows, 32)
    for block in range(BLOCKS)
    for kind, rows in (("self_attn.q", 16), ("self_attn.o", 16), ("mlp.up", 56))
]
SENSITIVITY = [random.Random(at).uniform(0.2, 5.0) for at in range(len(SITES))]
ENDS = (0.2, 0.8)
POPULATION, EVALUATIONS = 32, 480
WINDOWS, FINAL_WINDOWS = 4, 12


class AdditiveWorker:
    """KL of a genome: what each matrix loses, times its sensitivity; noise that is that of the window, if asked for."""

    def __init__(self, noise: float) -> None:
        self._noise = noise

    def handle(self, kind: str, payload: dict[str, Any]) -> dict[str, Any]:
        levels = payload["levels"]
        noise = [
            self._noise * random.Random(content_hash([window, levels])).gauss(0, 1)
            for window in range(payload["first"], payload["last"])
        ]
        return {"kl": exact_kl(levels) + sum(noise) / len(noise), "stderr": self._noise / len(noise) ** 0.5}


def build(context: dict[str, Any]) -> AdditiveWorker:
    """The factory that executors call."""
    return AdditiveWorker(context["noise"])


def exact_kl(levels: list[int]) -> float:
    return sum(weight * (level / GONE) ** 2 for weight, level in zip(SENSITIVITY, levels, strict=True))


class Backwards(InlineExecutor):
    """Does the newest job first."""

    def submit(self, jobs: Any) -> None:
        newest: dict[str, Job] = {job.key: job for job in jobs}
        self._queue = {**newest, **self._queue}


class Session:
    """A search in a run folder."""

    def __init__(
        self,
        folder: Path,
        *,
        only: bool = False,
        noise: float = 0.02,
        evaluations: int | None = EVALUATIONS,
        window: int = 64,
        executor: type[InlineExecutor] = InlineExecutor,
    ) -> None:
        self.space = RangeSpace(SITES, ENDS, drop="parts" if only else "none", only=only)
        seeds = {
            f"uniform@{sparsity}": self.space.near_budget(
                self.space.even(sparsity, random.Random(0)), sparsity, random.Random(0)
            )
            for sparsity in (0.2, 0.5, 0.8)
        }
        self.search = ParetoSearch(
            self.space,
            [Parameters(SITES)],
            seeds,
            target=0.5,
            windows=WINDOWS,
            final_windows=FINAL_WINDOWS,
            population=POPULATION,
            crossover=0.5,
            seed=0,
            evaluations=evaluations,
            identity="additive",
            payload={"prepared": "none"},
        )
        exists = (folder / "run.json").exists()
        self.run = RunDirectory.open(folder) if exists else RunDirectory.create("allocation", {}, {}, run_dir=folder)
        if exists:
            self.run.lock()
        self.log = EvaluationLog(folder / "evaluations.wal")
        self.executor = executor("tests.search.test_pareto_search:build", {"noise": noise}, threads=1)
        self.executor.start()
        self.loop = BirthLoop(self.search, self.executor, self.log, self.run, window=window)
        self.loop.restore()

    def go(self, stop_after: int | None = None, expired_after: int | None = None) -> Session:
        left, births = [stop_after], [expired_after]

        def counted(counter: list[int | None]) -> bool:
            if counter[0] is not None:
                counter[0] -= 1
            return counter[0] is not None and counter[0] < 0

        try:
            self.loop.run(Budget(None, stopping=lambda: counted(left), expired=lambda: counted(births)))
        finally:
            self.executor.close()
            self.log.close()
            self.run.close()
        return self

    @property
    def history_bytes(self) -> bytes:
        return (self.run.path / "history.jsonl").read_bytes()

    @property
    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.history_bytes.splitlines()]

    @property
    def front(self) -> list[tuple[float, int]]:
        return [(point.kl, point.cost) for point in self.search.front]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return Session(tmp_path_factory.mktemp("undisturbed") / "run").go()


def area(front: list[tuple[float, int]], worst: float, dearest: int) -> float:
    """Hypervolume of a front below a corner."""
    ordered = sorted(front, key=lambda pair: pair[1])
    ends = [*(cost for _, cost in ordered[1:]), dearest]
    return sum((end - cost) * (worst - kl) for (kl, cost), end in zip(ordered, ends, strict=True))


def test_dropping_parts_finds_nearly_the_exact_front(tmp_path: Path) -> None:
    """Of 2^14 genomes a few hundred are measured; all of them are counted out here."""
    session = Session(tmp_path / "run", only=True, noise=0.0).go()
    genes = session.space.genes
    by_gene: dict[str, float] = {gene.name: 0.0 for gene in genes}
    for site, weight in zip(SITES, SENSITIVITY, strict=True):
        part = "attention" if "attn" in site.kind else "mlp"
        by_gene[f"block {site.block} {part}"] += weight
    dense = sum(site.weights for site in SITES)
    best: dict[int, float] = {}
    for mask in range(1 << len(genes)):
        gone = [gene for at, gene in enumerate(genes) if mask >> at & 1]
        removed = sum(gene.removed[-1] for gene in gone)
        if session.space.least - session.space.tolerance <= removed <= session.space.most + session.space.tolerance:
            kl = sum(by_gene[gene.name] for gene in gone)
            best[dense - removed] = min(kl, best.get(dense - removed, kl))
    exact = [(kl, cost) for cost, kl in best.items() if kl < min((best[c] for c in best if c < cost), default=1e9)]
    found = session.front
    for kl, cost in found:
        assert kl >= best[cost] - 1e-9
    worst, dearest = max(kl for kl, _ in exact), max(best)
    assert area(found, worst, dearest) > 0.97 * area(exact, worst, dearest)
    hits = sum(any(cost == other and abs(kl - value) < 1e-9 for value, other in exact) for kl, cost in found)
    assert hits > len(exact) / 2


def test_levels_beat_uniform_sparsity_as_a_front(undisturbed: Session) -> None:
    """Although uniform sparsity may have a point at every level, and the search has some tens."""
    space, dense = undisturbed.space, sum(site.weights for site in SITES)
    uniform = [(exact_kl([level] * len(SITES)), Parameters(SITES).of([level] * len(SITES))) for level in range(52, 205)]
    found = [(exact_kl(space.levels(point.member.genome)), point.cost) for point in undisturbed.search.front]
    worst = exact_kl([205] * len(SITES))
    assert area(found, worst, dense) > 1.02 * area(uniform, worst, dense)


def test_the_front_is_of_the_range_and_measured_on_all_windows(undisturbed: Session) -> None:
    lines = undisturbed.history
    finals = [line for line in lines if line["stage"] == "final"]
    assert finals == lines[-len(finals) :]
    assert {tuple(line["windows"]) for line in finals} == {(0, FINAL_WINDOWS)}
    assert {tuple(line["windows"]) for line in lines if line["stage"] != "final"} == {(0, WINDOWS)}
    measured = [(line["kl"], line["cost"]) for line in finals]
    expected = [(k, c) for k, c in measured if not any(a <= k and b <= c and (a, b) != (k, c) for a, b in measured)]
    assert sorted(undisturbed.front) == sorted(expected)
    dense = sum(site.weights for site in SITES)
    percents = [round(100 - 100 * cost / dense) for _, cost in measured]
    assert len(percents) == len(set(percents))  # one of each hundredth
    assert min(percents) >= 20 and max(percents) <= 80 and len(percents) > 30
    best = undisturbed.search.best
    assert best is not None
    distances = [abs(undisturbed.space.sparsity_of(point.member.genome) - 0.5) for point in undisturbed.search.front]
    assert abs(undisturbed.space.sparsity_of(best.genome) - 0.5) == min(distances)


def test_the_history_says_what_was_measured(undisturbed: Session) -> None:
    lines = undisturbed.history
    counted = [line for line in lines if line["counted"]]
    assert len(counted) == EVALUATIONS == undisturbed.loop.evaluations
    assert len({tuple(line["genome"]) for line in counted}) == EVALUATIONS  # nobody twice
    assert [line["origin"] for line in lines[:3]] == ["seed:uniform@0.2", "seed:uniform@0.5", "seed:uniform@0.8"]
    by_birth = {line["birth"]: line for line in lines}
    for line in counted[3:]:
        assert len(line["parents"]) == {"switch": 1, "crossover": 2}[line["origin"]]
        for parent in line["parents"]:
            assert by_birth[parent]["generation"] < line["generation"]
    assert {line["origin"] for line in counted[3:]} == {"switch", "crossover"}
    for line in lines:
        kept = sum(s.out_features * (32 - level * 32 // 256) for s, level in zip(SITES, line["genome"], strict=True))
        assert kept == line["cost"]
    generations = [[line for line in counted if line["generation"] == at] for at in (1, 2, 3)]
    assert {len(some) for some in generations} == {POPULATION}


@pytest.mark.parametrize("window", [1, 5, 500])
def test_how_many_births_may_wait_changes_nothing(window: int, undisturbed: Session, tmp_path: Path) -> None:
    assert Session(tmp_path / "run", window=window).go().history_bytes == undisturbed.history_bytes


def test_the_order_in_which_workers_finish_changes_nothing(undisturbed: Session, tmp_path: Path) -> None:
    session = Session(tmp_path / "run", executor=Backwards).go()
    assert session.history_bytes == undisturbed.history_bytes
    assert session.front == undisturbed.front


def test_the_global_generator_has_no_say(undisturbed: Session, tmp_path: Path) -> None:
    random.seed(12345)
    before = random.getstate()
    session = Session(tmp_path / "run").go()
    assert random.getstate() == before
    assert session.history_bytes == undisturbed.history_bytes


def test_a_stopped_search_goes_on_exactly(undisturbed: Session, tmp_path: Path) -> None:
    for polls in (0, 2, 11, 40, 111, 200, 90):
        try:
            Session(tmp_path / "run").go(stop_after=polls)
        except Interrupted:
            continue
    session = Session(tmp_path / "run").go()
    assert session.history_bytes == undisturbed.history_bytes
    assert session.front == undisturbed.front
    assert session.search.best == undisturbed.search.best
    state = session.search.state()
    assert json.loads(json.dumps(state)) == state
    assert state == undisturbed.search.state()


@pytest.mark.parametrize("births", [1, 10, 60])
def test_time_that_is_over_leads_to_the_finals(births: int, tmp_path: Path) -> None:
    """Among seeds, and among children: what was begun is finished, and no more begins."""
    session = Session(tmp_path / "run", evaluations=None, window=4).go(expired_after=births)
    lines = session.history
    finals = [line for line in lines if line["stage"] == "final"]
    assert finals and finals == lines[-len(finals) :] and session.front
    assert 3 <= session.loop.evaluations <= births + 5


def test_a_search_without_any_fitness_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from evoprune.metrics.errors import InvalidCandidate

    def hopeless(*_: Any) -> Any:
        raise InvalidCandidate("NONFINITE", "no")

    monkeypatch.setattr(AdditiveWorker, "handle", hopeless)
    session = Session(tmp_path / "run").go()
    assert [line["reason"] for line in session.history] == ["NONFINITE"] * 3
    assert session.search.best is None and session.front == [] and session.search.leader is None
