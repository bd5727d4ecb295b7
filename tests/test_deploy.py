"""The files in deploy/: well formed, and with commands that evoprune understands."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from evoprune.cli import main
from evoprune.search.engine.address import check_address

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
GUIDE = (DEPLOY / "README.md").read_text()
SLURM = (DEPLOY / "slurm.sh").read_text()


def document(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


def commands() -> list[str]:
    """Every evoprune search that a file or its guide starts."""
    slurm = re.findall(r"SEARCH=\((evoprune search [^)]*)\)", SLURM)
    guide = re.findall(r"-- (evoprune search [^`]+)`", GUIDE.replace("\n", " "))
    return [document("rayjob.yaml")["spec"]["entrypoint"], *slurm, *guide]


def test_there_is_a_command_in_each() -> None:
    assert len(commands()) == 3


@pytest.mark.parametrize("command", commands())
def test_evoprune_understands_the_commands(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "as the guides say")
    program, *words = shlex.split(command.replace("MODEL", "reference"))
    assert program == "evoprune"
    assert main([*words, "--dry-run"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["kind"] == "metric"
    check_address(words[words.index("--address") + 1])
    assert words[words.index("--gpus-per-worker") + 1] == "1"  # or the CPUs that are up first would do the work


def test_the_cluster_file_is_what_ray_up_wants() -> None:
    pytest.importorskip("ray")
    cluster = document("ray-cluster.yaml")
    assert cluster["cluster_name"]
    assert cluster["provider"]["type"] == "aws"
    assert cluster["head_node_type"] in cluster["available_node_types"]
    for kind in cluster["available_node_types"].values():
        assert kind["resources"]
        assert kind["node_config"]["InstanceType"]
    assert cluster["idle_timeout_minutes"] > 0
    for start in (cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"]):
        assert "RAY_AUTH_MODE=token" in start[-1]
    assert "--dashboard-host=127.0.0.1" in cluster["head_start_ray_commands"][-1]


def test_the_manifest_has_what_kuberay_wants() -> None:
    job = document("rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    images = {container["image"] for group in groups for container in group["template"]["spec"]["containers"]}
    assert len(images) == 1  # one set of versions
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    (volume,) = head["volumeMounts"]
    assert f"--run-dir {volume['mountPath']}/" in job["spec"]["entrypoint"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_the_slurm_script_is_bash_and_keeps_the_token_out_of_commands() -> None:
    checked = subprocess.run(["bash", "-n", str(DEPLOY / "slurm.sh")], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    assert "ray symmetric-run --address" in SLURM
    assert "#SBATCH --exclusive" in SLURM  # its `ray stop` would end the Ray of another job on the node
    assert not re.search(r"cat .*TOKEN|--token", SLURM)


def test_whoever_resumes_waits_for_gpus_too() -> None:
    resumed = re.findall(r"evoprune resume [^`)]+", f"{GUIDE} {SLURM}")
    assert len(resumed) == 3
    assert all("--gpus-per-worker 1" in " ".join(command.split()) for command in resumed)


def test_nobody_is_sent_to_an_index_that_does_not_have_the_package() -> None:
    files = [path.read_text() for path in DEPLOY.iterdir()]
    assert not any(re.search(r"pip install .*[\"' ]evoprune(\[\w+\])?[\"'`]", text) for text in files)


def test_every_guide_has_ten_lines_and_no_token_in_a_command() -> None:
    guides = GUIDE.split("\n## ")[1:]
    assert [len(re.findall(r"^\d+\. ", guide, re.M)) for guide in guides] == [10, 10, 10]
    assert "RAY_AUTH_TOKEN=" not in GUIDE
