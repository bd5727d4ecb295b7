"""Searches that compare by the KL over the most likely tokens, from the option to every place that shows it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import evoprune
from evoprune.fitness.context import EvaluationContext
from evoprune.fitness.models import load_model
from evoprune.fitness.prepare import Prepared, prepare
from evoprune.fitness.teacher import build_teacher, linear_head, window_losses
from evoprune.metrics.errors import InvalidInput
from evoprune.search.board_note import finished_allocation_note
from evoprune.search.config import CONFIGS
from evoprune.search.config_joint import JointSearchConfig
from evoprune.search.report import write_report
from evoprune.search.rundir import RunDirectory
from tests.door.conftest import Run, tree
from tests.models import VOCABULARY, save_tiny

K = 8
OVER = f"over the dense model's {K} most likely tokens"


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def reduced(tiny: Path, allocated: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fork of a finished search to a KL over few tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVOPRUNE_CACHE", str(cache))
        patch.setattr("evoprune.sessions.write_report", lambda run: None)
        run = evoprune.resume(
            allocated,
            fork=True,
            settings={"top_k": K, "evaluations": 4},
            executor="inline",
            run_dir=tmp_path_factory.mktemp("reduced") / "run",
            quiet=True,
        )
    return run.path


def test_fitness_is_another_and_held_out_rows_are_the_same(allocated: Path, reduced: Path) -> None:
    before, after = result_of(allocated), result_of(reduced)
    assert "top_k" not in before and after["top_k"] == K
    assert after["dense"] == before["dense"]
    rows = [{row["name"]: row for row in result["baselines"]} for result in (before, after)]
    assert rows[0].keys() == rows[1].keys() == {"uniform", "erk", "owl"}
    for name, row in rows[1].items():
        assert row["heldout"] == rows[0][name]["heldout"]
        assert row["allocation"] == rows[0][name]["allocation"]
    seeds = [
        {tuple(line["genome"]): line["kl"] for line in map(json.loads, text.splitlines()) if line["stage"] == "seeds"}
        for text in ((folder / "history.jsonl").read_text() for folder in (allocated, reduced))
    ]
    assert len(seeds[1]) == 3 and seeds[1].keys() <= seeds[0].keys()
    assert all(abs(kl - seeds[0][genome]) > 1e-3 for genome, kl in seeds[1].items())


def test_it_is_said_wherever_fitness_is_shown(run: Run, allocated: Path, reduced: Path) -> None:
    assert OVER in " ".join(run("show", reduced).out.split())
    assert OVER in finished_allocation_note(result_of(reduced))
    write_report(RunDirectory.open(reduced))
    page = (reduced / "report.html").read_text().replace("&#39;", "'")
    assert OVER in page and f"top-{K} KL to dense, nats per token" in page
    assert "most likely" not in run("show", allocated).out


def test_the_teacher_of_the_search_text_alone_is_reduced(tiny: Path, story: Path) -> None:
    """And the identity of what is prepared without the option, which names it, knows of none."""
    model = load_model(str(tiny))
    few: dict[str, Any] = {"window": 32, "rungs": (1, 2), "heldout_windows": 2, "data": str(story)}
    few |= {"calibration": str(story), "calibration_sequences": 2, "calibration_window": 32}
    prepared = {k: prepare(model, EvaluationContext(**few, top_k=k)) for k in (None, K, 2 * K)}
    assert len({found.name for found in prepared.values()}) == 3
    assert "top_k" not in prepared[None].facts["identity"]
    for k, found in prepared.items():
        again = Prepared.open(found.name)
        windows, teacher = again.text("search")
        head = linear_head(model.model, windows)
        expected = build_teacher(model.model, head, windows, top_k=k)
        assert {name: tensor.tolist() for name, tensor in teacher.tensors().items()} == {
            name: tensor.tolist() for name, tensor in expected.tensors().items()
        }
        windows, teacher = again.text("heldout")
        assert teacher.tokens is None
        assert window_losses(model.model, head, windows, teacher).kl.abs().max() < 1e-5  # type: ignore[union-attr]


def test_teachers_that_do_not_fit_are_refused_by_text(
    place: Path, story: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model that caps its logits, before either is built."""
    model = load_model(str(save_tiny(place / "capped", "gemma2", final_logit_softcapping=2.0)))
    few: dict[str, Any] = {"window": 32, "rungs": (1, 2), "heldout_windows": 2, "data": str(story)}
    few |= {"calibration": str(story), "calibration_sequences": 2, "calibration_window": 32}
    predictions, limit = 2 * 31, "evoprune.fitness.teacher.MAX_LOG_PROBABILITY_BYTES"
    monkeypatch.setattr(limit, predictions * VOCABULARY * 2)
    prepare(model, EvaluationContext(**few))
    monkeypatch.setattr(limit, predictions * VOCABULARY * 2 - 1)
    with pytest.raises(InvalidInput, match=rf"text B: .* for a vocabulary of {VOCABULARY} .* text, or top_k=512"):
        prepare(model, EvaluationContext(**few, seed=1))
    with pytest.raises(InvalidInput, match=r"text C: .* windows of text, such as data.heldout_windows=30"):
        prepare(model, EvaluationContext(**few, seed=1, top_k=K))


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_every_search_takes_it_to_its_workers(kind: str, run: Run) -> None:
    words = ["search", kind, "--dry-run", "--set", f"top_k={K}"]
    done = run(*words, "--json")
    assert done.code == 0, done.err
    config = CONFIGS[kind].model_validate(done.json)
    assert config.context().top_k == K
    if isinstance(config, JointSearchConfig):  # whose workers are those of its steps
        assert config.metric_values(0, seed_from=None, allocation=None)["top_k"] == K
        assert config.allocation_values(1, metric="wanda", seed_from=None)["top_k"] == K
    without = CONFIGS[kind].model_validate({**done.json, "top_k": None})
    assert without.context().top_k is None and without.identity != config.identity


def test_what_is_refused(refused: Callable[..., str], tiny: Path, small: Path) -> None:
    metric = ("search", "metric", tiny, "--config", small, "--executor", "inline", "--set")
    assert "top_k: Input should be greater than or equal to 2" in refused(*metric, "top_k=1")
    assert "top_k: " in refused(*metric, "top_k=2.5")
    for objective in ("perplexity", "reconstruction"):
        found = refused(*metric, f"top_k={K}", "--objective", objective)
        assert f"the objective is {objective}: leave it out, or give objective=kl" in found
    found = refused("search", "policy", tiny, "--objective", "ce", "--set", f"top_k={K}")
    assert "the objective is ce: leave it out" in found


def test_more_tokens_than_the_vocabulary_has(run: Run, tiny: Path, levels: Path, place: Path) -> None:
    words = ("search", "allocation", tiny, "--config", levels, "--executor", "inline", "--set")
    done = run(*words, f"top_k={VOCABULARY + 1}")
    assert (done.code, done.out, tree(place)) == (2, "", set())
    expected = f"error: top_k {VOCABULARY + 1} exceeds the vocabulary of {VOCABULARY} tokens: give a smaller one"
    assert done.err.splitlines()[-1].startswith(expected)


def test_an_edited_run_cannot_go_on_with_another(reduced: Path, run: Run, place: Path) -> None:
    folder = place / "edited"
    folder.mkdir()
    for name in ("config.yaml", "run.json", "history.jsonl", "evaluations.wal", "state.json"):
        (folder / name).write_bytes((reduced / name).read_bytes())
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "top_k": 2 * K}))
    done = run("resume", folder, "--executor", "inline")
    assert done.code == 2 and "the configuration changed since this run began" in done.err
