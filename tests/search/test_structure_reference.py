"""Half of the reference model: what a short search finds, and what accumulation along a path brings, on every seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evoprune.fitness.structure_worker import StructureWorker
from evoprune.search.config import resolve_as
from evoprune.search.config_structure import StructureSearchConfig
from evoprune.search.result import paired_difference
from evoprune.search.session import start_search
from evoprune.search.worker_session import Resources

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_half_of_the_reference_model(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the same share everywhere, ATP and FLAP, by far more than noise; so is a path below a dense build."""
    monkeypatch.setenv("EVOPRUNE_CACHE", str(tmp_path / "cache"))
    values = {
        "seed": seed,
        "target.sparsity": 0.5,
        "evaluations": 64,
        "searcher.seeds": ["flap", "atp"],
        "data.heldout_windows": 40,
        "data.calibration_sequences": 32,
    }
    config = resolve_as(StructureSearchConfig, overrides=values)
    result = start_search(config, Resources(executor="inline"), run_dir=tmp_path / "run").result
    assert result is not None
    best, rows = result["best"], {row["name"]: row for row in result["baselines"]}
    for name in ("uniform", "atp", "flap", "flap alone"):
        assert best["heldout"]["kl"] < rows[name]["heldout"]["kl"]
        assert clearly_below(rows[name]["winner_minus_this"])

    worker = StructureWorker(config.context())
    given: dict[str, Any] = {"prepared": worker.handle("prepare", {})["name"], "accumulation": "dense"}
    given |= {**worker.handle("database", given), "shape": rows["uniform"]["shape"]}
    dense = worker.handle("heldout", given)
    along = worker.handle("heldout", {**given, "selection": config.path_refit})
    assert clearly_below(paired_difference(along, dense))


def clearly_below(difference: dict[str, float]) -> bool:
    return difference["loss"] < -3 * difference["stderr"]
