"""Searches on images with texts by one worker and by several: each run has a cache of its own, so nothing is shared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evoprune.metrics.errors import Interrupted
from evoprune.search.config import resolve_as
from evoprune.search.config_allocation import AllocationSearchConfig
from evoprune.search.config_joint import JointSearchConfig
from evoprune.search.rundir import RunDirectory
from evoprune.search.session import resume_search, start_search
from evoprune.search.worker_session import Resources
from tests.multimodal import save_llava, synthetic_image
from tests.search.whole_runs import history, lines_of, result_of, stopping_in, timeless

ROWS = 12


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA, and images with texts of which one is text alone."""
    folder = tmp_path_factory.mktemp("pictures")
    save_llava(folder / "model")
    rows = []
    for number in range(ROWS):
        synthetic_image(number).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png" if number else None, "text": f"noise number {number}"})
    (folder / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


SEARCHER = {
    "windows": 4,
    "offspring": 6,
    "stages": [{"windows": 2, "survivors": 2}, {"windows": 4, "survivors": 1}],
    "seeds": ["das", "owl"],
}
INLINE = Resources(executor="inline")


def options(pictures: Path, **more: object) -> dict[str, object]:
    source = str(pictures / "images.jsonl")
    return {
        "model.name": str(pictures / "model"),
        "data.source": source,
        "data.heldout_windows": 3,
        "target.sparsity": 0.5,
        **more,
    }


def searched(pictures: Path, place: Path, monkeypatch: pytest.MonkeyPatch, resources: Resources) -> RunDirectory:
    monkeypatch.setenv("EVOPRUNE_CACHE", str(place / "cache"))
    asked = options(pictures, searcher=SEARCHER, evaluations=18)
    return start_search(resolve_as(AllocationSearchConfig, overrides=asked), resources, run_dir=place / "run")


def collected(place: Path) -> dict[str, bytes]:
    """The statistics of a run, by file."""
    (folder,) = (place / "cache" / "statistics").iterdir()
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.ray
@pytest.mark.slow
def test_statistics_and_history_of_one_and_of_three_workers(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics, teachers and texts have the same bits (chapter on multimodal models, 7.6), and so has the search."""
    inline = searched(pictures, tmp_path / "inline", monkeypatch, INLINE)
    assert {line["stage"] for line in lines_of(inline)} >= {"seeds", 0, 1, "final"}
    assert {row["name"] for row in result_of(inline)["baselines"]} >= {"das", "owl", "uniform"}
    for workers in (1, 3):
        place = tmp_path / str(workers)
        run = searched(pictures, place, monkeypatch, Resources(workers=workers))
        assert collected(place) == collected(tmp_path / "inline")
        # The name of what is prepared is a hash of its content.
        assert run.identity["files"] == inline.identity["files"]
        assert history(run) == history(inline)
        assert timeless(run.result) == timeless(inline.result)


@pytest.mark.slow
def test_a_joint_search_stopped_in_its_steps_is_the_same_search(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVOPRUNE_CACHE", str(tmp_path / "cache"))
    parts = {
        "metric.racing.rungs": [2, 4],
        "metric.statistics": ["X_l2", "X_v", "X_l"],
        "allocation.searcher": SEARCHER,
    }
    config = resolve_as(JointSearchConfig, overrides=options(pictures, evaluations=40, **parts))
    whole = start_search(config, INLINE, run_dir=tmp_path / "whole")
    assert result_of(whole)["images"]
    path = tmp_path / "stopped"
    for step, after in (("2-allocation", 20), ("3-metric", 6)):
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr("evoprune.search.session.stop_on_signals", stopping_in(path, step, after))
            if path.exists():
                resume_search(RunDirectory.open(path), INLINE)
            else:
                start_search(config, INLINE, run_dir=path)
    run = resume_search(RunDirectory.open(path), INLINE)
    assert history(run) == history(whole)
    assert timeless(run.result)["best"] == timeless(whole.result)["best"]
