"""The report of a run: one self-contained HTML page, and its figures as files."""

from __future__ import annotations

from pathlib import Path

from evoprune.search.kinds import kind_of
from evoprune.search.rundir import RunDirectory


def write_report(run: RunDirectory) -> Path:
    """Write ``report.html`` and ``plots/*.svg`` into the run's folder, from whatever the run has so far.

    The page needs no network and no other file. A finished run gives the same bytes each time.

    Returns:
        The path of the page.

    Raises:
        InvalidInput: the run's files are damaged, or its folder cannot be written.
    """
    return kind_of(run.kind).write_report(run)
