"""Allocation search on a target with a known best answer: each matrix costs a weight times its squared sparsity."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from evoprune.metrics.errors import Interrupted
from evoprune.metrics.files import content_hash
from evoprune.metrics.records import Site
from evoprune.search.breeders.switches import Switches
from evoprune.search.engine.inline import InlineExecutor
from evoprune.search.engine.journal import EvaluationLog
from evoprune.search.generation_search import GenerationSearch, Stage
from evoprune.search.loop import BirthLoop, Budget
from evoprune.search.rundir import RunDirectory
from evoprune.search.spaces.levels import LevelSpace

SENSITIVITY = [random.Random(at).uniform(0.2, 5.0) for at in range(18)]
SITES = [
    Site(f"layers.{block}.{kind}", kind, block, 3, rows, columns)
    for block in range(3)
    for kind, rows, columns in (
        ("q", 192, 192), ("k", 64, 192), ("v", 64, 192), ("o", 192, 192), ("up", 512, 192), ("down", 192, 512),
    )
]  # fmt: skip
STAGES = (Stage(2, 4), Stage(4, 2), Stage(8, 1))


class QuadraticWorker:
    """KL of a genome: a convex function of its sparsities, plus noise that is that of the window."""

    def handle(self, kind: str, payload: dict[str, Any]) -> dict[str, Any]:
        assert kind == "levels"
        if payload["levels"][0] >= 250:
            return {"kl": float("nan"), "stderr": 0.0} if payload.get("nan") else {"kl": 1e9, "stderr": 0.0}
        exact = sum(weight * (level / 256) ** 2 for weight, level in zip(SENSITIVITY, payload["levels"], strict=True))
        noise = [
            0.02 * random.Random(content_hash([window, payload["levels"]])).gauss(0, 1)
            for window in range(payload["first"], payload["last"])
        ]
        return {"kl": exact + sum(noise) / len(noise), "stderr": 0.0, "windows": len(noise)}


def build(context: dict[str, Any]) -> QuadraticWorker:
    """The factory that executors call."""
    return QuadraticWorker()


class Session:
    """A search in a run folder; `window` births may wait, which is no part of what a generation is."""

    def __init__(
        self,
        folder: Path,
        *,
        seed: int = 0,
        evaluations: int | None = 400,
        window: int = 64,
        surrogate: bool = False,
    ) -> None:
        self.space = LevelSpace(SITES, 0.6)
        rng = random.Random(7)
        uniform = self.space.nearest([0.6 * gene.removed[-1] for gene in self.space.genes], rng)
        ramp = [(0.45 + 0.1 * gene.block) * gene.removed[-1] for gene in self.space.genes]
        seeds = {"uniform": uniform, "ramp": self.space.nearest(ramp, rng)}
        self.search = GenerationSearch(
            self.space,
            seeds,
            Switches(self.space, seed),
            STAGES,
            windows=40,
            final_windows=20,
            offspring=16,
            crossover=True,
            surrogate=surrogate,
            seed=seed,
            evaluations=evaluations,
            identity="quadratic",
            payload={"prepared": "none"},
        )
        exists = (folder / "run.json").exists()
        self.run = RunDirectory.open(folder) if exists else RunDirectory.create("allocation", {}, {}, run_dir=folder)
        if exists:
            self.run.lock()
        self.log = EvaluationLog(folder / "evaluations.wal")
        self.executor = InlineExecutor("tests.search.test_generation_search:build", {}, threads=1)
        self.executor.start()
        self.loop = BirthLoop(self.search, self.executor, self.log, self.run, window=window)
        self.loop.restore()

    def go(self, stop_after: int | None = None) -> None:
        left = [stop_after]

        def stopping() -> bool:
            if left[0] is not None:
                left[0] -= 1
            return left[0] is not None and left[0] < 0

        try:
            self.loop.run(Budget(None, stopping=stopping))
        finally:
            self.executor.close()
            self.log.close()
            self.run.close()

    @property
    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run.path / "history.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Session:
    session = Session(tmp_path_factory.mktemp("undisturbed") / "run")
    session.go()
    return session


def test_children_bring_together_what_others_changed(undisturbed: Session) -> None:
    """Every gene of a crossing is that of one of its parents, but where the budget had to be met again."""
    history = undisturbed.history
    by_birth = {line["birth"]: line for line in history}
    crossed = [line for line in history if line["origin"] == "crossover" and line["stage"] == 0]
    assert len(crossed) >= 10
    whole = 0
    for line in crossed:
        parents = [by_birth[birth]["genome"] for birth in line["parents"]]
        assert line["genome"] not in parents
        assert {by_birth[birth]["generation"] for birth in line["parents"]} <= {
            line["generation"] - 1, by_birth[line["parents"][0]]["generation"]
        }  # fmt: skip
        whole += all(option in options for option, *options in zip(line["genome"], *parents, strict=True))
    assert whole >= len(crossed) / 3
    # Those that get to the last stage are many for so few.
    last = [line for line in history if line["stage"] == 2 and line["origin"] == "crossover"]
    assert len(last) >= 2


def test_it_finds_what_the_sensitivities_ask_for(undisturbed: Session) -> None:
    search = undisturbed.search
    assert search.best is not None and search.best.kl is not None
    assert abs(search.space.removed(search.best.genome) - search.space.budget) <= search.space.tolerance
    # Lagrange: at the optimum each matrix's marginal cost per weight is the same, up to the ends of the ladders.
    weights = [gene.removed[-1] for gene in search.space.genes]
    low, high = 0.0, 10.0
    for _ in range(100):
        price = (low + high) / 2
        asked = [min(255 / 256, price * size / weight / 1e4) for size, weight in zip(weights, SENSITIVITY, strict=True)]
        spent = sum(share * size for share, size in zip(asked, weights, strict=True))
        low, high = (price, high) if spent < search.space.budget else (low, price)
    best_possible = sum(weight * share**2 for weight, share in zip(SENSITIVITY, asked, strict=True))
    uniform = search.seed_fitness["uniform"]
    assert search.best.kl < uniform - 0.8 * (uniform - best_possible)


def test_a_generation_is_what_the_stages_say(undisturbed: Session) -> None:
    lines = undisturbed.history
    assert [line["origin"] for line in lines[:2]] == ["seed:uniform", "seed:ramp"]
    assert [line["windows"] for line in lines[:2]] == [[0, STAGES[-2].windows]] * 2
    second = [line for line in lines if line["generation"] == 2]
    by_stage = [[line for line in second if line["stage"] == stage] for stage in range(3)]
    assert [len(stage) for stage in by_stage] == [1 + 16, 1 + 4, 1 + 2]
    assert all(stage[0]["origin"] == "parent" for stage in by_stage)
    begin = by_stage[0][0]["windows"][0]
    for stage, (some, rule) in enumerate(zip(by_stage, STAGES, strict=True)):
        assert len({tuple(line["windows"]) for line in some}) == 1  # the same text for all
        assert some[0]["windows"] == [begin, begin + rule.windows]
        if stage:
            before = {tuple(line["genome"]): line["kl"] for line in by_stage[stage - 1][1:]}
            passed = [tuple(line["genome"]) for line in some if line["origin"] != "parent"]
            assert passed == sorted(before, key=before.__getitem__)[: STAGES[stage - 1].survivors]
    parents = {tuple(line["genome"]) for line in lines if line["generation"] == 3 and line["origin"] == "parent"}
    assert parents == {tuple(min(by_stage[2], key=lambda line: line["kl"])["genome"])}


def test_a_stage_goes_on_where_the_last_one_ended(undisturbed: Session) -> None:
    """No window is read twice in a generation, and the history has the mean over all of them."""
    worker = QuadraticWorker()
    for line in undisturbed.history:
        payload = {"levels": line["genome"], "first": line["windows"][0], "last": line["windows"][1]}
        assert line["kl"] == pytest.approx(worker.handle("levels", payload)["kl"], rel=1e-9)
    log = (undisturbed.run.path / "evaluations.wal").read_text().splitlines()
    read = Counter(json.loads(line.split(" ", 1)[1])["o"]["values"]["windows"] for line in log)
    # A seed has seen the first 4 of the 20 windows of the finals. What is asked twice is answered from the log.
    spans = {"seeds": 4, 0: 2, 1: 2, 2: 4}
    assert read.keys() == {2, 4, 16, 20}
    assert read.total() <= len(undisturbed.history)
    assert all(read[size] <= sum(spans.get(line["stage"]) == size for line in undisturbed.history) for size in (2, 4))


def test_the_budget_counts_candidates_once(undisturbed: Session) -> None:
    lines = undisturbed.history
    first = [line for line in lines if line["stage"] in (0, "seeds") and line["origin"] != "parent"]
    assert len(first) == undisturbed.loop.evaluations == 400
    assert len({tuple(line["genome"]) for line in first if line["origin"] == "switch"}) <= 398
    assert lines[-1]["stage"] == "final"


def test_the_best_is_no_worse_than_any_seed_on_the_text_that_they_share(undisturbed: Session) -> None:
    finals = [line for line in undisturbed.history if line["stage"] == "final"]
    assert undisturbed.search.best is not None
    assert undisturbed.search.best.kl == min(line["kl"] for line in finals)
    best_seed = min(undisturbed.history[:2], key=lambda line: line["kl"])
    assert best_seed["origin"] in [line["origin"] for line in finals]


@pytest.mark.parametrize("window", [1, 3, 500])
def test_how_many_births_may_wait_changes_nothing(window: int, undisturbed: Session, tmp_path: Path) -> None:
    session = Session(tmp_path / "run", window=window)
    session.go()
    assert session.history == undisturbed.history


def test_a_stopped_search_goes_on_exactly(undisturbed: Session, tmp_path: Path) -> None:
    for polls in (0, 3, 40, 111, 300):
        session = Session(tmp_path / "run")
        try:
            session.go(stop_after=polls)
        except Interrupted:
            continue
    session = Session(tmp_path / "run")
    session.go()
    assert session.history == undisturbed.history
    assert session.search.best == undisturbed.search.best


def test_seeds_that_cannot_be_measured_end_the_search(tmp_path: Path) -> None:
    search = GenerationSearch(
        LevelSpace(SITES[:2], 0.5),
        {"uniform": (128, 128)},
        Switches(LevelSpace(SITES[:2], 0.5), 0),
        STAGES,
        windows=8,
        final_windows=8,
        offspring=4,
        crossover=True,
        surrogate=False,
        seed=0,
        evaluations=None,
        identity="",
        payload={},
    )
    birth = search.next_birth()
    assert birth is not None and birth.job is not None
    assert search.next_birth() is None
    from evoprune.search.engine.executor import Outcome

    line = search.apply(birth, Outcome(birth.job.key, "invalid", error="NONFINITE"))
    assert line["reason"] == "NONFINITE"
    assert search.next_birth() is None
    assert search.best is None
