"""Watching a run that another process drives, on this machine or on another one that shares its folder."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from evoprune.metrics.errors import Interrupted
from evoprune.search.engine.events import SEARCHING
from evoprune.search.kinds import config_of, kind_of
from evoprune.search.progress import Progress
from evoprune.search.rundir import RunDirectory
from evoprune.summaries import run_document

FOLLOW_SECONDS = 1.0

# Events that people want to hear of when they happen, and what is said of each.
_TOLD = {
    "started": "started",
    "resumed": "resumed",
    "interrupted": "interrupted",
    "finished": "finished",
    "failed": "failed: {error}",
    "worker_lost": "worker {worker} was lost: {loss}",
    "worker_refused": "a worker was refused: {error}",
    "no_gpu": "{text}",
    "board_trouble": "{text}",
}


def follow(run: RunDirectory) -> None:
    """Show what happens on stderr until nobody drives the run any more. Reads only: the run does not notice.

    Raises:
        Interrupted: the user has seen enough.
    """
    config, document = config_of(run), run_document(run)
    title = f"evoprune {run.run_id}: {config.model.name}, seed {document['seed']} (followed)"
    progress = Progress(config.evaluations, config.minutes, title=title, elapsed=document["seconds"])
    try:
        with progress:
            events, position = run.tail_events(0)
            for event in events:  # what is long past is not told again
                _show(progress, event, run)
            _show_best(progress, document, run)
            while True:
                running = run.state == "running"  # asked before reading, so that the last events are not missed
                events, position = run.tail_events(position)
                for event in events:
                    _show(progress, event, run)
                    _tell(progress, event)
                if not running:
                    return
                progress.update()
                time.sleep(FOLLOW_SECONDS)
    except KeyboardInterrupt:
        raise Interrupted(f"no longer following {run.run_id}, which goes on") from None


def _show_best(progress: Progress, document: Mapping[str, Any], run: RunDirectory) -> None:
    """The best that the history knows, for the events may be a little behind."""
    best = document["best"]
    if best is not None:
        progress.update(best=best["fitness"], expression=kind_of(run.kind).words(best))


def _show(progress: Progress, event: Mapping[str, Any], run: RunDirectory) -> None:
    if event["event"] == "phase":
        progress.phase(event["phase"])
        if event["phase"] == SEARCHING:
            progress.clock_starts(run.phase_seconds(SEARCHING))
    elif event["event"] == "progress":
        workers = event.get("workers", {})
        starting = f" + {workers['starting']} starting" if workers.get("starting") else ""
        counters: dict[str, int | str] = dict(event.get("counters", {}))
        counters |= {"workers": f"{workers.get('ready', 0)}{starting}", "deaths": workers.get("deaths", 0)}
        progress.update(
            event.get("evaluations"), best=event.get("best"), expression=event.get("expression"), counters=counters
        )


def _tell(progress: Progress, event: Mapping[str, Any]) -> None:
    template = _TOLD.get(event["event"])
    if template is not None:
        progress.line(template.format_map(defaultdict(str, event)))
