"""What happened when, and where: notes for people. No search decides anything by them, except when its time is up."""

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
OPENINGS = frozenset({"started", "resumed"})
"""Events with which a driver begins."""
SEARCHING = "searching"
"""The phase that a budget in minutes is for."""


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
                if (event := _parse(line)) is not None:
                    yield event

    def tail(self, position: int) -> tuple[list[dict[str, Any]], int]:
        """The whole events from a byte position on, and the position after them."""
        if not self._path.exists():
            return [], position
        with self._path.open("rb") as file:
            file.seek(position)
            data = file.read()
        end = data.rfind(b"\n") + 1
        return [event for line in data[:end].splitlines() if (event := _parse(line))], position + end

    def last_of(self, names: Collection[str]) -> dict[str, Any] | None:
        """The last event that has one of these names."""
        found = None
        for event in self.read():
            if event["event"] in names:
                found = event
        return found

    def seconds(self, *, until: float) -> float:
        """The time from each opening event to the last event before the next opening, all together.

        Args:
            until: a moment (Unix time) at which the last driver was still at work.
        """
        total = begin = end = 0.0
        for event in self.read():
            moment = datetime.fromisoformat(event["t"]).timestamp()
            if event["event"] in OPENINGS:
                total += end - begin
                begin = moment
            end = moment
        return total + max(end, until if begin else 0.0) - begin

    def phase_seconds(self, phase: str) -> float:
        """The time from each event `phase` with this name to the next, or to its driver's last event, all together.

        What a killed driver did after its last event is not known, and not counted.
        """
        total = end = 0.0
        begin: float | None = None
        for event in self.read():
            moment = datetime.fromisoformat(event["t"]).timestamp()
            if event["event"] in LIFE or event["event"] == "phase":
                if begin is not None:
                    total += (end if event["event"] in OPENINGS else moment) - begin
                begin = moment if event["event"] == "phase" and event["phase"] == phase else None
            end = moment
        return total + (end - begin if begin is not None else 0.0)


def _parse(line: bytes) -> dict[str, Any] | None:
    """The event of a line, or None if it is damaged."""
    try:
        event = json.loads(line)
        datetime.fromisoformat(event["t"])
        return event if {"t", "level", "event"} <= event.keys() else None
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1)
