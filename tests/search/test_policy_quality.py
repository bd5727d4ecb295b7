"""On a trained model a policy beats its own start, uniform Wanda-sp and random search: item 17 of section 15, small."""

from __future__ import annotations

from pathlib import Path

import pytest

from evoprune.search.config import resolve_as
from evoprune.search.config_policy import PolicySearchConfig
from evoprune.search.session import start_search
from evoprune.search.worker_session import Resources
from tests.search.whole_runs import result_of

RANDOM = {"searcher.name": "random", "searcher.options": {"parameters": "grouped"}}


@pytest.mark.slow
def test_a_policy_beats_what_it_starts_from_and_random_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole comparison, at 20, 30 and 50 % on three seeds, is ``benchmarks/policy_quality.py structured``."""
    monkeypatch.setenv("EVOPRUNE_CACHE", str(tmp_path / "cache"))
    results = {}
    for name, changes in (("policy", {}), ("random", RANDOM)):
        config = resolve_as(
            PolicySearchConfig,
            overrides={
                "target.sparsity": 0.3,
                "evaluations": 240,
                "data.window": 64,
                "data.heldout_windows": 64,
                "data.calibration_sequences": 32,
                "data.calibration_window": 128,
                "searcher.windows": 64,
                "searcher.batch": 4,
                "searcher.validation": 16,
                "searcher.validate_every": 8,
                "searcher.baselines": ["wanda-sp"],
                **changes,
            },
        )
        results[name] = result_of(start_search(config, Resources(executor="inline"), run_dir=tmp_path / name))
    ours = results["policy"]
    assert [row["name"] for row in ours["baselines"]] == ["initialisation", "wanda-sp"]
    for row in ours["baselines"]:
        difference = row["winner_minus_this"]
        assert difference["loss"] < -4 * difference["stderr"]
    for result in results.values():
        assert result["evaluations"] <= 240
        assert result["best"]["cost"] <= 0.7 * result["dense_cost"]
    assert ours["best"]["heldout"]["loss"] < results["random"]["best"]["heldout"]["loss"] - 0.005
