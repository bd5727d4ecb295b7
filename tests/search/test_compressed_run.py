"""Metric and joint searches under a compressor on a tiny random model, beside what `prune` makes of their winners."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

import evoprune
from evoprune.metrics.errors import Interrupted, InvalidInput
from evoprune.search.config import resolve, resolve_as
from evoprune.search.config_joint import JointSearchConfig
from evoprune.search.config_metric import MetricSearchConfig
from evoprune.search.kinds import kind_of
from evoprune.search.kinds.metric import KIND
from evoprune.search.report.data import ReportData
from evoprune.search.report.joint_data import JointData
from evoprune.search.report.joint_page import render as joint_page
from evoprune.search.report.page import render
from evoprune.search.rundir import RunDirectory
from evoprune.search.session import resume_search, start_search
from evoprune.search.tables import heldout_rows
from evoprune.search.worker_session import Resources
from tests.search.whole_runs import history, result_of, stopping_in, timeless, tiny_options

INLINE = Resources(executor="inline")
REFIT = "refit:steps=3"
SMALL = {"population": 8, "islands": 2, "power_budget": 3, "seeds": ["wanda", "magnitude"]}


def config(world: Path, **changes: Any) -> MetricSearchConfig:
    options = {
        **tiny_options(world),
        "target.compressor": REFIT,
        "racing.rungs": [1, 2],
        "racing.finalists": 1,
        "racing.final_windows": 0,
        "searcher": {"name": "evolution", **SMALL},
        "statistics": ["X_l2", "G_l2"],
        "evaluations": 14,
        **changes,
    }
    return resolve(overrides=options)


@pytest.fixture(scope="module")
def finished(world: Path) -> RunDirectory:
    return start_search(config(world), INLINE, run_dir=world / "refitted")


def pruned_loss(world: Path, **options: Any) -> tuple[float, float]:
    """Held-out loss and KL of what `prune` makes of the model of a world, by the texts of its searches."""
    calibration = {"calibration": str(world / "text.txt"), "calibration_sequences": 8, "calibration_window": 32}
    pruned = evoprune.prune(str(world / "model"), **calibration, **options)
    text = {"data": str(world / "text.txt"), "window": 32, "tokens": 8 * 32}
    found = evoprune.evaluate(pruned.language_model, dense=str(world / "model"), **text)
    assert found.kl is not None
    return found.loss, found.kl


def numbers(heldout: dict[str, float]) -> Any:
    return pytest.approx((heldout["loss"], heldout["kl"]), rel=1e-6, abs=1e-9)


def test_prune_gives_what_was_measured(finished: RunDirectory, world: Path) -> None:
    """The winner as it was searched and in replay, and a baseline: all of them refitted."""
    result = result_of(finished)
    best, wanda = result["best"], next(row for row in result["baselines"] if row["name"] == "wanda")
    metric = str(finished.path / "export" / "metric.json")
    inside = {"sparsity": 0.5, "compressor": REFIT}
    assert pruned_loss(world, metric=metric, **inside) == numbers(best["heldout"])
    assert pruned_loss(world, metric="wanda", **inside) == numbers(wanda["heldout"])
    assert pruned_loss(world, metric=metric, **inside, accumulation="path") == numbers(best["replayed"])
    assert best["winner_minus_replayed"]["loss"] == pytest.approx(best["heldout"]["loss"] - best["replayed"]["loss"])
    assert pruned_loss(world, metric=metric, sparsity=0.5) != numbers(best["heldout"])
    assert best["replayed"]["loss"] != best["heldout"]["loss"]


def test_everybody_names_the_compressor(finished: RunDirectory) -> None:
    result = result_of(finished)
    assert result["compressor"] == REFIT
    shown = [getattr(part, "plain", "") for part in KIND.result_view(result, finished.path)]
    (command,) = [line for line in shown if line.startswith("prune ")]
    words = shlex.split(command)
    assert words[words.index("--compressor") + 1] == REFIT
    assert "winner, replayed" in [row[0] for row in heldout_rows(result)]
    readme = (finished.path / "export" / "README.md").read_text()
    assert f"`evoprune prune MODEL --metric metric.json --compressor {REFIT}` uses it" in readme
    assert f"--compressor {REFIT} --accumulation path` writes" in readme and "| winner, replayed |" in readme
    page = render(ReportData(finished), {})
    assert f"50 % of every row ({REFIT})" in page and f"is compressed by <code>{REFIT}</code>" in page
    assert f"--sparsity 0.5 --compressor {REFIT} --out pruned" in page and "Winner, replayed" in page
    assert f"followed by {REFIT}" in KIND.finished_note(result, [])


def test_a_stopped_run_goes_on_to_the_same(
    finished: RunDirectory, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evoprune.search.session.stop_on_signals", stopping_in(tmp_path / "stopped", "searching", 6))
    with pytest.raises(Interrupted):
        start_search(config(world), INLINE, run_dir=tmp_path / "stopped")
    monkeypatch.undo()
    run = resume_search(RunDirectory.open(tmp_path / "stopped"), INLINE)
    assert history(run) == history(finished)
    assert timeless(run.result) == timeless(finished.result)


def test_the_mask_alone_is_no_other_search(finished: RunDirectory, world: Path, tmp_path: Path) -> None:
    """The same births as far as nothing depends on what was measured, and other fitness."""
    run = start_search(config(world, **{"target.compressor": "mask", "evaluations": 3}), INLINE, run_dir=tmp_path / "m")
    assert "replayed" not in result_of(run)["best"] and result_of(run)["compressor"] == "mask"
    ours, masked = list(finished.history()), list(run.history())
    assert ours[0]["expression"] == masked[0]["expression"] and ours[0]["signature"] == masked[0]["signature"]
    assert ours[0]["rungs"][0] < masked[0]["rungs"][0]


def test_patterns_and_what_has_no_replay(world: Path, tmp_path: Path) -> None:
    few = {"evaluations": 3, "statistics": ["X_l2"]}
    pattern = config(world, **few, **{"target.sparsity": None, "target.pattern": "2:4"})
    run = start_search(pattern, INLINE, run_dir=tmp_path / "pattern")
    best = result_of(run)["best"]
    metric = str(run.path / "export" / "metric.json")
    found = pruned_loss(world, metric=metric, pattern="2:4", compressor=REFIT)
    assert found == numbers(best["heldout"])
    assert set(best["replayed"]) == set(best["heldout"])
    run = start_search(config(world, **few, **{"target.group": "global"}), INLINE, run_dir=tmp_path / "global")
    assert "replayed" not in result_of(run)["best"]


def joint(world: Path, compressor: str, **changes: Any) -> JointSearchConfig:
    return resolve_as(
        JointSearchConfig,
        overrides={
            **tiny_options(world),
            "target.compressor": compressor,
            "rounds": 1,
            "metric.racing": {"rungs": [1, 2], "final_windows": 0},
            "metric.searcher": SMALL,
            "metric.statistics": ["X_l2"],
            "allocation.searcher": {
                "offspring": 4,
                "windows": 4,
                "stages": [{"windows": 1, "survivors": 2}, {"windows": 2, "survivors": 1}],
                "seeds": ["erk"],
            },
            "metric_share": 0.5,
            "evaluations": 20,
            **changes,
        },
    )


@pytest.mark.slow
def test_both_halves_of_a_joint_search_are_under_it(world: Path) -> None:
    run = start_search(joint(world, REFIT, **{"target.grid": 6}), INLINE, run_dir=world / "joint")
    steps = [RunDirectory(run.path / "steps" / name) for name in ("1-metric", "2-allocation")]
    assert [step.config["target"]["compressor"] for step in steps] == [REFIT, REFIT]
    assert steps[1].config["target"]["grid"] == 6
    result = result_of(run)
    best = result["best"]
    # Weights of the level database are those that the comparison computes anew.
    assert result_of(steps[1])["best"]["heldout"] == pytest.approx(best["heldout"])
    assert result_of(steps[1])["best"]["replayed"] == pytest.approx(best["replayed"])
    given = {"metric": str(run.path / "export" / "metric.json"), "allocation": run.path / "export" / "allocation.json"}
    assert pruned_loss(world, **given) == numbers(best["heldout"])
    assert pruned_loss(world, **given, accumulation="path") == numbers(best["replayed"])
    page = joint_page(JointData(run), {})
    assert f"50 % of all prunable weights ({REFIT})" in page and f"--compressor {REFIT} --out DIR" in page


@pytest.mark.parametrize(("compressor", "said"), [("admm", "chooses by itself what goes"), ("scap", "removes no")])
def test_a_metric_has_to_have_a_say(compressor: str, said: str, world: Path) -> None:
    for asked in (config(world, **{"target.compressor": compressor}), joint(world, compressor)):
        with pytest.raises(InvalidInput, match=said):
            kind_of(asked.kind).check_names(asked)
