"""Who may work on a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evoprune.metrics.errors import WorkersFailed
from evoprune.search.engine.admission import Admission
from evoprune.search.engine.crew import room
from evoprune.search.engine.executor import Job, evaluate
from evoprune.search.engine.inline import InlineExecutor
from evoprune.search.identity import code_hash

HERE = str(Path(__file__).parent)


def report(threads: int = 1, loss: float = 3.0, bits: str = "00") -> dict[str, Any]:
    return {"class": {"threads": threads, "device": "cpu"}, "loss": loss, "bits": bits}


def test_the_first_worker_sets_what_the_others_must_be() -> None:
    admission = Admission()
    assert admission.refusal(code_hash(), report()) is None
    assert admission.refusal(code_hash(), report()) is None
    assert "threads is 2, not 1" in (admission.refusal(code_hash(), report(threads=2)) or "")
    assert "canary gives 01, not 00" in (admission.refusal(code_hash(), report(bits="01")) or "")
    assert not admission.mixed


def test_relaxed_takes_another_class_but_no_broken_one_and_remembers() -> None:
    admission = Admission("relaxed", expected=report())
    assert admission.refusal(code_hash(), report(threads=2, loss=3.01, bits="02")) is None
    assert admission.mixed
    assert "no rounding" in (admission.refusal(code_hash(), report(loss=4.0, bits="03")) or "")
    assert "no rounding" in (admission.refusal(code_hash(), report(loss=float("nan"), bits="04")) or "")


def test_a_run_with_times_in_it_takes_one_kind_of_device() -> None:
    """Another processor computes the same bits here; another GPU would be taken by relaxed numerics."""
    first, other = {**report(), "processor": "A 100"}, {**report(), "processor": "B 200"}
    assert Admission(expected=first).refusal(code_hash(), other) is None
    timed = Admission("relaxed", expected=first, one_device=True)
    assert timed.refusal(code_hash(), dict(first)) is None
    assert timed.refusal(code_hash(), other) == (
        "it runs on cpu with B 200, and this search measures times on cpu with A 100: give it workers of one kind of "
        "device"
    )
    gpu = {**first, "class": {"threads": 1, "device": "cuda X"}}
    assert "it runs on cuda X with A 100" in (timed.refusal(code_hash(), gpu) or "")
    assert not timed.mixed


def test_other_code_is_refused_whatever_the_policy() -> None:
    assert "is not this process's" in (Admission("relaxed").refusal("0" * 64, None) or "")


def test_an_inline_worker_of_another_class_ends_the_run() -> None:
    executor = InlineExecutor(
        "fake_workers:build",
        {"numerics": report(threads=2)},
        python_path=[HERE],
        admission=Admission(expected=report()),
    )
    executor.start()
    with pytest.raises(WorkersFailed, match="threads is 2, not 1") as caught:
        evaluate(executor, [Job("k", "square", {"x": 1})])
    assert caught.value.exit_code == 3


class Nodes:
    def nodes(self) -> list[dict[str, Any]]:
        return [
            {"Alive": True, "NodeID": "head", "Resources": {"memory": 1.0}},
            {"Alive": True, "NodeID": "a", "Resources": {"CPU": 8.0, "GPU": 2.0}},
            {"Alive": True, "NodeID": "b", "Resources": {"CPU": 3.0, "GPU": 1.0}},
            {"Alive": False, "NodeID": "c", "Resources": {"CPU": 64.0, "GPU": 8.0}},
        ]


@pytest.mark.parametrize(
    ("cpus", "gpus", "refused", "expected"),
    [(1, 0, (), 11), (2, 0, (), 5), (1, 1, (), 3), (1, 0.5, (), 6), (1, 0.6, (), 3), (1, 2, (), 1), (1, 1, ("a",), 1)],
)
def test_room_is_what_living_nodes_hold(cpus: int, gpus: float, refused: tuple[str, ...], expected: int) -> None:
    assert room(Nodes(), {"num_cpus": cpus, "num_gpus": gpus}, refused) == expected
