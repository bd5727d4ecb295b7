"""A search on disk, as Python sees it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.files import user_path, write_atomically
from evoprune.search.engine.durable import disk_errors
from evoprune.search.kinds import kind_of
from evoprune.search.rundir import RunDirectory, RunState
from evoprune.search.rundir import list_runs as run_directories
from evoprune.summaries import resume_command, run_document

if TYPE_CHECKING:
    from rich.table import Table


__all__ = ["Run", "list_runs"]


class Run:
    """A search on disk, finished or not. What it says is read from its folder whenever it is asked.

    Args:
        run: a folder, a run's id, or `latest`.

    Attributes:
        directory: the folder as the search itself sees it.

    Raises:
        InvalidInput: there is no such run.
    """

    def __init__(self, run: str | Path | RunDirectory = "latest") -> None:
        self.directory = run if isinstance(run, RunDirectory) else RunDirectory.open(run)

    def __repr__(self) -> str:
        best = self.best
        found = "" if best is None else f", best {kind_of(self.kind).words(best)} at {best['fitness']:.5g}"
        return f"<Run {self.id}: {self.state}{found}>"

    @property
    def id(self) -> str:
        """Its name, with the time when it began."""
        return self.directory.run_id

    @property
    def path(self) -> Path:
        """Its folder."""
        return self.directory.path

    @property
    def kind(self) -> str:
        """What it searches: `metric`, `allocation` or `joint`."""
        return self.directory.kind

    @property
    def state(self) -> RunState:
        """`running`, `interrupted`, `finished` or `failed`."""
        return self.directory.state

    @property
    def config(self) -> dict[str, Any]:
        """Every option, resolved."""
        return self.directory.config

    @property
    def result(self) -> dict[str, Any] | None:
        """All of `result.json`; None while the run is not finished."""
        return self.directory.result

    @property
    def summary(self) -> dict[str, Any]:
        """What `evoprune show --json` prints."""
        return run_document(self.directory)

    @property
    def best(self) -> dict[str, Any] | None:
        """The winner: `expression`, `allocation` or both, `fitness` (text B, less is better), later `heldout` (text C).

        None before the first evaluation.
        """
        return self.summary["best"]

    @property
    def front(self) -> list[dict[str, Any]]:
        """Metrics that none beats in both fitness and complexity, simplest first; empty until the run is finished.

        Of a search for a front (`pareto`), the allocations or shapes that none beats in fitness and all costs, the
        dearest first: `saved` (per cent of the dense cost), `cost`, `sparsity`, `allocation` or `shape`, `fitness`,
        `heldout`, and `uniform` at the same cost (`random` where parts are only dropped). Where latency stands beside
        parameters, also `latency` in nanoseconds as the sum of parts, and `name`, the per cent of both that are saved.
        Without a front all candidates are of one budget, and there is none.
        """
        return self.summary["front"]

    @property
    def baselines(self) -> list[dict[str, Any]]:
        """Published criteria or allocators under the same conditions: `name`, `fitness`, `heldout`.

        Empty until the run is finished.
        """
        return self.summary["baselines"]

    @property
    def dense(self) -> dict[str, Any]:
        """The model before pruning: `heldout`, None until the run is finished."""
        return self.summary["dense"]

    def history(self) -> Iterator[dict[str, Any]]:
        """The births so far, in their order."""
        return self.directory.history()

    def table(self) -> Table:
        """Winner, dense model and baselines on held-out text, or the front, as a rich table, which a notebook shows.

        Raises:
            InvalidInput: the run is not finished.
        """
        return kind_of(self.kind).table(self._finished())

    def export(self, path: str | Path) -> Path:
        """Write the winner as a file of its own.

        Args:
            path: a metric's ends in ``.py`` (needs torch only, tests itself when run), ``.json`` or ``.tex``; an
                allocation's in ``.json`` or ``.txt`` (EvoPress's format), a formula's also in ``.py``. A joint search
                has both; its ``.json`` is the metric unless the name begins with ``allocation``.

        Raises:
            InvalidInput: another ending, the run is not finished, its exports are damaged, or the disk's fault.
        """
        target, kind = user_path(path), kind_of(self.kind)
        if target.suffix not in kind.endings:
            raise InvalidInput(
                f"cannot export the {kind.winner} to {target.name!r}: the ending must be {' or '.join(kind.endings)}"
            )
        result = self._finished()
        source = self.path / "export" / kind.exported(target)
        kind.check_export(source, result)
        with disk_errors(target):
            write_atomically(target, source.read_bytes())
        return target

    def report(self) -> Path:
        """Write `report.html` into the run's folder, one self-contained page, from whatever the run has so far."""
        from evoprune.search.report import write_report

        return write_report(self.directory)

    def resume(self, **options: Any) -> Run:
        """Continue the run to its end; see `evoprune.resume`."""
        from evoprune.searches import resume

        return resume(self.directory, **options)

    def _finished(self) -> dict[str, Any]:
        result = self.result
        if result is None:
            raise InvalidInput(f"run {self.id} is not finished: continue it with `{resume_command(self.path)}`")
        return result


def list_runs(folder: str | Path | None = None) -> list[Run]:
    """The runs in a folder, oldest first.

    Args:
        folder: by default that of the environment variable `EVOPRUNE_RUNS`, else `runs` below the current folder.
    """
    return [Run(directory) for directory in run_directories(None if folder is None else Path(folder))]
