"""Evaluations that only take time, and a search that asks for them. No torch, no model: what is left is the engine."""

from __future__ import annotations

import mmap
import random
import time
from dataclasses import asdict, dataclass
from typing import Any

from evoprune.metrics.files import content_hash
from evoprune.search.engine.executor import Job, Outcome
from evoprune.search.loop import Birth


@dataclass(frozen=True)
class Load:
    """What an evaluation is like.

    Attributes:
        seconds: its mean duration.
        sigma: spread of the logarithm of the duration; 0 is constant. The mean stays.
        memory: bytes that it fills, and holds as long as it lasts.
        failures: share of evaluations that raise.
    """

    seconds: float = 1.0
    sigma: float = 0.0
    memory: int = 0
    failures: float = 0.0

    def job(self, number: int, parent: float) -> Job:
        """Evaluation number `number`: duration, fate and value follow from the number and from `parent`."""
        chance = random.Random(number)
        payload = {
            "seconds": self.seconds * chance.lognormvariate(-(self.sigma**2) / 2, self.sigma),
            "fails": chance.random() < self.failures,
            "memory": self.memory,
            "loss": parent + chance.gauss(0.1, 1.0),
        }
        return Job(content_hash([number, payload]), "wait", payload)


class WaitingWorker:
    """Holds memory, lets time pass, and answers or raises. Several threads may use it at a time."""

    def handle(self, kind: str, payload: dict[str, Any]) -> dict[str, Any]:
        with mmap.mmap(-1, max(payload["memory"], 1)) as held:
            for page in range(0, payload["memory"], mmap.PAGESIZE):
                held[page] = 1
            time.sleep(payload["seconds"])
        if payload["fails"]:
            raise RuntimeError("as ordered")
        return {"loss": payload["loss"]}


def build(context: dict[str, Any]) -> WaitingWorker:
    """The factory that executors call."""
    return WaitingWorker()


class SyntheticSearch:
    """Every birth descends from the best result applied so far; so its history shows whether the order was kept."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._births = 0
        self._best = 0.0

    def next_birth(self) -> Birth:
        job = self._load.job(self._births, self._best)
        self._births += 1
        return Birth(self._births - 1, {"parent": self._best}, job)

    def apply(self, birth: Birth, outcome: Outcome | None) -> dict[str, Any]:
        assert outcome is not None  # every birth has a job
        loss = outcome.values.get("loss")
        if loss is not None:
            self._best = min(self._best, loss)
        return {"birth": birth.number, **birth.record, "status": outcome.status, "loss": loss}

    def conclude(self) -> bool:
        return False

    def state(self) -> dict[str, Any]:
        return {"load": asdict(self._load), "births": self._births, "best": self._best}

    def restore(self, state: dict[str, Any]) -> None:
        self._load, self._births, self._best = Load(**state["load"]), state["births"], state["best"]
