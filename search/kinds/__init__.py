"""Kinds of search: whatever people see of a run differs by what is searched, and is said here, one file a kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from evoprune.metrics.errors import InvalidInput
from evoprune.search.engine.trial_record import Range
from evoprune.search.loop import BirthSearch
from evoprune.search.trials import Trials

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from evoprune.search.config_sections import SearchConfig
    from evoprune.search.progress import Progress
    from evoprune.search.rundir import RunDirectory
    from evoprune.search.worker_session import Resources

KINDS = ("metric", "allocation", "joint", "structure", "policy")


class WatchedSearch(BirthSearch, Protocol):
    """A search by births that people watch.

    Attributes:
        reasons: how many births ended without a fitness, or early, by reason code.
    """

    reasons: Counter[str]

    @property
    def births(self) -> int:
        """Births so far."""

    @property
    def leader(self) -> tuple[float, str] | None:
        """Fitness of the best so far, and a few words of what it is."""


class Session(Protocol):
    """One session of a run."""

    def __init__(self, run: RunDirectory, config: Any, resources: Resources, progress: Progress) -> None: ...

    def execute(self, stopping: Callable[[], bool]) -> dict[str, Any]:
        """Do what is left to do; the result, which is then in the run's folder.

        Raises:
            Interrupted: `stopping` became true; the run can be resumed.
        """


class Kind(Protocol):
    """How a kind of search is run and shown. Light to import: no model code before it is needed.

    Attributes:
        name: as in ``run.json``.
        winner: what a winner is called.
        endings: of the files that a winner can be exported to.
    """

    name: str
    winner: str
    endings: tuple[str, ...]

    def session(self, config: Any) -> type[Session]:
        """What runs a session of it."""

    def steps(self, run: RunDirectory) -> list[RunDirectory]:
        """The runs that a run of this kind is made of, as far as they were begun; none if it does its own work."""

    def progress_of(self, run: RunDirectory) -> dict[str, Any]:
        """``evaluations``, ``distinct`` and ``best`` of a run without a result, as `show --json` has them."""

    def words(self, best: Mapping[str, Any]) -> str:
        """A few words of what the best is, given as `show --json` has it."""

    def table(self, result: Mapping[str, Any]) -> Table:
        """What was found on held-out text, as a table."""

    def result_view(self, result: Mapping[str, Any], run: Path) -> list[RenderableType]:
        """A finished run for the terminal."""

    def unfinished_facts(
        self, config: Any, document: Mapping[str, Any], history: Sequence[Mapping[str, Any]]
    ) -> dict[str, RenderableType]:
        """What is particular in the view of a run without a result, by name.

        Args:
            document: as `show --json` prints it.
        """

    def exported(self, target: Path) -> str:
        """Name of the exported file that a file of the user's is to be a copy of."""

    def check_export(self, file: Path, result: Mapping[str, Any]) -> None:
        """Refuse an exported file that is not the run's winner.

        Raises:
            InvalidInput: it was changed.
        """

    def write_report(self, run: RunDirectory) -> Path:
        """See `evoprune.search.report.write_report`."""

    def check_names(self, config: Any) -> None:
        """Refuse what can be known to be wrong before a run's folder is made.

        Raises:
            InvalidInput: a name that does not exist, or nothing to start from.
        """


@runtime_checkable
class BoardKind(Kind, Protocol):
    """A kind of search whose runs have a board.

    Attributes:
        descriptors: what the dashboard may correlate with the fitness; the same for a run's whole life.
    """

    descriptors: Mapping[str, Range]

    def prices(self, config: Any) -> Sequence[str]:
        """What fitness is bought with on its front."""

    def trials(self, config: Any) -> Trials:
        """What makes trials of its history."""

    def counters(self, search: Any, evaluations: int, steps: Sequence[int]) -> dict[str, int | str]:
        """What the terminal shows below the best.

        Args:
            steps: how many candidates have got to each rung or stage.
        """

    def searching_note(self, config: Any, search: Any, evaluations: int, steps: Sequence[int]) -> str:
        """The board's note while it runs, in Markdown; arguments as in `counters`."""

    def finished_note(self, result: Mapping[str, Any], artifacts: Sequence[str]) -> str:
        """The board's note of a result, which may show pictures among the artifacts."""

    def artifacts(self, folder: Path, result: Mapping[str, Any]) -> Iterator[Path]:
        """What a finished run leaves for people to take."""


def kind_of(name: str) -> Kind:
    """The kind of search of this name.

    Raises:
        InvalidInput: there is none.
    """
    if name not in KINDS:
        raise InvalidInput(f"no search of kind {name[:40]!r}; there are {', '.join(KINDS)}")
    found: Kind = import_module(f"evoprune.search.kinds.{name}").KIND
    return found


def board_kind_of(run: RunDirectory) -> BoardKind:
    """The kind of search of a run that has a board.

    Raises:
        InvalidInput: its steps have the boards.
    """
    kind = kind_of(run.kind)
    if not isinstance(kind, BoardKind):
        steps = [step.path for step in kind.steps(run)]
        names = ", ".join([*map(str, steps[:1]), *(step.name for step in steps[1:])]) or "none has begun yet"
        raise InvalidInput(f"a {kind.name} search has a study for each of its steps, so name one as RUN: {names}")
    return kind


def config_of(run: RunDirectory) -> SearchConfig:
    """The configuration of a run."""
    from evoprune.search.config import validated

    return validated({"kind": run.kind, **run.config})


def generation_facts(
    trials: Trials, document: Mapping[str, Any], history: Sequence[Mapping[str, Any]]
) -> dict[str, RenderableType]:
    """Of a search by generations, what `Kind.unfinished_facts` gives.

    Args:
        trials: of the search.
    """
    facts: dict[str, RenderableType] = {}
    if (best := document["best"]) is not None:
        facts["from"] = f"generation {best['generation']} ({best['origin']})"
    if history:
        counts = [0] * trials.steps
        for line in history:
            for stage in trials.reached(line):
                counts[stage] += 1
        facts["by stage"] = " → ".join(map(str, counts))
    return facts


def files_of(folder: Path, winner: str) -> Iterator[Path]:
    """What a finished run leaves for people to take: exports of the winner, plots, the page."""
    yield from sorted((folder / "export").glob(f"{winner}.*"))
    yield from sorted((folder / "plots").glob("*.svg"))
    if (folder / "report.html").exists():
        yield folder / "report.html"
