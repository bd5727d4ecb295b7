"""The board in PostgreSQL: a real server that goes away for half a minute while the search goes on."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import optuna
import pytest

from evoprune.search.config import resolve
from evoprune.search.publishing import publish_result, rebuild_board
from evoprune.search.rundir import RunDirectory
from evoprune.search.session import resume_search
from evoprune.search.trials_metric import MetricTrials
from evoprune.search.worker_session import Resources
from tests.models import save_tiny
from tests.search.postgres import PASSWORD, Postgres, running_postgres

OUTAGE_SECONDS = 30.0


@pytest.fixture(scope="module")
def postgres() -> Postgres:
    with running_postgres() as server:
        yield server


def wait_for_history(run: RunDirectory, births: int) -> int:
    """Wait until so many births are committed; how many there are then."""
    give_up = time.monotonic() + 240
    while (found := sum(1 for _ in run.history())) < births:
        assert time.monotonic() < give_up, f"{found} births only"
        time.sleep(0.2)
    return found


def trials(url: str, name: str) -> list[tuple[object, ...]]:
    """Number, state, value, rungs and attributes of a study's trials; times where a fitness names the evaluation."""
    study = optuna.load_study(study_name=name, storage=url)
    return [
        (trial.number, trial.state, trial.values, trial.intermediate_values, trial.user_attrs,
         trial.datetime_start if trial.intermediate_values else None)
        for trial in study.trials
    ]  # fmt: skip


@pytest.mark.slow
def test_a_server_that_is_away_delays_the_board_and_not_the_search(
    postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVOPRUNE_CACHE", str(tmp_path / "cache"))
    options = {
        "model.name": str(save_tiny(tmp_path / "model")),
        # Evaluations that take a while, so that the board has hundreds of trials at the end and not thousands.
        "data.window": 64,
        "data.calibration_window": 32,
        "data.calibration_sequences": 4,
        "data.heldout_windows": 4,
        "racing.rungs": [32, 64, 128],
        "minutes": 0.9,  # the outage is over long before
    }
    config = resolve(overrides=options)
    assert config.evaluations is None
    run = RunDirectory.create("metric", config.model_dump(mode="json"), {}, run_dir=tmp_path / "run")
    search = threading.Thread(
        target=resume_search, args=(run, Resources(executor="inline", storage=postgres.url)), daemon=True
    )
    search.start()
    watcher = RunDirectory(run.path)
    before = wait_for_history(watcher, 16)
    time.sleep(1)
    postgres.stop()
    stopped = time.monotonic()
    during = wait_for_history(watcher, before + 1)
    time.sleep(max(0.0, OUTAGE_SECONDS - (time.monotonic() - stopped)))
    at_the_end = sum(1 for _ in watcher.history())
    postgres.start()
    assert at_the_end > during > before, "the search stood still"
    assert search.is_alive(), "the search was over before the server came back"
    search.join(timeout=240)

    assert watcher.state == "finished"
    history = list(watcher.history())
    expected = list(MetricTrials(3).records(history))
    study = optuna.load_study(study_name=run.run_id, storage=postgres.url)
    assert [trial.number for trial in study.trials] == list(range(len(expected)))
    assert [trial.user_attrs for trial in study.trials] == [dict(record.attributes) for record in expected]
    assert [list(trial.intermediate_values.values()) for trial in study.trials] == [
        list(record.rungs.values()) for record in expected
    ]
    said = [event["text"] for event in watcher.read_events() if event["event"] == "board_trouble"]
    assert "the search goes on" in said[0]
    assert said[1:] == ["the board's storage answers again"]

    publish_result(watcher, postgres.url)
    before_rebuild = [trials(postgres.url, name) for name in (run.run_id, f"{run.run_id}/front")]
    rebuild_board(watcher, postgres.url)
    assert [trials(postgres.url, name) for name in (run.run_id, f"{run.run_id}/front")] == before_rebuild

    assert watcher.storage is not None and "***" in watcher.storage
    for path in run.path.rglob("*"):
        assert not path.is_file() or PASSWORD.encode() not in path.read_bytes(), path
