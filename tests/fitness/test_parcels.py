"""Parcels between the caches of several nodes; a node is a cache folder here."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from evoprune.fitness import parcels
from evoprune.fitness.context import EvaluationContext
from evoprune.fitness.structure_build import build_structure_block, build_structure_database
from evoprune.fitness.structure_database import StructureDatabase
from evoprune.fitness.travel import pack_inputs
from evoprune.fitness.units import find_units
from evoprune.fitness.worker import MetricWorker
from evoprune.metrics.errors import EvopruneError, InvalidInput
from evoprune.search.engine.librarian import Librarian
from tests.models import random_windows, save_tiny, tiny_language_model

Node = Callable[[str], Any]


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    """Enters a node by its name."""

    @contextmanager
    def enter(name: str) -> Iterator[Path]:
        with monkeypatch.context() as patch:
            patch.setenv("EVOPRUNE_CACHE", str(tmp_path / name))
            yield tmp_path / name

    return enter


class Road:
    """A courier to a librarian on another node, in this process: counts what is called, and can spoil a chunk."""

    def __init__(self, node: Node) -> None:
        self.calls: Counter[str] = Counter()
        self.spoil = False
        self._node = node
        self._librarian = Librarian()

    def __getattr__(self, method: str) -> Any:
        def call(*arguments: Any) -> Any:
            self.calls[method] += 1
            with self._node("driver"):
                answer = getattr(self._librarian, method)(*arguments)
            return answer[::-1] if self.spoil and method == "read" else answer

        return call


@pytest.fixture
def road(node: Node, monkeypatch: pytest.MonkeyPatch) -> Iterator[Road]:
    monkeypatch.setattr(parcels, "CHUNK_BYTES", 1000)
    road = Road(node)
    parcels.set_courier(road)
    yield road
    parcels.set_courier(None)


def packed(files: dict[str, bytes], prefix: str = "thing") -> str:
    with parcels.packing(prefix) as packing:
        for path, data in files.items():
            (packing.folder / path).parent.mkdir(parents=True, exist_ok=True)
            (packing.folder / path).write_bytes(data)
    return packing.name


FILES = {"a.bin": bytes(range(256)) * 10, "deep/b.bin": b"b" * 1000, "empty": b""}


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_parcel_reaches_a_node_whole_and_once(node: Node, road: Road) -> None:
    with node("driver"):
        name = packed(FILES)
    with node("b") as cache:
        folder = parcels.require(name)
        assert folder.is_relative_to(cache)
        assert {path: data for path, data in content(folder).items() if path != parcels.LIST} == FILES
        reads = road.calls["read"]
        assert reads == 4 + 2 + 1  # chunks of each file, the last one empty
        assert parcels.require(name) == folder
        assert road.calls["read"] == reads
        assert [path.name for path in folder.parent.iterdir() if path.suffix == ".part"] == []


def test_processes_of_a_node_fetch_a_parcel_once(node: Node, road: Road) -> None:
    with node("driver"):
        name = packed(FILES)
        road._librarian = Shelf(name)  # type: ignore[assignment]
    road._node = lambda name: nullcontext()  # threads share their environment, so nobody may change it now
    with node("b"), ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(parcels.require, [name] * 4))) == 1
    assert road.calls["files"] == 1


class Shelf:
    """Serves one parcel from memory."""

    def __init__(self, name: str) -> None:
        self._list = parcels.listed(name)

    def files(self, name: str) -> parcels.Files:
        return self._list

    def read(self, name: str, path: str, offset: int) -> bytes:
        return FILES[path][offset : offset + parcels.CHUNK_BYTES]


def test_what_a_node_made_outlives_it(node: Node, road: Road) -> None:
    with node("a") as cache:
        name = packed(FILES)
        parcels.deliver(name)
        parcels.deliver(name)
        shutil.rmtree(cache)
    assert road.calls["finish"] == 1
    with node("b"):
        assert parcels.find("thing") == name
        assert (parcels.require(name) / "deep" / "b.bin").read_bytes() == FILES["deep/b.bin"]


def test_a_file_that_a_node_has_already_is_linked(node: Node, road: Road) -> None:
    with node("driver"):
        first, second = packed(FILES), packed({"again/a.bin": FILES["a.bin"], "new": b"new"})
    with node("b"):
        old = parcels.require(first)
        before = road.calls["read"]
        new = parcels.require(second)
        assert road.calls["read"] - before == 2
        assert (new / "again" / "a.bin").samefile(old / "a.bin")


def test_a_spoilt_parcel_is_refused_and_leaves_nothing(node: Node, road: Road) -> None:
    with node("driver"):
        name = packed(FILES)
    road.spoil = True
    with node("b") as cache:
        with pytest.raises(EvopruneError, match=r"a\.bin of parcel .* arrived damaged"):
            parcels.require(name)
        assert not parcels.holds(name)
        assert list(cache.rglob("a.bin")) == []


@pytest.mark.parametrize("path", ["../out", "/etc/out", parcels.LIST])
def test_a_list_cannot_name_files_elsewhere(path: str, node: Node) -> None:
    files = {path: {"bytes": 1, "sha256": "0" * 64}}
    with node("b"), pytest.raises(EvopruneError, match="announced with other files"):
        parcels.Incoming(f"thing-{parcels._hash(files)}", files)
    with node("b"), pytest.raises(EvopruneError, match="announced with other files"):
        parcels.Incoming("thing-0", {"a": {"bytes": 1, "sha256": "0" * 64}})


def test_a_damaged_parcel_is_fetched_again_and_without_a_courier_refused(node: Node, road: Road) -> None:
    with node("driver"):
        name = packed(FILES)
    with node("b"):
        (parcels.require(name) / "a.bin").write_bytes(b"cut")
        assert (parcels.require(name) / "a.bin").read_bytes() == FILES["a.bin"]
        (parcels.parcel_folder(name) / "a.bin").unlink()
        parcels.set_courier(None)
        with pytest.raises(InvalidInput, match="missing or damaged"):
            parcels.require(name)


def test_workers_of_two_nodes_agree_though_they_share_no_path(node: Node, road: Road, tmp_path: Path) -> None:
    """The driver packs model and text; one node prepares; another evaluates, and finds what was prepared."""
    model, text = save_tiny(tmp_path / "model"), tmp_path / "text.txt"
    text.write_text("\n".join(f"line {index}: {index * index % 97} apples." for index in range(6000)))
    asked = EvaluationContext(
        model=str(model), data=str(text), calibration=str(text), window=32, rungs=(1, 2), heldout_windows=2,
        calibration_sequences=2, calibration_window=32, statistics=("X_l2", "G_l2"), sparsity=0.5,
    )  # fmt: skip
    with node("driver"):
        places = pack_inputs(asked)
        assert set(places) == {str(model), str(text)}
        context = EvaluationContext.from_json({**asked.to_json(), "places": places})
    answers = []
    for name in ("a", "b"):
        with node(name):
            worker = MetricWorker(context)
            if name == "a":
                prepared = worker.handle("prepare", {})["name"]
                shutil.rmtree(tmp_path / "a" / "statistics")  # the parcel needs nothing but itself
            elif name == "b":
                again = worker.handle("prepare", {})
                assert again["name"] == prepared
                assert not (tmp_path / "b" / "statistics").exists()
            criterion = {"expression": ["mul", ["abs", "W"], "G_l2"]}
            payload = {"prepared": prepared, "criterion": criterion, "thresholds": [], "max_tied": None}
            answers.append(worker.handle("evaluate", payload))
            assert worker.numerics()["class"]["threads"] == 1
    assert answers[0] == answers[1]
    received = tmp_path / "b" / "parcels" / places[str(model)] / "model.safetensors"
    assert not received.is_symlink()
    assert not received.samefile(model / "model.safetensors")
    assert os.fspath(tmp_path) not in str({key: value for key, value in again.items() if key != "probe"})


def test_blocks_of_a_structure_database_are_built_on_several_nodes(node: Node, road: Road) -> None:
    language_model, windows = tiny_language_model(), random_windows()
    units = find_units(language_model)
    for block, name in enumerate(("a", "b")):
        with node(name):
            build_structure_block(language_model, units, windows, block)
    with node("driver"):
        for folder in parcels.parcel_folder("").iterdir():
            assert folder.name.startswith("structure-block-")
    # Who puts it together computes nothing, and has of the blocks what it reads.
    with node("c"):
        database = build_structure_database(language_model, units, windows, mode="dense")
        parts = database.kept_neurons(1, 20), database.kept_heads(1, 1, 2)
        assert not parcels.holds(database.manifest["blocks"][0])
    with node("b"):
        found = StructureDatabase.open(database.name, language_model, units)
        assert (found.kept_neurons(1, 20), found.kept_heads(1, 1, 2)) == parts
    with node("alone"):
        parcels.set_courier(None)
        assert build_structure_database(language_model, units, windows, mode="dense").name == database.name


def test_images_travel_with_the_file_that_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVOPRUNE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "cat.png").write_bytes(b"cat")
    (folder / "unnamed.png").write_bytes(b"dog")
    file = folder / "images.jsonl"
    file.write_text('{"image": "images/cat.png", "text": "A cat."}\n{"image": null, "text": "None."}\n')
    places = pack_inputs(EvaluationContext(data=str(file), calibration=str(file)))
    parcel, _, inside = places[str(file)].partition("/")
    packed = parcels.require(parcel)
    assert (packed / inside).read_text() == file.read_text()
    assert (packed / "images" / "cat.png").read_bytes() == b"cat"
    assert not (packed / "unnamed.png").exists()
    (tmp_path / "outside.png").write_bytes(b"bird")
    file.write_text('{"image": "../outside.png", "text": "A bird."}\n')
    with pytest.raises(InvalidInput, match=r"outside\.png lies outside .*: put it inside"):
        pack_inputs(EvaluationContext(data=str(file), calibration=str(file)))
