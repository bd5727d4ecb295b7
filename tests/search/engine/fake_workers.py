"""Workers for the tests. Actors import this module by name, from the folder that `python_path` gives them."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from evoprune.metrics.errors import AuditFailed, InvalidCandidate, InvalidInput


class FakeWorker:
    """Answers from its arguments alone; some kinds misbehave."""

    def __init__(self, context: dict[str, Any]) -> None:
        self.context = context

    def numerics(self) -> dict[str, Any] | None:
        return self.context.get("numerics")

    def handle(self, kind: str, payload: dict[str, Any]) -> dict[str, Any]:
        return getattr(self, kind)(payload)

    def square(self, payload: dict[str, Any]) -> dict[str, Any]:
        time.sleep(payload.get("seconds", 0.0))
        return {"fitness": payload["x"] ** 2 + self.context.get("offset", 0), "pair": (1, 2)}

    def where(self, payload: dict[str, Any]) -> dict[str, Any]:
        return {"pid": os.getpid(), "threads": os.environ.get("OMP_NUM_THREADS"), "home": os.environ.get("FAKE")}

    def invalid(self, payload: dict[str, Any]) -> dict[str, Any]:
        raise InvalidCandidate("TIES", "every row")

    def nan(self, payload: dict[str, Any]) -> dict[str, Any]:
        return {"fitness": float("nan")}

    def broken(self, payload: dict[str, Any]) -> dict[str, Any]:
        raise ZeroDivisionError("as ordered")

    def misread(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Two signals come, and what the second raises is taken for a fault of the candidate, as native code does."""
        try:
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape") from None
        return {}

    def not_json(self, payload: dict[str, Any]) -> dict[str, Any]:
        return {"fitness": object()}

    def memory(self, payload: dict[str, Any]) -> dict[str, Any]:
        raise MemoryError("as ordered")

    def hoard(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Takes memory, slowly, until somebody ends it or `bytes` are taken."""
        held = bytearray()
        while len(held) < payload["bytes"]:
            held += b"x" * (64 << 20)
            time.sleep(0.05)
        return {"fitness": len(held)}

    def device(self, payload: dict[str, Any]) -> dict[str, Any]:
        """The device breaks, for this process only if there is a marker."""
        marker = Path(payload["marker"])
        if marker.exists() and payload.get("once"):
            return {"fitness": os.getpid()}
        marker.touch()
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def lost_file(self, payload: dict[str, Any]) -> dict[str, Any]:
        return {"text": Path("/nowhere").read_text()}

    def changed(self, payload: dict[str, Any]) -> dict[str, Any]:
        raise AuditFailed("the restored model differs from the loaded one")

    def segfault(self, payload: dict[str, Any]) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGSEGV)
        return {}

    def spoil(self, payload: dict[str, Any]) -> dict[str, Any]:
        payload["x"] = "spoilt"
        return {}

    def poison(self, payload: dict[str, Any]) -> dict[str, Any]:
        os._exit(13)

    def die_once(self, payload: dict[str, Any]) -> dict[str, Any]:
        marker = Path(payload["marker"])
        if marker.exists():
            return {"fitness": 0}
        marker.touch()
        os._exit(13)

    def leave(self, payload: dict[str, Any]) -> dict[str, Any]:
        sys.exit(3)


def build(context: dict[str, Any]) -> FakeWorker:
    if context.get("refuse"):
        raise InvalidInput("no model at /nowhere")
    if context.get("fall"):
        os._exit(11)
    return FakeWorker(context)
