"""A worker that starts at once, for searches whose workers are killed: its fitness is a hash of the candidate."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from evoprune.metrics.files import content_hash


class HashedWorker:
    """Answers ``evaluate`` jobs of a search on the planted target, about as `PlantedWorker` does.

    Args:
        context: ``log`` names a file to note the begin of every evaluation in, ``seconds`` is how long one takes.
    """

    def __init__(self, context: dict[str, Any]) -> None:
        self._context = context

    def handle(self, kind: str, payload: dict[str, Any]) -> dict[str, Any]:
        if "log" in self._context:
            key = content_hash(["planted", payload["criterion"], payload["thresholds"]])
            with Path(self._context["log"]).open("ab", buffering=0) as file:
                file.write(f"{key} {os.getpid()} {time.time()}\n".encode())
        time.sleep(self._context.get("seconds", 0.0))
        first, second = (int(content_hash([payload["criterion"], rung])[:8], 16) / 2**32 for rung in (0, 1))
        threshold = payload["thresholds"][0]
        rungs = [first] if threshold is not None and first > threshold else [first, (first + second) / 2]
        return {"rungs": rungs, "stderr": 0.0, "removed": 0}


def build(context: dict[str, Any]) -> HashedWorker:
    """The factory that executors call."""
    return HashedWorker(context)
