"""The head of a cluster as seen by a driver; `tests/search/test_faults.py` loses real ones."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any

import pytest

from evoprune.metrics.errors import NoCapacity
from evoprune.search.engine import head as head_module
from evoprune.search.engine.crew import Crew
from evoprune.search.engine.head import Head
from evoprune.search.engine.running import WorkerRecipe


class RayError(Exception):
    """In place of Ray's own."""


class StandIn:
    """The module, connected to a head that may have forgotten who asks; it lists nodes, and counts how often."""

    exceptions = SimpleNamespace(RayError=RayError)

    def __init__(self) -> None:
        self.forgotten = False
        self.asked = 0
        client = SimpleNamespace(internal_kv_get=self._get)
        self._private = SimpleNamespace(worker=SimpleNamespace(global_worker=SimpleNamespace(gcs_client=client)))

    def _get(self, key: bytes, namespace: None, timeout: float) -> None:
        if self.forgotten:
            raise RayError("WrongClusterID")

    def nodes(self) -> list[dict[str, Any]]:
        self.asked += 1
        return [{"Alive": True, "NodeID": "a", "Resources": {"CPU": 4.0}}]


def test_a_head_is_asked_only_while_it_is_there_and_knows_who_asks() -> None:
    ray = StandIn()
    with socket.create_server(("127.0.0.1", 0)) as server:
        head = Head(f"127.0.0.1:{server.getsockname()[1]}")
        options = {"num_cpus": 1, "num_gpus": 0}
        crew = Crew(ray, WorkerRecipe("module:factory", {}), 1, options, lambda *_, **__: None, 600.0, head=head)
        assert head.answers() and head.knows_us(ray)
        ray.forgotten = True
        assert head.answers() and not head.knows_us(ray)
        crew.grow()
        assert (crew.size, ray.asked) == (1, 0)
        ray.forgotten = False
        crew.grow()
        assert (crew.size, ray.asked) == (4, 1)
    assert not head.answers() and not head.knows_us(ray)
    crew.grow()
    assert ray.asked == 1


def test_a_head_that_stays_away_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(head_module.time, "monotonic", lambda: now)
    with socket.create_server(("127.0.0.1", 0)) as server:
        head = Head(f"127.0.0.1:{server.getsockname()[1]}")
        now = head_module.LOOK_SECONDS + 1
        head.check()
        seen = now
    now = seen + head_module.GONE_SECONDS
    head.check()
    now += head_module.LOOK_SECONDS + 1
    with pytest.raises(NoCapacity, match=r"the head of the Ray cluster, 127\.0\.0\.1:\d+, has been gone for 30 s"):
        head.check()
