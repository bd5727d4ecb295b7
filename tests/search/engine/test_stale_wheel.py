"""Code that changed under the same version: what a cluster has kept of the older build never works on a search."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.models import save_tiny
from tests.search.engine.clusters import LocalCluster, local_cluster
from tests.search.engine.test_cluster import CONFIG, TEXT
from tests.wheels import build_wheel

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    folder = tmp_path_factory.mktemp("cluster")
    save_tiny(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    (folder / "small.yaml").write_text(CONFIG)
    # Ray installs wheels with the `pip` that it finds, which shall download nothing.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with local_cluster(folder) as cluster:
        cluster.add("head", 2, PATH=path, PIP_NO_DEPS="1", PIP_NO_INDEX="1")
        yield cluster


def unpacked(wheel: Path) -> Path:
    """A folder to import a wheel's packages from, as a driver's machine has them."""
    folder = wheel.parent / "installed"
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def search(cluster: LocalCluster, run: str, installed: Path, wheel: Path | None) -> subprocess.CompletedProcess[str]:
    """A search by a driver that has `installed`, whose workers get `wheel` as in a job that was submitted with it."""
    environment = {**cluster.environment, "PYTHONPATH": str(installed)}
    if wheel is not None:
        environment["RAY_JOB_CONFIG_JSON_ENV_VAR"] = json.dumps({"runtime_env": {"py_modules": [str(wheel)]}})
    words = ["search", "metric", "model", "--config", "small.yaml", "--evaluations", "8", "--run-dir", run]
    return subprocess.run(
        [sys.executable, "-m", "evoprune", *words, "--address", cluster.address, "--workers", "1"],
        cwd=cluster.folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_a_wheel_that_ray_has_kept_by_its_name_is_refused(cluster: LocalCluster, tmp_path: Path) -> None:
    """Engine list 16: Ray keeps wheels by file name, so the second build of a version would never arrive."""

    def edit(tree: Path) -> None:
        with (tree / "metrics" / "errors.py").open("a") as file:
            file.write("# changed\n")

    wheels = []
    for name, change in (("first", lambda tree: None), ("second", edit)):
        (tmp_path / name).mkdir()
        wheels.append(build_wheel(tmp_path / name, change))
    first, second = wheels
    assert first.name == second.name
    done = search(cluster, "first", unpacked(first), first)
    assert done.returncode == 0, done.stderr
    stale = search(cluster, "second", unpacked(second), second)
    assert stale.returncode == 3, stale.stderr
    assert "no worker may take part: its evoprune (code " in stale.stderr.splitlines()[-1]
    assert "is not this process's" in stale.stderr.splitlines()[-1]
    assert not (cluster.folder / "second" / "history.jsonl").exists()
    # What evoprune sends by itself is named by its content.
    fresh = search(cluster, "fresh", second.parent / "installed", None)
    assert fresh.returncode == 0, fresh.stderr
