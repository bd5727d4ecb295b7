"""Parcels: sets of files that reach every node once, and are then mapped by all processes of that node.

A parcel is the folder ``parcels/<name>`` of a node's cache: files, and a list of them with sizes and hashes. The name
ends in a hash of that list, so that equal names mean equal bytes, wherever a parcel was made; nothing that leaves a
node names a path of it. What a node lacks it gets from a courier, which whoever runs a cluster provides.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from filelock import FileLock

from evoprune.fitness.cache import cache_folder
from evoprune.metrics.errors import EvopruneError, InvalidInput
from evoprune.metrics.files import canonical_json, content_hash, file_hash

LIST = "parcel.json"
CHUNK_BYTES = 32 << 20
"""What travels at a time: large enough to be quick, small enough for any object store."""

Files = Mapping[str, Mapping[str, Any]]
"""Path inside the parcel -> ``bytes`` and ``sha256``."""


class Courier(Protocol):
    """Reaches the place that keeps the parcels of a cluster."""

    def find(self, prefix: str) -> str | None:
        """The first of the names there that begin so."""

    def files(self, name: str) -> Files:
        """What a parcel holds."""

    def read(self, name: str, path: str, offset: int) -> bytes:
        """The next `CHUNK_BYTES` of a file."""

    def begin(self, name: str, files: Files) -> list[str] | None:
        """Announce a parcel: its files that are wanted, or None if it is there already."""

    def write(self, name: str, path: str, data: bytes) -> None:
        """Append to a file of an announced parcel."""

    def finish(self, name: str) -> None:
        """The announced parcel is complete."""


_courier: Courier | None = None


def set_courier(courier: Courier | None) -> None:
    """From now on this process gets what its node lacks from `courier`."""
    global _courier
    _courier = courier


def find(prefix: str) -> str | None:
    """The name of a parcel that begins with `prefix`: of this node, else of the cluster, else None."""
    local = sorted(path.name for path in parcel_folder("").glob(f"{prefix}-*") if holds(path.name))
    if local:
        return local[0]
    return None if _courier is None else _courier.find(prefix)


def require(name: str) -> Path:
    """The folder of a parcel on this node, after fetching it if need be; one process of a node does so.

    Raises:
        InvalidInput: it is neither here nor anywhere else.
        EvopruneError: it arrived damaged.
    """
    folder = parcel_folder(name)
    if holds(name):
        return folder
    if _courier is None:
        raise InvalidInput(f"{folder} is missing or damaged: what a run began with was deleted from the cache")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{name}.lock")):
        if not holds(name):
            incoming = Incoming(name, _courier.files(name))
            try:
                for path in incoming.missing:
                    while chunk := _courier.read(name, path, incoming.received(path)):
                        incoming.write(path, chunk)
                incoming.finish()
            finally:
                incoming.drop()
    return folder


def deliver(name: str) -> None:
    """Hand a parcel of this node to the cluster, so that it outlives the node."""
    wanted = None if _courier is None else _courier.begin(name, listed(name))
    if _courier is None or wanted is None:
        return
    for path in wanted:
        with (parcel_folder(name) / path).open("rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                _courier.write(name, path, chunk)
    _courier.finish(name)


@contextmanager
def packing(prefix: str) -> Iterator[Packing]:
    """A folder to fill; at the end of the block it becomes a parcel, whole or not at all."""
    folder = _partial_folder(prefix)
    try:
        packing = Packing(folder)
        yield packing
        files = {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_hash(path)}
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        packing.name = f"{prefix}-{_hash(files)}"
        _settle(folder, packing.name, files)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Packing:
    """What `packing` gives: `folder` to fill, and afterwards the parcel's `name`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = ""


class Incoming:
    """A parcel on its way to this node.

    Files that the node has in another parcel are linked and not sent again.

    Raises:
        EvopruneError: the list is not the one that the name was made from.
    """

    def __init__(self, name: str, files: Files) -> None:
        if not name.endswith(f"-{_hash(files)}") or not all(map(_is_inside, files)):
            raise EvopruneError(f"parcel {name} was announced with other files than its own")
        self._name = name
        self._files = files
        self._folder = _partial_folder(name)
        self.missing = [path for path, facts in files.items() if not self._link_twin(path, facts)]

    def received(self, path: str) -> int:
        """Bytes of a file that are here."""
        return (self._folder / path).stat().st_size if (self._folder / path).exists() else 0

    def write(self, path: str, data: bytes) -> None:
        """Append to a file."""
        (self._folder / path).parent.mkdir(parents=True, exist_ok=True)
        with (self._folder / path).open("ab") as stream:
            stream.write(data)

    def finish(self) -> None:
        """Compare every file with its hash and put the parcel in place.

        Raises:
            EvopruneError: a file differs.
        """
        for path, facts in self._files.items():
            if not facts["bytes"]:
                self.write(path, b"")
            if file_hash(self._folder / path) != facts["sha256"]:
                raise EvopruneError(f"{path} of parcel {self._name} arrived damaged")
        _settle(self._folder, self._name, self._files)

    def drop(self) -> None:
        """Forget what has arrived and is not in place."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _link_twin(self, path: str, facts: Mapping[str, Any]) -> bool:
        """Whether another parcel of this node has the same file."""
        for other in parcel_folder("").glob(f"[!.]*/{LIST}"):
            for twin, held in listed(other.parent.name).items():
                if held["sha256"] == facts["sha256"] and (other.parent / twin).is_file():
                    link(other.parent / twin, self._folder / path)
                    return True
        return False


def parcel_folder(name: str) -> Path:
    """Where a parcel of this name is, or would be, on this node."""
    return cache_folder() / "parcels" / name


def listed(name: str) -> Files:
    """What a parcel of this node holds."""
    return json.loads((parcel_folder(name) / LIST).read_text())


def holds(name: str) -> bool:
    """Whether this node has the parcel, complete by the sizes of its files."""
    folder = parcel_folder(name)
    try:
        return all((folder / path).stat().st_size == facts["bytes"] for path, facts in listed(name).items())
    except (OSError, ValueError):
        return False


def read(name: str, path: str, offset: int) -> bytes:
    """The next `CHUNK_BYTES` of a file of a parcel of this node."""
    with (parcel_folder(name) / path).open("rb") as stream:
        stream.seek(offset)
        return stream.read(CHUNK_BYTES)


def link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or a copy where the file system has no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _hash(files: Files) -> str:
    return content_hash({path: dict(facts) for path, facts in files.items()})[:32]


def _is_inside(path: str) -> bool:
    parts = PurePosixPath(path)
    return not parts.is_absolute() and ".." not in parts.parts and path != LIST


def _partial_folder(name: str) -> Path:
    folder = parcel_folder(f".{name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    folder.mkdir(parents=True)
    return folder


def _settle(partial: Path, name: str, files: Files) -> None:
    """Make a filled folder the parcel `name`; if it is there already, made by another process, that one stays."""
    (partial / LIST).write_text(canonical_json(files))
    if holds(name):
        return
    shutil.rmtree(parcel_folder(name), ignore_errors=True)  # damaged, or links to what was deleted
    try:
        partial.rename(parcel_folder(name))
    except OSError:
        if not holds(name):
            raise
