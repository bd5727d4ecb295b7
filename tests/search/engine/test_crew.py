"""What workers are asked of a cluster, which is a stand-in here."""

from __future__ import annotations

from typing import Any

import pytest

from evoprune.search.engine.ray import NO_GPU, RayExecutor


class Cluster:
    """What Ray tells about a cluster of one node."""

    def __init__(self, **resources: float) -> None:
        self._resources = resources

    def cluster_resources(self) -> dict[str, float]:
        return self._resources

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "NodeID": "a", "Resources": self._resources}]


@pytest.mark.parametrize(
    ("cluster", "asked", "address", "gpus", "size", "told"),
    [
        (Cluster(CPU=8, GPU=2), None, "head:6379", 1.0, 2, False),
        (Cluster(CPU=8), None, "head:6379", 0.0, 8, True),
        (Cluster(CPU=8), 0.0, "head:6379", 0.0, 8, False),
        (Cluster(CPU=8), 1.0, "head:6379", 1.0, 1, False),  # one that waits, for an autoscaler to see
        (Cluster(CPU=8), None, "local", 0.0, 8, False),
    ],
)
def test_that_a_cluster_has_no_gpu_yet_is_said_unless_none_was_wanted(
    cluster: Cluster, asked: float | None, address: str, gpus: float, size: int, told: bool
) -> None:
    events: list[tuple[str, str]] = []
    executor = RayExecutor(
        "module:factory",
        {},
        workers=None,
        gpus_per_worker=asked,
        address=address,
        notify=lambda level, event, **fields: events.append((event, fields["text"])),
    )
    crew = executor._crew(cluster, None)
    assert (crew.size, crew._options["num_gpus"]) == (size, gpus)
    assert events == ([("no_gpu", NO_GPU)] if told else [])
