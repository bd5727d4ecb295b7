"""No metric can alter what the workers of a machine share, whatever it does to its inputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from evoprune.metrics.files import file_hash
from evoprune.search.config import resolve
from evoprune.search.rundir import RunDirectory
from tests.search.whole_runs import history, lines_of, result_of, tiny_options

ROOT = Path(__file__).parents[2]

DRIVER = """
import json, sys
from pathlib import Path
import tests.search.in_place
from evoprune.search.config import validated
from evoprune.search.engine import dispatch
from evoprune.search.metric_run import MetricRun
from evoprune.search.session import start_search
from evoprune.search.worker_session import Resources

if __name__ == "__main__":
    config, folder, watched = validated(json.loads(sys.argv[1])), Path(sys.argv[2]), sys.argv[3] == "watched"
    dispatch.AUDIT_EVERY = 4
    if watched:
        MetricRun.worker_factory = "tests.search.in_place:build"
    start_search(config, Resources(workers=2) if watched else Resources(executor="inline"), run_dir=folder)
"""


def search(config: str, folder: Path, watched: bool) -> RunDirectory:
    command = [sys.executable, "-c", DRIVER, config, str(folder), "watched" if watched else "alone"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "TEST_CHECKSUMS": str(folder.with_suffix(".log"))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return RunDirectory.open(folder)


@pytest.mark.ray
@pytest.mark.slow
def test_a_metric_that_writes_into_its_inputs_changes_nothing_else(world: Path, tmp_path: Path) -> None:
    """Engine list 11: statistics file, the checksum in every worker, audits, and the history itself."""
    config = resolve(
        overrides={
            **tiny_options(world),
            "racing.rungs": [2, 4, 8],
            "evaluations": 40,
            "searcher.population": 8,
            "searcher.seeds": ["halved", "wanda"],
            "statistics": ["X_l2", "X_l1", "G_l2"],
        }
    ).model_dump_json()
    alone = search(config, tmp_path / "alone", watched=False)
    files = sorted(path for path in (world / "cache").rglob("*.safetensors") if not path.is_symlink())
    before = [file_hash(path) for path in files]
    assert any(path.parent.name == "statistics" for path in files)
    run = search(config, tmp_path / "watched", watched=True)

    measured = [line["expression"] for line in lines_of(run) if line.get("rungs")]
    assert any("halve" in expression for expression in measured)
    assert [file_hash(path) for path in files] == before
    seen = [json.loads(line) for line in (tmp_path / "watched.log").read_text().splitlines()]
    assert len({entry["checksum"] for entry in seen}) == 1
    by_job = {entry["job"]: {other["pid"] for other in seen if other["job"] == entry["job"]} for entry in seen}
    assert len({entry["pid"] for entry in seen}) == 2
    assert sum(len(pids) == 2 for pids in by_job.values()) >= 3  # audited, and the two agreed
    assert history(run) == history(alone)
    assert result_of(run)["best"] == result_of(alone)["best"]
