"""The board of a whole policy search on a tiny random model, live and rebuilt, and what the terminal says of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from evoprune.metrics.packed import unpacked
from evoprune.search.config import resolve_as
from evoprune.search.config_policy import PolicySearchConfig
from evoprune.search.engine.trial_record import fits
from evoprune.search.kinds.policy import KIND
from evoprune.search.publishing import rebuild_board
from evoprune.search.rundir import RunDirectory
from evoprune.search.session import start_search
from evoprune.search.worker_session import Resources
from tests.search.whole_runs import lines_of, result_of, study, tiny_options


def config(world: Path, **changes: Any) -> PolicySearchConfig:
    options = {
        **tiny_options(world),
        "target.units": ["attention", "mlp"],
        "searcher.windows": 4,
        # All of it: equal masks of different steps are one evaluation.
        "searcher.batch": 4,
        "searcher.validation": 4,
        "searcher.validate_every": 2,
        "searcher.baselines": ["flap"],
        "evaluations": 40,
        **changes,
    }
    return resolve_as(PolicySearchConfig, overrides=options)


@pytest.fixture(scope="module")
def finished(world: Path) -> RunDirectory:
    return start_search(config(world), Resources(executor="inline"), run_dir=world / "run")


def test_the_board_shows_every_mask_and_can_be_rebuilt(finished: RunDirectory, tmp_path: Path) -> None:
    lines, before = lines_of(finished), study(finished).trials
    assert len(before) == len(lines) == result_of(finished)["evaluations"]
    assert len({(line["mask"], line["stage"]) for line in lines}) < len(lines)  # some masks were drawn again
    for trial, line in zip(before, lines, strict=True):
        assert (trial.user_attrs["birth"], trial.user_attrs["mask"], trial.value) == (
            line["birth"], line["mask"], line["loss"],
        )  # fmt: skip
        assert trial.params == {name: line[name] for name in KIND.descriptors}
        assert all(fits(line[name], allowed) for name, allowed in KIND.descriptors.items())
    folder = tmp_path / "run"
    shutil.copytree(finished.path, folder)
    (folder / "optuna.log").unlink()
    rebuild_board(RunDirectory(folder), None)
    after = study(RunDirectory(folder)).trials
    for name in ("number", "state", "value", "intermediate_values", "user_attrs", "params", "datetime_start"):
        assert [getattr(trial, name) for trial in after] == [getattr(trial, name) for trial in before], name


def test_the_terminal_says_it_too(finished: RunDirectory) -> None:
    result = result_of(finished)
    console = Console(width=120, record=True)
    with console.capture() as captured:
        for part in KIND.result_view(result, finished.path):
            console.print(part)
    shown = captured.get()
    assert result["units"]["rows"] == finished.identity["unit_rows"]
    assert result["best"]["policy"] == KIND.progress_of(finished)["best"]["policy"]
    kept = unpacked(result["best"]["policy"]["kept"], result["units"]["n"])
    start = 0
    for row, count in zip(result["units"]["rows"], result["best"]["policy"]["counts"], strict=True):
        assert kept[start : start + row["count"]].sum() == count
        start += row["count"]
        assert (f"{count} of {row['count']}" if count else "none") in shown
    assert f"evoprune prune {result['model']} --policy" in shown.replace("\n", "")
    assert KIND.words(result["best"]) in shown
