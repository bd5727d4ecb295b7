"""What happened when, and where: notes for people. The search never reads them."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

LIFE = frozenset({"started", "resumed", "failed", "interrupted", "finished"})
"""Events that say how the run as a whole is doing."""


class EventLog:
    """Lines `{"t": UTC time, "level": ..., "event": ..., ...}`; a damaged line is passed over.

    Args:
        path: the file; made by the first event.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, level: str, event: str, **fields: Any) -> None:
        """Append an event, from any thread. A full disk loses it: what must not be lost is written elsewhere."""
        moment = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        text = json.dumps({"t": moment, "level": level, "event": event, **fields}, ensure_ascii=False, default=str)
        with contextlib.suppress(OSError), self._path.open("ab", buffering=0) as file:
            torn = file.tell() > 0 and _last_byte(self._path) != b"\n"  # by a crash
            file.write((b"\n" if torn else b"") + text.encode(errors="replace") + b"\n")

    def read(self) -> Iterator[dict[str, Any]]:
        """The events, oldest first."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    event = json.loads(line)
                    if isinstance(event, dict) and {"t", "level", "event"} <= event.keys():
                        yield event

    def last_of(self, names: Collection[str]) -> str | None:
        """The name of the last event that has one of these names."""
        found = None
        for event in self.read():
            if event["event"] in names:
                found = event["event"]
        return found

    def seconds(self, openings: Collection[str], *, until: float) -> float:
        """The time from each opening event to the last event before the next opening, all together.

        Args:
            openings: events with which a driver begins.
            until: a moment (Unix time) at which the last driver was still at work.
        """
        total = begin = end = 0.0
        for event in self.read():
            moment = datetime.fromisoformat(event["t"]).timestamp()
            if event["event"] in openings:
                total += end - begin
                begin = moment
            end = moment
        return total + max(end, until if begin else 0.0) - begin


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1)
