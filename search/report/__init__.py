"""The report of a run: one self-contained HTML page, and its figures as files."""

from __future__ import annotations

from pathlib import Path

from evoprune.search.rundir import RunDirectory


def write_report(run: RunDirectory) -> Path:
    """Write ``report.html`` and ``plots/*.svg`` into the run's folder, from whatever the run has so far.

    The page needs no network and no other file. A finished run gives the same bytes each time.

    Returns:
        The path of the page.

    Raises:
        InvalidInput: the run is not a metric search, its files are damaged, or its folder cannot be written.
    """
    from evoprune.search.report.page import write_page

    return write_page(run)
