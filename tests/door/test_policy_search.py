"""Policy searches from the command line and in Python: what is found, shown, exported, pruned, resumed, refused."""

from __future__ import annotations

import json
import shlex
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import yaml

import evoprune
from evoprune.configuration import POLICY_KEYS
from evoprune.metrics.errors import InvalidInput
from evoprune.search.engine.journal import EvaluationLog
from tests.door.conftest import Run
from tests.models import save_tiny

CONFIG = """\
data: {source: TEXT, window: 32, heldout_windows: 4, calibration_window: 32, calibration_sequences: 4}
searcher: {windows: 6, batch: 2, validation: 3, validate_every: 2, samples: 4, baselines: [flap]}
target: {units: [kv-group, "ranked:8"]}
evaluations: 30
"""


@pytest.fixture
def options(tmp_path: Path, story: Path) -> Path:
    """A configuration file for a search of seconds."""
    path = tmp_path / "policy.yaml"
    path.write_text(CONFIG.replace("TEXT", str(story)))
    return path


@pytest.fixture(scope="module")
def learned(tiny: Path, story: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished search; it only gets read."""
    folder = tmp_path_factory.mktemp("learned")
    config = folder / "policy.yaml"
    config.write_text(CONFIG.replace("TEXT", str(story)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVOPRUNE_CACHE", str(cache))
        run = evoprune.search_policy(
            str(tiny), config=config, sparsity=0.4, executor="inline", run_dir=folder / "run", quiet=True, seed=1
        )
    return run.path


def result_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def test_a_search_from_the_command_line(
    run: Run, tiny: Path, story: Path, options: Path, learned: Path, place: Path
) -> None:
    """And the command that it prints at its end: it makes the model that was measured."""
    done = run(
        "search", "policy", tiny, "--config", options, "--sparsity", 0.4, "--executor", "inline", "--seed", 1
    )  # fmt: skip
    assert done.code == 0, done.err
    folder = Path(done.out.strip())
    assert folder.parent == Path("runs") and "-policy-" in folder.name
    assert (folder / "history.jsonl").read_bytes() == (learned / "history.jsonl").read_bytes()
    for text in ("dense", "learned winner", "initialisation", "flap", "40% fewer parameters in heads and MLPs",
                 "kv-group", "ranked:8", "seed 1"):  # fmt: skip
        assert text in " ".join(done.err.split()), text
    first = result_of(learned)
    assert {**result_of(folder), "run": ""} == {**first, "run": ""}

    (command,) = [line for line in done.err.splitlines() if line.startswith("prune ")]
    words = shlex.split(command.partition("evoprune ")[2].replace("DIR", "out"))
    pruned = run(*words, "--json")
    assert pruned.code == 0, pruned.err
    assert pruned.json["parameters"] == first["best"]["cost"] + first["rest_cost"]
    words = ["eval", "out", "--dense", tiny, "--data", story, "--window", 32, "--tokens", 4 * 32, "--json"]
    measured = run(*words).json
    assert measured["loss"] == pytest.approx(first["best"]["heldout"]["loss"], rel=1e-5)

    listed = run("runs", "--json").json
    assert (listed[0]["run"], listed[0]["kind"], listed[0]["state"]) == (folder.name, "policy", "finished")
    assert listed[0]["best"]["policy"] == first["best"]["policy"]
    shown = run("show", "--json").json
    assert shown["run"] == folder.name
    assert [row["name"] for row in shown["baselines"]] == ["initialisation", "flap"]
    assert run("report", folder).code == 0
    page = (folder / "report.html").read_text()
    assert "initialisation" in page and "<svg" in page


def test_the_winner_leaves_as_a_policy_and_as_a_shape(run: Run, learned: Path, place: Path) -> None:
    assert run("export", learned, "--to", "mine.json").code == 0
    assert json.loads(Path("mine.json").read_text())["format"] == "evoprune-policy/1"
    assert run("export", learned, "--to", "shape.json").code == 0
    assert json.loads(Path("shape.json").read_text())["format"] == "evoprune-shape/1"
    refused = run("export", learned, "--to", "mine.py")
    assert refused.code == 2 and "must be .json" in refused.err


def test_a_fork_starts_from_what_was_evaluated(run: Run, learned: Path, place: Path) -> None:
    done = run("resume", learned, "--fork", "--set", "evaluations=44", "--executor", "inline")
    assert done.code == 0, done.err
    more = result_of(Path(done.out.strip()))
    assert more["evaluations"] > result_of(learned)["evaluations"]


def test_a_fork_on_windows_of_another_length_mixes_none_with_those_of_before(
    run: Run, learned: Path, place: Path
) -> None:
    done = run("resume", learned, "--fork", "--set", "data.window=16", "--executor", "inline")
    assert done.code == 0, done.err
    other, first = result_of(Path(done.out.strip())), result_of(learned)
    assert (other["window"], other["dtype"], first["window"]) == (16, "float32", 32)
    for entry in (other["dense"], other["best"], *other["baselines"]):
        assert entry["heldout"]["tokens"] == 4 * 15
    log = EvaluationLog(Path(done.out.strip()) / "evaluations.wal")
    counts = [len(outcome.values["nll"]) for outcome in log.outcomes() if "tokens" in outcome.values]
    log.close()
    # Those of before are in the log too, and none of them answers what the fork asked.
    assert len(counts) == 2 * len([other["dense"], other["best"], *other["baselines"]])


def test_options_of_the_command_and_of_the_function_are_one_list(run: Run) -> None:
    given = set(signature(evoprune.search_policy).parameters)
    assert {"prior" if name == "metric" else name for name in given} >= set(POLICY_KEYS)
    shown = yaml.safe_load(
        run("search", "policy", "--dry-run", "--units", "query-head,neurons:16", "--metric", "flap", "--population",
            "auto", "--searcher", "cma", "--budget", "kind", "--set", "searcher.options.spread=0.5").out
    )  # fmt: skip
    assert shown["target"]["units"] == ["query-head", "neurons:16"] and shown["target"]["budget"] == "kind"
    searcher = shown["searcher"]
    assert (searcher["prior"], searcher["samples"], searcher["name"]) == ("flap", "auto", "cma")
    assert searcher["options"] == {"spread": 0.5}
    shown = yaml.safe_load(run("search", "policy", "--dry-run", "--pattern", "2:4", "--metrics", "ria,wanda").out)
    assert shown["target"]["sparsity"] is None and shown["target"]["metrics"] == ["ria", "wanda"]
    assert shown["searcher"]["prior"] == "wanda"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sparsity", "0.3", "--pattern", "2:4"], "not both"),
        (["--units", "kv-groups"], "did you mean 'kv-group'"),
        (["--searcher", "cmaes"], "no learner 'cmaes'"),
        (["--population", "many"], "population|samples"),
        (["--metric", "wanda_sp"], "wanda"),
        (["--evaluations", "5"], "give at least 13"),
        (["--seed-from", "nowhere.json"], "nowhere.json"),
    ],
)
def test_wrong_words_are_refused_in_one_line(run: Run, place: Path, words: list[str], message: str) -> None:
    refused = run("search", "policy", *words, "--executor", "inline")
    assert refused.code == 2
    (line,) = refused.err.strip().splitlines()[-1:]
    assert any(part in line for part in message.split("|")), line
    assert not Path("runs").exists()


def test_a_policy_of_other_units_or_of_another_model_is_refused(
    run: Run, tiny: Path, options: Path, learned: Path, place: Path
) -> None:
    words = ["--config", options, "--units", "kv-group,neurons:4", "--seed-from", learned, "--executor", "inline"]
    refused = run("search", "policy", tiny, *words)
    assert refused.code == 2
    assert "the policy is of other units, or of another model" in " ".join(refused.err.split())
    with pytest.raises(InvalidInput, match="another model"):
        evoprune.prune_policy(str(save_tiny(place / "wider", intermediate_size=64)), learned / "export" / "policy.json")
