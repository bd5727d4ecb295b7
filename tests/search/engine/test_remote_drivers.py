"""Searches whose driver is not where they were started: a submitted job, and a client of the cluster."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.models import save_tiny
from tests.search.engine.clusters import LocalCluster, free_port, local_cluster
from tests.search.engine.test_cluster import CONFIG, TEXT

pytestmark = [pytest.mark.ray, pytest.mark.slow]

BUDGET = ("--evaluations", "24")


@pytest.fixture(scope="module")
def ports() -> dict[str, int]:
    return {"dashboard": free_port(), "client": free_port()}


@pytest.fixture(scope="module")
def cluster(ports: dict[str, int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """One node with Ray's dashboard, which takes jobs, and its server for clients."""
    for module in ("aiohttp", "opencensus", "grpc"):
        pytest.importorskip(module, reason="needs evoprune[cluster]")
    folder = tmp_path_factory.mktemp("cluster")
    save_tiny(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    (folder / "small.yaml").write_text(CONFIG.replace("text.txt", str(folder / "text.txt")))
    options = ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={ports['dashboard']}"]
    # Any other Ray on this machine holds the default port, and without its own the head's agent takes no jobs.
    options += [f"--dashboard-agent-listen-port={free_port()}"]
    with local_cluster(folder) as cluster:
        cluster.add("head", 2, options=[*options, f"--ray-client-server-port={ports['client']}"])
        yield cluster


@pytest.fixture(scope="module")
def history(cluster: LocalCluster) -> bytes:
    """That of the same search in one process."""
    run(cluster, *search(cluster, "alone"), "--executor", "inline")
    return (cluster.folder / "alone" / "history.jsonl").read_bytes()


def search(cluster: LocalCluster, name: str) -> list[str]:
    """Paths are whole, for a job starts in a folder of its own."""
    folder = cluster.folder
    config = ["--config", str(folder / "small.yaml"), "--run-dir", str(folder / name)]
    return [sys.executable, "-m", "evoprune", "search", "metric", str(folder / "model"), *config, *BUDGET]


def run(cluster: LocalCluster, *words: str) -> str:
    done = subprocess.run(
        words, env=cluster.environment, cwd=cluster.folder, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_a_submitted_job_drives_the_search_on_the_head(
    cluster: LocalCluster, ports: dict[str, int], history: bytes
) -> None:
    address = f"http://127.0.0.1:{ports['dashboard']}"
    wait_for_agent(cluster, address)
    submit = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", address, "--"]
    assert "succeeded" in run(cluster, *submit, *search(cluster, "job"), "--address", "auto")
    assert (cluster.folder / "job" / "history.jsonl").read_bytes() == history


def wait_for_agent(cluster: LocalCluster, address: str) -> None:
    """Until the head takes jobs: the process that starts them comes up after all others."""
    token = {"Authorization": f"Bearer {cluster.token}", "Content-Type": "application/json"}
    job = urllib.request.Request(f"{address}/api/jobs/", json.dumps({"entrypoint": "true"}).encode(), token)
    give_up = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(job, timeout=60) as answer:
                assert answer.status == 200
                return
        except urllib.error.HTTPError as refused:
            assert b"No available agent" in refused.read()
            assert time.monotonic() < give_up
            time.sleep(1)


def test_a_client_drives_the_search_from_outside(
    cluster: LocalCluster, ports: dict[str, int], history: bytes, tmp_path: Path
) -> None:
    run(cluster, *search(cluster, "client"), "--address", f"ray://127.0.0.1:{ports['client']}")
    assert (cluster.folder / "client" / "history.jsonl").read_bytes() == history


def test_the_dashboard_asks_for_the_token(cluster: LocalCluster, ports: dict[str, int]) -> None:
    address = f"http://127.0.0.1:{ports['dashboard']}/api/version"
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(address, timeout=30)
    assert refused.value.code == 401
    known = urllib.request.Request(address, headers={"Authorization": f"Bearer {cluster.token}"})
    with urllib.request.urlopen(known, timeout=30) as answer:
        assert answer.status == 200
