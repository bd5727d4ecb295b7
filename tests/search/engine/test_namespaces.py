"""A cluster of three hosts with networks of their own (Linux namespaces): who may join, and a cable that is pulled.

Engine list 17. As root on Linux only: elsewhere nobody may make a network.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.models import save_tiny
from tests.search.engine.clusters import Host, LocalCluster, local_cluster, namespaces, set_cable
from tests.search.engine.test_cluster import CONFIG, TEXT

pytestmark = [pytest.mark.ray, pytest.mark.slow]

OUTAGE_SECONDS = 70.0


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the command ip")
    with namespaces(3) as made:
        yield made


@pytest.fixture(scope="module")
def cluster(hosts: list[Host], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """The head on the first host, without room for workers; room for one on each of the others."""
    folder = tmp_path_factory.mktemp("cluster")
    save_tiny(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    (folder / "small.yaml").write_text(CONFIG)
    with local_cluster(folder, hosts[0]) as cluster:
        for name, cpus, host in zip(("head", "b", "c"), (0, 1, 1), hosts, strict=True):
            (folder / "home" / name).mkdir(parents=True)
            cluster.add(name, cpus, host, HOME=str(folder / "home" / name))
        yield cluster


def search(cluster: LocalCluster, host: Host, run: str, *words: str) -> list[str]:
    command = ["search", "metric", "model", "--config", "small.yaml", "--run-dir", run, "--evaluations", "60"]
    return [*host.prefix, sys.executable, "-m", "evoprune", *command, *words]


def test_nobody_joins_or_asks_without_the_token(cluster: LocalCluster, hosts: list[Host]) -> None:
    with pytest.raises(RuntimeError, match=r"(?i)authenticat|token"):
        cluster.add("stranger", 1, hosts[2], RAY_AUTH_TOKEN="0" * 64)
    bare = {name: value for name, value in cluster.environment.items() if not name.startswith("RAY_AUTH")}
    bare["HOME"] = str(cluster.folder)
    words = search(cluster, hosts[0], "bare", "--address", cluster.address)
    refused = subprocess.run(words, env=bare, cwd=cluster.folder, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2
    assert "needs a token" in refused.stderr
    status = [sys.executable, "-m", "ray.scripts.scripts", "status", f"--address={cluster.address}"]
    known = subprocess.run([*hosts[1].prefix, *status], env=cluster.environment, capture_output=True, timeout=120)
    asked = subprocess.run([*hosts[1].prefix, *status], env=bare, capture_output=True, timeout=120)
    assert known.returncode == 0
    assert asked.returncode != 0
    assert b"CPU" not in asked.stdout


def test_a_search_survives_a_cable_that_is_out_for_a_minute(cluster: LocalCluster, hosts: list[Host]) -> None:
    run = cluster.folder / "run"
    with (cluster.folder / "run.err").open("w") as errors:
        driver = subprocess.Popen(
            search(cluster, hosts[0], "run", "--address", cluster.address),
            env=cluster.environment,
            cwd=cluster.folder,
            stderr=errors,
        )
    try:
        wait_until_both_work(run, driver)
        set_cable(hosts[0], hosts[2], "down")
        time.sleep(OUTAGE_SECONDS)
        set_cable(hosts[0], hosts[2], "up")
        assert driver.wait(timeout=600) == 0, (cluster.folder / "run.err").read_text()[-2000:]
    finally:
        driver.kill()
        driver.wait()
    alone = search(cluster, hosts[0], "alone", "--executor", "inline")
    subprocess.run(alone, env=cluster.environment, cwd=cluster.folder, check=True, capture_output=True, timeout=600)
    assert (run / "history.jsonl").read_bytes() == (cluster.folder / "alone" / "history.jsonl").read_bytes()


def wait_until_both_work(run: Path, driver: subprocess.Popen[bytes]) -> None:
    give_up = time.monotonic() + 300
    while sum(event == "worker_ready" for event in events(run)) < 2:
        assert driver.poll() is None, "the search ended early"
        assert time.monotonic() < give_up
        time.sleep(0.1)


def events(run: Path) -> list[str]:
    path = run / "events.jsonl"
    return [json.loads(line)["event"] for line in path.read_text().splitlines()] if path.exists() else []
