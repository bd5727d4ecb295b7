"""Stored levels against compressing each matrix for itself, and builds that stop, find no room, or are of another."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from evoprune.fitness import stored_levels
from evoprune.fitness.compressors import COMPRESSORS, AtRunTime, Goal, compress, compressor_of
from evoprune.fitness.levels import build_levels, site_ranks
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.parcels import parcel_folder
from evoprune.fitness.prepare import Prepared
from evoprune.fitness.resident_levels import ResidentLevels
from evoprune.fitness.stored_levels import StoredLevels, build_stored_levels, stored_bytes
from evoprune.metrics.criterion import CRITERIA
from evoprune.metrics.errors import InvalidInput
from tests.models import tiny_language_model
from tests.prepared import tiny_prepared

GRID = (9, 128, 154, 255)
WANDA = CRITERIA["wanda"]
AT_RUN_TIME = [name for name in COMPRESSORS if isinstance(COMPRESSORS[name], AtRunTime)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("EVOPRUNE_CACHE", str(folder))
    yield folder


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def parts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[LanguageModel, Prepared]:
    language_model = tiny_language_model(request.param)
    return language_model, tiny_prepared(tmp_path_factory.mktemp("stored") / "set", language_model)


def build(prepared: Prepared, compressor: str = "sparsegpt", grid: tuple[int, ...] = GRID, **more: Any) -> StoredLevels:
    return build_stored_levels(prepared, compressor, grid, WANDA, "wanda", **more)


def weights(language_model: LanguageModel) -> list[torch.Tensor]:
    return [bound.weight().clone() for bound in language_model.sites]


def test_every_level_is_what_the_compressor_makes_of_the_dense_matrix(parts: tuple[LanguageModel, Prepared]) -> None:
    language_model, prepared = parts
    database, statistics = build(prepared), prepared.statistics()
    dense = weights(language_model)
    resident = ResidentLevels(language_model, prepared.dense, database)
    for level in GRID:
        resident.apply({site.name: level for site in prepared.sites})
        for bound, before in zip(language_model.sites, dense, strict=True):
            site = bound.site
            removed = site.out_features * (level * site.in_features // 256)
            given = statistics.site_statistics(site.name, ["H"])
            expected = compress("sparsegpt", before, Goal(removed), given).weight
            assert torch.equal(bound.weight(), expected)
            assert int((bound.weight() == 0).sum()) == removed
    # A change of one matrix writes that one, 0 is dense, and 256 is nothing.
    levels = {site.name: 154 for site in prepared.sites}
    resident.apply(levels)
    assert resident.apply({**levels, prepared.sites[3].name: 128}) == 1
    assert resident.apply({**levels, prepared.sites[3].name: 256}) == 1
    assert not language_model.sites[3].weight().any()
    resident.restore()
    assert all(torch.equal(*pair) for pair in zip(weights(language_model), dense, strict=True))


@pytest.mark.parametrize(
    "compressor", ["armor:rounds=2" if name == "armor" else name for name in COMPRESSORS if name not in AT_RUN_TIME]
)
def test_levels_of_every_compressor(parts: tuple[LanguageModel, Prepared], compressor: str) -> None:
    language_model, prepared = parts
    database, plugin, statistics = (
        build(prepared, compressor, (64, 154)),
        compressor_of(compressor),
        prepared.statistics(),
    )
    for bound in (language_model.sites[0], language_model.sites[-1]):
        site, dense = bound.site, bound.weight()
        ranks = site_ranks(WANDA, site, dense, statistics, prepared.facts["identity"]["sparsity"])
        given = statistics.site_statistics(site.name, plugin.needs)
        for level in (64, 154):
            goal = Goal.of_mask(ranks >= level)
            assert goal.removed == site.out_features * (level * site.in_features // 256)
            made = compress(compressor, dense, goal if plugin.reads_criterion else Goal(goal.removed), given)
            assert torch.equal(database.weight(site.name, level), made.weight)


def test_of_the_mask_alone_they_are_what_ranks_give(parts: tuple[LanguageModel, Prepared]) -> None:
    language_model, prepared = parts
    found = []
    for database in (build(prepared, "mask"), build_levels(prepared, WANDA, "wanda")):
        resident = ResidentLevels(language_model, prepared.dense, database)
        resident.apply({site.name: GRID[at % len(GRID)] for at, site in enumerate(prepared.sites)})
        found.append(weights(language_model))
        resident.restore()
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_a_build_that_was_stopped_goes_on(
    parts: tuple[LanguageModel, Prepared], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = parts[1]
    calls: list[str] = []
    compressed = stored_levels._compressed

    def counted(*arguments: Any) -> Any:
        calls.append(arguments[4].name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return compressed(*arguments)

    monkeypatch.setattr(stored_levels, "_compressed", counted)
    with pytest.raises(KeyboardInterrupt):
        build(prepared)
    begun = sorted((cache / "levels").rglob("*.safetensors"))
    assert len(begun) == 3
    begun[1].write_bytes(begun[1].read_bytes()[:100])  # as a crash of the machine may leave it
    told: list[tuple[int, int]] = []
    database = build(prepared, progress=lambda *at: told.append(at))
    names = [site.name for site in prepared.sites]
    assert calls == [*names[:4], names[1], *names[3:]]
    assert told[-1] == (len(names), len(names))
    assert not list((cache / "levels").iterdir())
    assert build(prepared) == database == StoredLevels.open(database.name, prepared, "sparsegpt", GRID, "wanda")
    assert len(calls) == len(names) + 2
    # It does not depend on a criterion that is not read, nor on where it was built.
    monkeypatch.setattr(stored_levels, "_compressed", compressed)
    assert build_stored_levels(prepared, "sparsegpt", GRID, CRITERIA["magnitude"], "magnitude") == database
    monkeypatch.setenv("EVOPRUNE_CACHE", str(cache / "elsewhere"))
    assert build(prepared).name == database.name


def test_another_database_is_refused(parts: tuple[LanguageModel, Prepared], tmp_path: Path) -> None:
    prepared = parts[1]
    database = build(prepared)
    of_other = tiny_prepared(tmp_path / "other", tiny_language_model("llama", seed=5))
    for match, arguments in {
        "compressor 'sparsegpt', not 'mask'": (prepared, "mask", GRID),
        r"levels '\[9, 128, 154, 255\]', not '\[9, 128\]'": (prepared, "sparsegpt", GRID[:2]),
        "fingerprint 'tiny": (of_other, "sparsegpt", GRID),
    }.items():
        with pytest.raises(InvalidInput, match=match) as refusal:
            StoredLevels.open(database.name, *arguments, "wanda")
        assert "\n" not in str(refusal.value)
    with pytest.raises(InvalidInput, match="missing"):
        StoredLevels.open("levels-of-nobody", prepared, "sparsegpt", GRID, "wanda")


@pytest.mark.parametrize("level", [7, -1, 257, True, 9.0, "9"])
def test_a_level_that_is_not_stored_is_refused(parts: tuple[LanguageModel, Prepared], level: Any) -> None:
    language_model, prepared = parts
    resident = ResidentLevels(language_model, prepared.dense, build(prepared))
    with pytest.raises(InvalidInput, match="is not stored; 0, 9, 128, 154, 255 and 256 are"):
        resident.apply({prepared.sites[0].name: level})


def test_what_the_disk_has_no_room_for_is_refused(
    parts: tuple[LanguageModel, Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = parts[1]
    size = stored_bytes(prepared.sites, "torch.float32", GRID)
    assert size == 4 * len(GRID) * sum(site.weights for site in prepared.sites)
    assert stored_bytes(prepared.sites, "torch.bfloat16", GRID) == size // 2
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(size))
    with pytest.raises(InvalidInput, match=r"4 levels of all matrices take .* GiB free: store fewer") as refusal:
        build(prepared)
    assert "\n" not in str(refusal.value)
    assert not list(parcel_folder("").glob("*"))


def test_statistics_that_are_missing_are_named(
    parts: tuple[LanguageModel, Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(COMPRESSORS["sparsegpt"]), "needs", frozenset({"Hchol2"}))
    with pytest.raises(InvalidInput, match="hold no 'Hchol2'; they hold H, "):
        build(parts[1])


def test_half_precision_stays_what_it_is(tmp_path: Path) -> None:
    language_model = tiny_language_model("llama")
    language_model.model.to(torch.bfloat16)
    prepared = tiny_prepared(tmp_path / "set", language_model)
    prepared.facts["identity"]["dtype"] = "torch.bfloat16"
    database = build(prepared)
    found = database.weight(prepared.sites[0].name, 128)
    assert found.dtype == torch.bfloat16
    files = sum(file.stat().st_size for file in database.files.values())
    assert (
        stored_bytes(prepared.sites, "torch.bfloat16", GRID)
        < files
        < 1.5 * stored_bytes(prepared.sites, "torch.bfloat16", GRID)
    )
