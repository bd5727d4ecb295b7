"""The contract of executors, on the one that needs nothing; `test_ray.py` holds Ray to the same outcomes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from evoprune.metrics.errors import AuditFailed, NoCapacity
from evoprune.search.engine.executor import Job, Outcome, evaluate
from evoprune.search.engine.inline import InlineExecutor
from evoprune.search.signals import stop_if_insisted, stop_on_signals

HERE = str(Path(__file__).parent)


def inline(**context: object) -> InlineExecutor:
    executor = InlineExecutor("fake_workers:build", dict(context), python_path=[HERE])
    executor.start()
    return executor


def test_outcomes_come_in_the_order_of_the_jobs_and_equal_keys_run_once() -> None:
    jobs = [Job(f"k{x % 7}", "square", {"x": x % 7}) for x in range(20)]
    seen: list[str] = []
    outcomes = evaluate(inline(offset=1), jobs, lambda outcome: seen.append(outcome.key))
    assert [outcome.values["fitness"] for outcome in outcomes] == [(x % 7) ** 2 + 1 for x in range(20)]
    assert sorted(seen) == sorted({job.key for job in jobs})
    assert outcomes[0].values["pair"] == [1, 2]  # through JSON, as from another process


@pytest.mark.parametrize(
    ("kind", "status", "error"),
    [
        ("invalid", "invalid", "TIES"),
        ("nan", "invalid", "NONFINITE"),
        ("broken", "error", "ZeroDivisionError: as ordered"),
        ("not_json", "error", "TypeError"),
        ("unknown", "error", "AttributeError"),
        ("memory", "oom", "MemoryError"),
        ("leave", "crash", "sys.exit(3)"),
    ],
)
def test_whatever_a_candidate_does_is_an_outcome(kind: str, status: str, error: str) -> None:
    bad, good = evaluate(inline(), [Job("bad", kind, {}), Job("good", "square", {"x": 3})])
    assert bad.status == status
    assert error in bad.error
    assert bad.values == {}
    assert good.values["fitness"] == 9


def test_long_errors_keep_their_end() -> None:
    (outcome,) = evaluate(inline(), [Job("k", "broken", {"text": "x" * 10_000})])
    assert len(outcome.error.encode()) <= 4096
    assert outcome.error.endswith("ZeroDivisionError: as ordered")


def test_a_worker_cannot_change_what_the_driver_holds() -> None:
    payload = {"x": 1}
    evaluate(inline(), [Job("k", "spoil", payload)])
    assert payload == {"x": 1}


def test_an_open_key_is_not_queued_twice_but_an_answered_one_may_run_again() -> None:
    executor = inline()
    executor.submit([Job("k", "square", {"x": 1})] * 2)
    assert len(executor.poll(0)) == 1
    assert executor.poll(0) == []
    executor.submit([Job("k", "square", {"x": 1})])
    assert len(executor.poll(0)) == 1


def test_an_interrupted_job_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    executor = inline()
    executor.submit([Job("k", "square", {"x": 2})])
    executor.poll(0)
    executor.submit([Job("again", "square", {"x": 2})])
    assert executor._worker is not None

    def interrupt(kind: str, payload: dict[str, object]) -> dict[str, object]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(executor._worker, "handle", interrupt)
        with pytest.raises(KeyboardInterrupt):
            executor.poll(0)
    assert [outcome.key for outcome in executor.poll(0)] == ["again"]


def test_a_job_whose_interruption_was_misread_stays_open() -> None:
    executor = inline()
    executor.submit([Job("a", "misread", {}), Job("b", "square", {"x": 2})])
    with stop_on_signals(), pytest.raises(KeyboardInterrupt):
        executor.poll(1.0)
    assert list(executor._queue) == ["a", "b"]
    stop_if_insisted()  # outside the block nothing is left of it


@pytest.mark.parametrize("kind", ["device", "lost_file"])
def test_a_broken_machine_is_not_the_candidates_fault(kind: str, tmp_path: Path) -> None:
    executor = inline()
    executor.submit([Job("k", kind, {"marker": str(tmp_path / "marker")})])
    with pytest.raises(NoCapacity, match=r"the device failed: (RuntimeError: CUDA error|FileNotFoundError)") as caught:
        executor.poll(0)
    assert caught.value.exit_code == 75


def test_a_worker_that_finds_its_model_changed_stops_the_search() -> None:
    executor = inline()
    executor.submit([Job("k", "changed", {})])
    with pytest.raises(AuditFailed, match="differs"):
        executor.poll(0)


def test_draining_forgets_what_waits() -> None:
    executor = inline()
    executor.submit([Job("k", "square", {"x": 1})])
    executor.drain()
    assert executor.poll(0) == []


def test_what_is_not_json_is_refused_at_the_door() -> None:
    with pytest.raises(ValueError, match="JSON"):
        inline().submit([Job("k", "square", {"x": float("nan")})])


def test_torch_threads_are_set_for_the_run_and_given_back() -> None:
    before = torch.get_num_threads()
    executor = InlineExecutor("fake_workers:build", {}, threads=before + 1, python_path=[HERE])
    executor.start()
    evaluate(executor, [Job("k", "square", {"x": 1})])
    assert torch.get_num_threads() == before + 1
    executor.close()
    assert torch.get_num_threads() == before


def test_jobs_and_outcomes_go_through_json_unchanged() -> None:
    job = Job("k", "square", {"x": [1, {"y": 0.1}]}, deadline=2.5)
    assert Job.from_json(job.to_json()) == job
    outcome = Outcome("k", "oom", {"a": 1.5}, "text", {"seconds": 0.5})
    assert Outcome.from_json(outcome.to_json()) == outcome
    with pytest.raises(ValueError, match="unknown status"):
        Outcome.from_json({**outcome.to_json(), "status": "fine"})


def test_inline_needs_neither_ray_nor_torch() -> None:
    program = f"""
import sys
sys.modules["ray"] = sys.modules["torch"] = None
from evoprune.search.engine.executor import Job, evaluate
from evoprune.search.engine.inline import InlineExecutor
from evoprune.search.signals import stop_if_insisted, stop_on_signals
executor = InlineExecutor("fake_workers:build", {{}}, python_path=[{HERE!r}])
executor.start()
print(evaluate(executor, [Job("k", "square", {{"x": 5}})])[0].values["fitness"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "25\n"
