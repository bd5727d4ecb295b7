"""Searches on images with texts by one worker and by several: each run has a cache of its own, so nothing is shared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evoprune.search.config import resolve_as
from evoprune.search.config_allocation import AllocationSearchConfig
from evoprune.search.rundir import RunDirectory
from evoprune.search.session import start_search
from evoprune.search.worker_session import Resources
from tests.multimodal import save_llava, synthetic_image
from tests.search.whole_runs import history, lines_of, result_of, timeless

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


def searched(pictures: Path, place: Path, monkeypatch: pytest.MonkeyPatch, resources: Resources) -> RunDirectory:
    monkeypatch.setenv("EVOPRUNE_CACHE", str(place / "cache"))
    options = {
        "model.name": str(pictures / "model"),
        "data.source": str(pictures / "images.jsonl"),
        "data.heldout_windows": 3,
        "target.sparsity": 0.5,
        "searcher.windows": 4,
        "searcher.offspring": 6,
        "searcher.stages": [{"windows": 2, "survivors": 2}, {"windows": 4, "survivors": 1}],
        "searcher.seeds": ["das", "owl"],
        "evaluations": 18,
    }
    return start_search(resolve_as(AllocationSearchConfig, overrides=options), resources, run_dir=place / "run")


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
    inline = searched(pictures, tmp_path / "inline", monkeypatch, Resources(executor="inline"))
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
