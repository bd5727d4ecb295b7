"""Losses that are infinite, workers that die, hang or take their time: a policy search goes on, and says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evoprune.fitness.policy_file import read_policy
from evoprune.search.config import resolve_as
from evoprune.search.config_policy import PolicySearchConfig
from evoprune.search.policy_run import PolicyRun
from evoprune.search.rundir import RunDirectory
from evoprune.search.session import start_search
from evoprune.search.worker_session import Resources
from tests.search.whole_runs import lines_of, result_of, tiny_options

EVALUATIONS = 60
INLINE = Resources(executor="inline")


@pytest.fixture
def faults(world: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Workers have these faults from now on, and no others."""
    monkeypatch.setattr(PolicyRun, "worker_factory", "tests.search.faulty_policy:build")
    folder = world / "faults"

    def have(*names: str) -> None:
        folder.mkdir(exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        for name in names:
            (folder / name).touch()

    return have


def config(world: Path, **changes: Any) -> PolicySearchConfig:
    options = {
        **tiny_options(world),
        "target.units": ["query-head", "neurons:8"],
        "target.budget": "kind",
        "searcher.windows": 6,
        "searcher.batch": 2,
        "searcher.validation": 3,
        "searcher.validate_every": 3,
        "searcher.samples": 4,
        "searcher.baselines": [],
        "evaluations": EVALUATIONS,
        **changes,
    }
    return resolve_as(PolicySearchConfig, overrides=options)


def check(run: RunDirectory) -> list[dict[str, Any]]:
    """A finished search within its budget whose policy is one of numbers; its failed masks, each with an event."""
    lines, policy, state = lines_of(run), read_policy(run.path / "export" / "policy.json"), run.peek()
    assert run.state == "finished" and state is not None
    assert result_of(run)["evaluations"] == len(lines) <= EVALUATIONS
    assert np.isfinite(state["search"]["learner"]["phi"]).all()
    kinds = np.array([row.kind == "query-head" for row in policy.table.rows])[policy.table.groups]
    for mask in [policy.mask, *(policy.table.unpacked(line["kept"]) for line in lines)]:
        assert (int(mask[kinds].sum()), int(mask[~kinds].sum())) == (4, 6)
    failed = [line for line in lines if line["reason"] is not None]
    assert all(line["loss"] is None for line in failed)
    told = [(event["birth"], event["reason"]) for event in run.read_events() if event["event"] == "mask_failed"]
    assert told == [(line["birth"], line["reason"]) for line in failed]
    counts = result_of(run)["reasons"]
    assert sum(counts.values()) == len(failed)
    assert result_of(run)["best"]["fitness"] < np.inf
    return failed


def test_infinite_losses_and_a_worker_that_leaves(world: Path, faults: Callable[..., None], tmp_path: Path) -> None:
    faults("infinite", "leave")
    failed = check(start_search(config(world), INLINE, run_dir=tmp_path / "run"))
    reasons = [line["reason"] for line in failed]
    assert reasons[0] == "WORKER_LOST" and set(reasons[1:]) == {"NONFINITE"}
    assert {line["stage"] for line in failed[1:]} >= {"step"}


@pytest.mark.ray
@pytest.mark.slow
def test_workers_that_die_hang_or_take_their_time(world: Path, faults: Callable[..., None], tmp_path: Path) -> None:
    faults("infinite")
    inline = lines_of(start_search(config(world), INLINE, run_dir=tmp_path / "inline"))
    faults("infinite", "slow", "die", "stuck")
    run = start_search(config(world, deadline=2), Resources(executor="ray", workers=2), run_dir=tmp_path / "ray")
    failed, lines = check(run), lines_of(run)
    (stuck,) = [line["birth"] for line in failed if line["reason"] == "TIMEOUT"]
    # Who dies or is slow changes nothing; up to the mask that hangs the history is that of nobody's faults.
    assert lines[:stuck] == inline[:stuck]
    losses = [event["loss"] for event in run.read_events() if event["event"] == "worker_lost"]
    assert losses[0] == "died" and set(losses[1:]) == {"deadline"}
