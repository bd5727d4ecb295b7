"""The command line in this process: one call, its exit code, and what it wrote where."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import evoprune
from evoprune.cli import main
from tests.models import save_tiny

# Small enough for a whole search in a few seconds.
CONFIG = """\
data: {window: 32, heldout_windows: 4, calibration_window: 32, calibration_sequences: 4}
racing: {rungs: [1, 2, 4]}
searcher: {population: 8, islands: 2, power_budget: 4}
statistics: [X_l2, X_l1, G_l2]
evaluations: 24
"""


ALLOCATION_CONFIG = """\
data: {source: TEXT, window: 32, heldout_windows: 4, calibration_window: 32, calibration_sequences: 4}
searcher:
  offspring: 6
  windows: 8
  stages: [{windows: 1, survivors: 3}, {windows: 2, survivors: 2}, {windows: 4, survivors: 1}]
  seeds: [erk, owl]
evaluations: 20
"""


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout as the one JSON document that it must be."""
        return json.loads(self.out)


Run = Callable[..., Done]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved Llama of two blocks that reads at most 64 tokens."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def finished(tiny: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run; it only gets read."""
    folder = tmp_path_factory.mktemp("finished")
    config = folder / "small.yaml"
    config.write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVOPRUNE_CACHE", str(cache))
        run = evoprune.search_metric(
            str(tiny), config=config, executor="inline", run_dir=folder / "run", quiet=True, seed=1
        )
    return run.path


@pytest.fixture(scope="session")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text that takes no time to read, as the corpus does."""
    path = tmp_path_factory.mktemp("texts") / "story.txt"
    path.write_text("".join(f"line {number} holds {number * number % 97} of something\n" for number in range(1500)))
    return path


@pytest.fixture(scope="session")
def allocated(tiny: Path, story: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished allocation search; it only gets read."""
    folder = tmp_path_factory.mktemp("allocated")
    config = folder / "levels.yaml"
    config.write_text(ALLOCATION_CONFIG.replace("TEXT", str(story)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVOPRUNE_CACHE", str(cache))
        run = evoprune.search_allocation(
            str(tiny), config=config, executor="inline", run_dir=folder / "run", quiet=True, seed=1
        )
    return run.path


@pytest.fixture(autouse=True)
def place(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder, and a cache that the tests share."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("EVOPRUNE_CACHE", str(cache))
    monkeypatch.delenv("EVOPRUNE_RUNS", raising=False)
    # An id that is no folder is looked for on the Hub, which no test may reach.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    yield folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Call the command line; words may be paths and numbers."""
    monkeypatch.setenv("COLUMNS", "120")

    def call(*words: object) -> Done:
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return call


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A configuration file for a search of seconds."""
    path = tmp_path / "small.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def levels(tmp_path: Path, story: Path) -> Path:
    """The same for an allocation search."""
    path = tmp_path / "levels.yaml"
    path.write_text(ALLOCATION_CONFIG.replace("TEXT", str(story)))
    return path


@pytest.fixture
def without_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches that take seconds need not draw figures for as long."""
    monkeypatch.setattr("evoprune.sessions.write_report", lambda run: None)


def tree(folder: Path) -> set[str]:
    """Everything in a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.fixture
def refused(run: Run, place: Path) -> Callable[..., str]:
    """Run a command that must be refused; its one line."""

    def call(*words: object) -> str:
        before = tree(place)
        done: Done = run(*words)
        assert (done.code, done.out) == (2, ""), done
        assert done.err.startswith("error: ") and done.err.count("\n") == 1, done.err
        assert len(done.err) < 500
        assert tree(place) == before
        return done.err

    return call
