"""The search itself, on a planted target: nothing is mocked but the model."""

import json
import math
import statistics
from dataclasses import replace

import pytest

from evoprune.metrics.errors import Interrupted
from evoprune.metrics.expression import parse
from evoprune.metrics.opposing import oppose
from evoprune.metrics.products import is_power_product
from evoprune.search.engine.executor import Outcome
from evoprune.search.loop import evaluated
from evoprune.search.metric_search import POWER_TERMINALS
from evoprune.search.searchers import Proposal
from tests.search.planted import PlantedWorker, Session, probe, sign_flip_p


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


def test_what_is_shown_as_evaluated_is_in_the_history(tmp_path):
    """Not so the births that wait, which the budget counts: neither at a stop nor when the run goes on."""
    with pytest.raises(Interrupted):
        Session(tmp_path / "run").go(120, stop_after=40)
    session = Session(tmp_path / "run")
    known = sum("rungs" in line for line in lines(session))
    assert session.loop.evaluated == evaluated(session.run.peek()) == known < session.loop.evaluations
    session.go(120)
    assert session.loop.evaluated == session.loop.evaluations == 120


def test_most_births_are_bred(finished, tmp_path):
    """Seeds and the first immigrants have no evolved parent; beyond them there are hardly any such births."""
    session = Session(tmp_path / "run")
    session.go(200)
    assert session.search.evolved_parents >= session.search.births / 2
    assert set(finished.search.origins) >= {"seed", "mutate", "crossover"}


def test_random_search_breeds_nothing(tmp_path):
    session = Session(tmp_path / "run", searcher="random")
    session.go(40)
    assert set(session.search.origins) == {"seed", "random"}
    assert session.search.evolved_parents == 0


def test_what_is_drawn_at_random_is_cut_like_anything_else(tmp_path):
    """The baseline called random stands in the table, and runs every rung; what is drawn only shares its name."""
    session = Session(tmp_path / "run", searcher="random")
    session.go(80)
    drawn = [line for line in lines(session) if line["origin"] == "random" and "rungs" in line]
    assert sum(line["reason"] == "CUT_F0" for line in drawn) > len(drawn) / 2


def test_a_search_with_the_published_simplification_runs(finished, tmp_path):
    session = Session(tmp_path / "run", simplify="opposing")
    session.go(60)
    evaluated = [line for line in lines(session) if "rungs" in line]
    assert len({line["signature"] for line in evaluated}) == len(evaluated) == 60
    for line in lines(session):
        if line["expression"] is not None:
            assert oppose(parse(line["expression"])).text == line["expression"]
    assert session.history != finished.history[: len(session.history)]


class Given:
    """Proposes what it was given, once each."""

    def __init__(self, texts):
        self.told = []
        self._texts = list(texts)

    def propose(self, birth, rng):
        return Proposal(parse(self._texts[birth]), "random")

    def tell(self, proposal, candidate, value):
        self.told.append(candidate)

    def state(self):
        return {}

    def restore(self, state):
        pass


DEGENERATE = {
    "mul(X_max,rsum(abs(W)))": "NO_ELEM",
    "mul(X_l2,csum(abs(W)))": "NO_ELEM",
    "X_l2": "NO_ELEM",
    "rmean(abs(W))": "NO_J",
    # One canonical form for all constants: the second is a duplicate.
    "sub(W,W)": "DUP_KEY",
    "min(abs(W),0.000001)": "TIES",
    "add(mul(0.000001,W),tanh(mul(1000000,add(1,X_ss))))": "TIES",
    "mul(abs(W),G_mean)": "NONFINITE",
    "mul(abs(W),G_l2)": "STAT_DEAD",
    "mul(abs(W),Hinv)": "STAT_MISSING",
    "abs(" * 17 + "W" + ")" * 17: "LIMIT",
}


def test_degenerate_candidates_get_their_reason_and_nothing_else(tmp_path):
    """Symbolic pruning metrics, check 15; a statistic that is not finite is the only way to a score that is not."""
    sound = probe()
    broken = dict(sound.inputs[0])
    broken["G_mean"] = broken["G_mean"].clone().fill_(math.nan)
    spoilt = replace(sound, inputs=(broken, *sound.inputs[1:]))
    session = Session(tmp_path / "run", probe=spoilt, dead=frozenset({"G_l2"}))
    session.search._searcher = searcher = Given(DEGENERATE)
    for text, reason in DEGENERATE.items():
        birth = session.search.next_birth()
        assert birth.job is None, text
        assert session.search.apply(birth, None)["reason"] == reason, text
    assert searcher.told == [None] * len(DEGENERATE)
    assert session.search.archive.front == [] and session.search.archive.best is None
    assert session.search.best is None and session.search.distinct == 0
    session.executor.close()


@pytest.mark.parametrize(
    ("status", "error", "reason"),
    [("invalid", "NONFINITE", "NONFINITE"), ("invalid", "TIES", "TIES"), ("timeout", "", "TIMEOUT")],
)
def test_a_candidate_without_a_fitness_never_joins(tmp_path, status, error, reason):
    session = Session(tmp_path / "run")
    session.search._searcher = searcher = Given(["mul(abs(W),X_l2)"])
    birth = session.search.next_birth()
    line = session.search.apply(birth, Outcome(birth.job.key, status, {}, error))
    assert line["reason"] == reason
    assert searcher.told == [None] and session.search.best is None and session.search.archive.front == []
    session.executor.close()


def test_the_ladder_cuts_those_that_are_worse(finished):
    """Symbolic pruning metrics, check 15: every candidate that was cut, run to the end after all."""
    racing = finished.search.racing
    assert all(row["tau"] is not None and row["n"] >= 8 for row in racing.correlations())
    evaluated = [line for line in lines(finished) if "rungs" in line]
    survivors = [line["rungs"][-1] for line in evaluated if len(line["rungs"]) == 2]
    worker = PlantedWorker()
    cut = [
        statistics.fmean(worker.distances(parse(line["expression"]))) for line in evaluated if len(line["rungs"]) == 1
    ]
    threshold = statistics.median(survivors)
    assert len(cut) > 30
    assert min(cut) > min(survivors)
    assert sum(value < threshold for value in cut) <= 0.1 * len(cut)


@pytest.mark.slow
def test_the_planted_metric_is_found(tmp_path):
    """Symbolic pruning metrics, check 14: 99 % overlap within 2,000 evaluations."""
    session = Session(tmp_path / "run")
    session.go(2000)
    assert session.overlap() >= 0.99


@pytest.mark.slow
def test_evolution_beats_random_search_at_equal_evaluations(tmp_path):
    """Symbolic pruning metrics, check 14: paired, ten seeds, p < 0.05 by an exact sign-flip test."""
    differences = []
    for seed in range(10):
        found = {}
        for searcher in ("evolution", "random"):
            session = Session(tmp_path / f"{searcher}-{seed}", seed=seed, searcher=searcher)
            session.go(250)
            found[searcher] = session.overlap()
        differences.append(found["evolution"] - found["random"])
    assert sign_flip_p(differences) < 0.05


def test_the_best_power_product_counts_whoever_found_it(finished):
    products = [
        line
        for line in lines(finished)
        if len(line.get("rungs", ())) == 2 and is_power_product(parse(line["expression"]), POWER_TERMINALS)
    ]
    best = min(products, key=lambda line: line["rungs"][-1])
    assert finished.search.power.value == best["rungs"][-1]
    assert len({line["origin"].partition(":")[0] for line in products}) > 1
