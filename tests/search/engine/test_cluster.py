"""Searches on a cluster of several raylets with a cache folder each, through the command line, with a token."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.models import save_tiny
from tests.search.engine.clusters import LocalCluster, local_cluster

pytestmark = [pytest.mark.ray, pytest.mark.slow]

CONFIG = """\
data: {source: text.txt, window: 32, heldout_windows: 4, calibration_window: 32, calibration_sequences: 4}
racing: {rungs: [1, 2, 4]}
searcher: {population: 8, islands: 2, power_budget: 4}
statistics: [X_l2, X_l1, G_l2]
"""
TEXT = "\n".join(f"line {index}: {index * index % 97} apples." for index in range(6000))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    folder = tmp_path_factory.mktemp("cluster")
    save_tiny(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    (folder / "small.yaml").write_text(CONFIG)
    with local_cluster(folder) as cluster:
        cluster.add("a")
        cluster.add("b")
        yield cluster


def command(cluster: LocalCluster, run: str, *words: str) -> list[str]:
    search = ["search", "metric", "model", "--config", "small.yaml", "--run-dir", run]
    return [sys.executable, "-m", "evoprune", *search, "--address", cluster.address, *words]


def search(cluster: LocalCluster, run: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(cluster, run, *words),
        cwd=cluster.folder,
        env={**cluster.environment, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def events(cluster: LocalCluster, run: str, event: str) -> list[dict[str, object]]:
    path = cluster.folder / run / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [found for line in lines if (found := json.loads(line))["event"] == event]


def test_nodes_come_and_go_and_the_history_is_that_of_one_process(cluster: LocalCluster) -> None:
    """Engine list 4: a node is killed, another joins, `--workers` follows; 18: the token is nowhere."""
    budget = ("--evaluations", "400")
    with (cluster.folder / "elastic.err").open("w") as stream:
        driver = subprocess.Popen(
            command(cluster, "elastic", *budget), cwd=cluster.folder, env=cluster.environment, stderr=stream
        )
    try:
        wait_for(lambda: len(events(cluster, "elastic", "worker_ready")) == 2, driver)
        words = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        cluster.remove("b")
        cluster.add("c")
        assert driver.wait(timeout=600) == 0
    finally:
        driver.kill()
        driver.wait()
    assert {event["loss"] for event in events(cluster, "elastic", "worker_lost")} <= {"node", "died"}
    inline = search(cluster, "inline", *budget, "--executor", "inline")
    assert inline.returncode == 0, inline.stderr
    histories = [(cluster.folder / run / "history.jsonl").read_bytes() for run in ("elastic", "inline")]
    assert histories[0] == histories[1]

    # What nodes received are files of their own, equal to the driver's.
    (prepared,) = {json.loads((cluster.folder / "elastic" / "run.json").read_text())["files"]}
    for node in ("a", "driver"):
        received = cluster.folder / node / "parcels" / prepared / "search.safetensors"
        assert received.is_file(), node
    model = next((cluster.folder / "a" / "parcels").glob("model-*")) / "model.safetensors"
    assert not model.is_symlink()

    assert cluster.token not in words
    written = [path for run in ("elastic", "inline") for path in (cluster.folder / run).rglob("*") if path.is_file()]
    assert [path for path in written if cluster.token.encode() in path.read_bytes()] == []
    assert cluster.token not in (cluster.folder / "elastic.err").read_text()


def wait_for(condition: object, driver: subprocess.Popen[bytes]) -> None:
    give_up = time.monotonic() + 300
    while not condition():  # type: ignore[operator]
        assert driver.poll() is None, "the search ended early"
        assert time.monotonic() < give_up
        time.sleep(0.1)


def test_a_cluster_is_not_entered_without_its_token(cluster: LocalCluster) -> None:
    """Engine list 17: evoprune refuses without a token, Ray with a wrong one."""
    bare = search(cluster, "bare", "--evaluations", "8", RAY_AUTH_MODE="", RAY_AUTH_TOKEN="")
    assert bare.returncode == 2
    assert "needs a token" in bare.stderr
    wrong = search(cluster, "wrong", "--evaluations", "8", RAY_AUTH_TOKEN="0" * 64)
    assert wrong.returncode == 3
    assert "Traceback" not in wrong.stderr


STALE = """
import sys
from pathlib import Path
from evoprune.search.engine import admission, ray as engine_ray
from evoprune.cli import main

def changed(scratch):
    import shutil
    folder = scratch / "evoprune"
    shutil.copytree(ours(scratch / "links"), folder)
    (folder / "metrics" / "errors.py").open("a").write("# changed\\n")
    return folder

ours, engine_ray.package_folder = engine_ray.package_folder, changed
def made(scratch, inner=ours):
    scratch.mkdir()
    return inner(scratch)
ours = made
sys.exit(main(sys.argv[1:]))
"""


def test_a_node_with_other_code_is_refused(cluster: LocalCluster) -> None:
    """Engine list 16: the driver sends a package whose code is not its own, as a stale copy on a node would be."""
    program = cluster.folder / "stale.py"
    program.write_text(STALE)
    words = command(cluster, "stale", "--evaluations", "8")[3:]
    done = subprocess.run(
        [sys.executable, str(program), *words],
        cwd=cluster.folder,
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 3, done.stderr
    assert "no worker may take part: its evoprune" in done.stderr
    assert os.fspath(cluster.folder) not in done.stderr.rpartition("error:")[2].partition("continue with")[0]
