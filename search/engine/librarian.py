"""Moves parcels through a Ray cluster: an actor that keeps them near the driver, and the courier that others use.

Nodes pull what they lack in chunks through Ray's object store, each as fast as it can take them; nothing stays in the
store, and a node that joins late pulls like the others. What a node makes, it hands over at once, so that it may leave.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from evoprune.fitness import parcels
from evoprune.fitness.cache import cache_folder
from evoprune.fitness.parcels import Courier, Files, Incoming


class Librarian:
    """The actor. It keeps parcels in the cache folder of its node.

    Args:
        cache: that folder, where it is the driver's own; None takes the node's.
    """

    def __init__(self, cache: str | None = None) -> None:
        if cache is not None:
            os.environ["EVOPRUNE_CACHE"] = cache
        self._incoming: dict[str, Incoming] = {}

    def find(self, prefix: str) -> str | None:
        """See `Courier`, as for the other methods."""
        return parcels.find(prefix)

    def files(self, name: str) -> Files:
        return parcels.listed(name)

    def read(self, name: str, path: str, offset: int) -> bytes:
        return parcels.read(name, path, offset)

    def begin(self, name: str, files: Files) -> list[str] | None:
        """The files of an announced parcel that are wanted; None if it is here."""
        if parcels.holds(name):
            return None
        if name in self._incoming:
            self._incoming.pop(name).drop()  # who announced it before was lost on the way
        self._incoming[name] = Incoming(name, files)
        return self._incoming[name].missing

    def write(self, name: str, path: str, data: bytes) -> None:
        self._incoming[name].write(path, data)

    def finish(self, name: str) -> None:
        incoming = self._incoming.pop(name)
        try:
            incoming.finish()
        finally:
            incoming.drop()


class RayCourier(Courier):
    """Reaches the librarian from a worker or from the driver.

    Args:
        librarian: the actor's handle.
    """

    def __init__(self, librarian: Any) -> None:
        self._librarian = librarian

    def find(self, prefix: str) -> str | None:
        return self._call("find", prefix)

    def files(self, name: str) -> Files:
        return self._call("files", name)

    def read(self, name: str, path: str, offset: int) -> bytes:
        return self._call("read", name, path, offset)

    def begin(self, name: str, files: Files) -> list[str] | None:
        return self._call("begin", name, files)

    def write(self, name: str, path: str, data: bytes) -> None:
        self._call("write", name, path, data)

    def finish(self, name: str) -> None:
        self._call("finish", name)

    def _call(self, method: str, *arguments: Any) -> Any:
        import ray

        return ray.get(getattr(self._librarian, method).remote(*arguments))


def engage(ray: Any, over_client: bool) -> Any:
    """Start the librarian on the driver's node; behind a `ray://` address, on the head.

    Args:
        ray: the module, connected.
        over_client: whether the driver is outside of the cluster, so that no node shares its disk.
    """
    options: dict[str, Any] = {"num_cpus": 0, "max_restarts": -1}
    if over_client:
        options["resources"] = {"node:__internal_head__": 0.001}
        return ray.remote(Librarian).options(**options).remote()
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(here, soft=False)
    return ray.remote(Librarian).options(**options).remote(str(cache_folder()))


def node_id() -> str:
    """Ray's name of the node that this worker is on."""
    import ray

    return ray.get_runtime_context().get_node_id()


def package_folder(scratch: Path) -> Path:
    """A folder named `evoprune` with the whole package in it, as nodes import it.

    Args:
        scratch: an empty folder, for a checkout: there the package is spread over several folders, linked here.
    """
    import evoprune
    from evoprune import fitness, metrics, search

    door = Path(next(iter(evoprune.__path__)))
    parts = {part.__name__.rpartition(".")[2]: Path(next(iter(part.__path__))) for part in (fitness, metrics, search)}
    if all(path == door / name for name, path in parts.items()):
        return door
    folder = scratch / "evoprune"
    folder.mkdir()
    for name, path in parts.items():
        (folder / name).symlink_to(path, target_is_directory=True)
    for file in door.iterdir():
        if file.name != "__pycache__":
            (folder / file.name).symlink_to(file)
    return folder
