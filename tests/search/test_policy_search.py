"""The steps of a policy search, on losses that are a formula: what is measured, learned, kept and restored."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.packed import packed, unpacked
from evoprune.search.engine.executor import Outcome
from evoprune.search.learners import LEARNERS, Learner, Problem
from evoprune.search.loop import Birth
from evoprune.search.policies import Strata
from evoprune.search.policy_search import INITIALISATION, PolicySearch, Texts

N, KEPT = 24, 15
PLANTED = np.arange(N) % 8 < 3
"""Units that are worth nothing."""
TEXTS = Texts(windows=12, batch=4, validation=5)
NAMES = sorted(LEARNERS)


def search(learner: str = "score-function", **changes: Any) -> PolicySearch:
    budget = Strata(np.zeros(N, dtype=int), np.array([KEPT]))
    problem = Problem(budget, np.arange(N) // 6, np.zeros(N), np.zeros(N), steps=changes.get("steps", 40), seed=0)
    given = {
        "groups": np.arange(N) // 6,
        "texts": TEXTS,
        "objective": "kl",
        "dense": None,
        "validate_every": 5,
        "steps": 40,
        "seed": 0,
        "evaluations": 300,
        "identity": "toy",
        "payload": {"prepared": "toy"},
        **changes,
    }
    return PolicySearch(LEARNERS[learner].build(problem), **given)


def loss_of(mask: np.ndarray) -> float:
    """What is missing of the units that are worth something."""
    return float(np.sum(~mask & ~PLANTED)) / 10


def measure(birth: Birth) -> Outcome:
    """A job of the toy: windows differ a little, the same for all masks."""
    assert birth.job is not None
    payload = birth.job.payload
    level = [0.01 * (window % 3) for window in payload["windows"]]
    if birth.job.kind == "gradient":
        values = np.asarray(payload["values"])
        kl = float(np.sum((1 - values) * ~PLANTED)) / 10
        found = {"gradient": np.where(PLANTED, 0.0, -0.1).tolist()}
    else:
        kl, found = loss_of(unpacked(payload["kept"], N)), {}
    losses = [kl + extra for extra in level]
    return Outcome(birth.job.key, "ok", {"kl": losses, "nll": [2 + loss for loss in losses], **found})


def births_of(search: PolicySearch) -> list[Birth]:
    return list(iter(search.next_birth, None))


def drive(
    search: PolicySearch, answer: Callable[[Birth], Outcome] = measure, rounds: int | None = None
) -> list[dict[str, Any]]:
    """The lines of so many rounds, or of all; those of a round are applied in the order of their numbers."""
    lines = []
    for _ in itertools.count() if rounds is None else range(rounds):
        if not (births := births_of(search)):
            break
        lines += [search.apply(birth, answer(birth)) for birth in births]
    return lines


@pytest.mark.parametrize("name", NAMES)
def test_every_learner_searches_within_its_budget(name: str) -> None:
    found = search(name)
    lines = drive(found)
    assert found.stage == "over" and found.best is not None
    assert 200 < len(lines) <= 300
    assert [line["birth"] for line in lines] == list(range(len(lines)))
    assert unpacked(found.best.kept, N).sum() == KEPT
    # The finals measured everybody on all of the text, so nobody is better there by luck of the windows.
    assert found.best.fitness == min(mode.fitness for mode in found.finals if mode.fitness is not None)
    assert found.initialisation.fitness is not None and found.best.fitness <= found.initialisation.fitness


def test_planted_units_are_what_goes() -> None:
    found = search(evaluations=1500, steps=180)
    drive(found)
    assert found.best is not None
    assert set(np.flatnonzero(~unpacked(found.best.kept, N))) == set(np.flatnonzero(PLANTED))
    assert found.best.fitness == pytest.approx(np.mean([0.01 * (window % 3) for window in range(17)]))


def test_masks_of_a_step_share_their_text_and_steps_go_around_all_of_it() -> None:
    found = search()
    drive(found, rounds=1)
    seen = []
    for _ in range(3):
        births = births_of(found)
        texts = {tuple(birth.job.payload["windows"]) for birth in births if birth.job is not None}
        assert len(texts) == 1
        seen += texts.pop()
        for birth in births:
            found.apply(birth, measure(birth))
    assert sorted(seen) == list(range(TEXTS.windows))
    assert TEXTS.minibatch(0, 0) != TEXTS.minibatch(1, 0) and TEXTS.minibatch(0, 0) == TEXTS.minibatch(0, 0)


def test_modes_are_measured_on_text_that_no_step_reads() -> None:
    found = search()
    (first,) = births_of(found)
    assert first.job is not None and first.job.payload["windows"] == [12, 13, 14, 15, 16]
    line = found.apply(first, measure(first))
    assert (line["stage"], line["role"]) == (INITIALISATION, "mode")
    lines = drive(found)
    assert all(line["role"] == "mode" for line in lines if line["stage"] in ("validation", "final"))
    steps = [line["step"] for line in lines if line["stage"] == "validation"]
    assert steps and all(step % 5 == 0 or step == found.step for step in steps)


def test_equal_masks_of_a_step_are_measured_once_and_count_for_each_other() -> None:
    # One unit of two is kept: eight draws are two masks at most.
    budget = Strata(np.zeros(2, dtype=int), np.array([1]))
    problem = Problem(budget, np.zeros(2, dtype=int), np.zeros(2), np.zeros(2), steps=9, seed=0)
    learner = LEARNERS["score-function"].build(problem)
    found = PolicySearch(
        learner, groups=np.zeros(2, dtype=int), texts=TEXTS, objective="kl", dense=None, validate_every=3, steps=9,
        seed=0, evaluations=60, identity="toy", payload={},
    )  # fmt: skip

    def answer(birth: Birth) -> Outcome:
        assert birth.job is not None
        kl = 1.0 if unpacked(birth.job.payload["kept"], 2)[0] else 0.5
        return Outcome(birth.job.key, "ok", {"kl": [kl] * len(birth.job.payload["windows"]), "nll": [2.0]})

    lines = drive(found, answer)
    for step in range(found.step):
        masks = [line["mask"] for line in lines if line["stage"] == "step" and line["step"] == step]
        assert len(masks) == len(set(masks)) <= 2
    assert found.best is not None and unpacked(found.best.kept, 2).tolist() == [False, True]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rounds", [0, 1, 4])
def test_a_restored_search_goes_on_as_the_first_would_have(name: str, rounds: int) -> None:
    first = search(name, evaluations=120)
    begun = drive(first, rounds=rounds)
    # Half of a round is out, as when a session dies; its births are kept by the loop.
    births = births_of(first)
    half = births[: len(births) // 2]
    begun += [first.apply(birth, measure(birth)) for birth in half]
    state = json.loads(json.dumps(first.state()))
    second = search(name, evaluations=120)
    second.restore(state)
    rest = births[len(half) :]
    histories = []
    for one in (first, second):
        lines = [one.apply(birth, measure(birth)) for birth in rest]
        histories.append(json.dumps([*lines, *drive(one)]))
    assert histories[0] == histories[1]
    assert first.state() == second.state()


def test_losses_that_are_not_finite_are_told_to_the_learner_and_counted() -> None:
    found = search()

    def answer(birth: Birth) -> Outcome:
        assert birth.job is not None
        if birth.number % 5 == 3:
            return Outcome(birth.job.key, "invalid", error="NONFINITE")
        return measure(birth)

    lines = drive(found, answer)
    assert found.reasons["NONFINITE"] == sum(line["reason"] == "NONFINITE" for line in lines) > 20
    assert found.best is not None and unpacked(found.best.kept, N).sum() == KEPT
    assert np.isfinite(found.learner.probabilities()).all()


def test_a_model_that_every_mask_ruins_is_refused_in_one_line() -> None:
    def answer(birth: Birth) -> Outcome:
        assert birth.job is not None
        return Outcome(birth.job.key, "invalid", error="NONFINITE")

    with pytest.raises(InvalidInput, match="no mask of the first steps has a finite loss"):
        drive(search(), answer)


def test_the_residual_is_less_the_dense_loss_of_the_same_windows() -> None:
    dense = [1.5 + 0.01 * window for window in range(17)]
    found = search(objective="ce-residual", dense=dense)
    (first,) = births_of(found)
    outcome = measure(first)
    line = found.apply(first, outcome)
    expected = np.mean([nll - dense[window] for nll, window in zip(outcome.values["nll"], range(12, 17), strict=True)])
    assert line["loss"] == pytest.approx(expected)
    assert line["nll"] == pytest.approx(np.mean(outcome.values["nll"]))


def test_where_one_mask_is_left_nothing_is_sampled() -> None:
    found = search(fixed=True)
    assert [(line["stage"], line["loss"]) for line in drive(found)] == [
        (INITIALISATION, pytest.approx(found.finals[0].fitness, abs=0.01)),
        ("final", found.finals[0].fitness),
    ]
    assert found.stage == "over" and found.step == 0
    assert found.best is not None and found.best.kept == found.initialisation.kept


def test_masks_that_stand_beside_the_policy_compete_with_it() -> None:
    given = ~PLANTED
    found = search(evaluations=30, starts={"given": given})
    drive(found)
    assert found.best is not None and found.best.kept == packed(given) and found.best.step == 0
    assert found.starts["given"].fitness == found.best.fitness


def test_what_is_learned_starts_from_the_best_of_the_masks_beside_it_and_is_restored_there() -> None:
    given = ~PLANTED

    def from_mask(mask: np.ndarray) -> Learner:
        start = np.where(mask, 2.0, -2.0)
        problem = Problem(Strata(np.zeros(N, dtype=int), np.array([KEPT])), np.arange(N) // 6, start, start, 40, 0)
        return LEARNERS["score-function"].build(problem)

    def begun() -> PolicySearch:
        return search(
            evaluations=60, starts={"given": given, "worse": PLANTED | (np.arange(N) < 8)}, learner_from=from_mask
        )

    first = begun()
    drive(first, rounds=2)
    assert first.learner.mode().tolist() == given.tolist()
    second = begun()
    second.restore(json.loads(json.dumps(first.state())))
    assert json.dumps(drive(first)) == json.dumps(drive(second))
    assert first.best is not None and first.best.kept == packed(given)


def test_the_history_tells_the_means_of_every_step_and_snapshots_of_all_units() -> None:
    found = search(steps=400)
    lines = drive(found)
    assert lines[0]["policy"]["units"] == pytest.approx([KEPT / N] * N)
    notes = [line["policy"] for line in lines if line["stage"] == "step" and "policy" in line]
    assert len(notes) == found.step
    assert [len(note["groups"]) for note in notes] == [4] * found.step
    shown = [step for step, note in enumerate(notes) if "units" in note]
    # Every tenth step and the last.
    assert shown == [*range(9, found.step - 1, 10), found.step - 1]
    last = notes[shown[-1]]
    assert np.asarray(last["units"]).reshape(4, 6).mean(1) == pytest.approx(last["groups"], abs=1e-3)
    assert sum(last["units"]) == pytest.approx(KEPT, abs=0.01)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 100])
def test_masks_travel_as_packed_bits(n: int) -> None:
    mask = np.random.default_rng(n).random(n) < 0.5
    assert unpacked(packed(mask), n).tolist() == mask.tolist()
