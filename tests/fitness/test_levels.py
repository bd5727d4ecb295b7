"""The level database against masks made by the mask rule, and what it refuses."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from evoprune.fitness.context import EvaluationContext
from evoprune.fitness.levels import LevelDatabase, build_levels
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.parcels import parcel_folder
from evoprune.fitness.prepare import Prepared, prepare
from evoprune.fitness.resident import ResidentWeights
from evoprune.fitness.resident_levels import ResidentLevels
from evoprune.metrics.criterion import CRITERIA, Metric
from evoprune.metrics.errors import AuditFailed, InvalidCandidate, InvalidInput
from evoprune.metrics.mask import mask
from evoprune.metrics.records import MaskRule, Site
from tests.models import tiny_language_model
from tests.prepared import tiny_prepared

WANDA = CRITERIA["wanda"]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("EVOPRUNE_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def parts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[LanguageModel, Prepared]:
    language_model = tiny_language_model(request.param)
    return language_model, tiny_prepared(tmp_path_factory.mktemp("levels") / "set", language_model)


@pytest.fixture(scope="module")
def database(parts: tuple[LanguageModel, Prepared]) -> LevelDatabase:
    return build_levels(parts[1], WANDA, "wanda")


@pytest.fixture
def resident(parts: tuple[LanguageModel, Prepared], database: LevelDatabase) -> Iterator[ResidentLevels]:
    levels = ResidentLevels(parts[0], parts[1].dense, database)
    yield levels
    levels.restore()


def masked(prepared: Prepared, levels: Mapping[str, int]) -> dict[str, Tensor]:
    """The weight of every site, masked by Wanda's scores at its level by the mask rule."""
    dense, found = load_file(prepared.dense), {}
    for name, weight in dense.items():
        scores = weight.abs() * prepared.statistics().tensor(name, "X_l2")
        keep = mask(scores, MaskRule(levels.get(name, 0) / 256))
        found[name] = weight.masked_fill(~keep, 0)
    return found


def stands_at(language_model: LanguageModel, prepared: Prepared, levels: Mapping[str, int]) -> bool:
    expected = masked(prepared, levels)
    return all(torch.equal(bound.weight(), expected[bound.site.name]) for bound in language_model.sites)


def test_random_levels_are_masks_and_only_changes_are_written(
    parts: tuple[LanguageModel, Prepared], resident: ResidentLevels
) -> None:
    language_model, prepared = parts
    names = [bound.site.name for bound in language_model.sites]
    draw = random.Random(0)
    before = dict.fromkeys(names, 0)
    for _ in range(8):
        # Some sites stay, some are left out, which makes them dense.
        levels = {name: before[name] if draw.random() < 0.4 else draw.randrange(256) for name in names}
        for name in draw.sample(names, 2):
            del levels[name]
        after = {name: levels.get(name, 0) for name in names}
        assert resident.apply(levels) == sum(before[name] != after[name] for name in names)
        assert stands_at(language_model, prepared, levels)
        assert resident.apply(levels) == 0
        before = after
    resident.restore()
    assert stands_at(language_model, prepared, {})


def test_it_is_built_once_and_is_a_byte_a_weight(
    parts: tuple[LanguageModel, Prepared], database: LevelDatabase
) -> None:
    class Never(Metric):
        def score(self, site: Site, inputs: Mapping[str, Tensor]) -> Tensor:
            raise AssertionError("scored again")

    told: list[tuple[int, int]] = []
    again = build_levels(parts[1], Never.from_text("W"), "wanda", progress=lambda *at: told.append(at))
    assert again == database == LevelDatabase.open(database.name, parts[1], "wanda")
    assert not told
    sites = parts[1].sites
    size = sum(file.stat().st_size for file in database.folder.iterdir())
    assert size < sum(site.weights for site in sites) + 150 * len(sites) + 1000
    assert all(ranks.dtype == torch.uint8 for ranks in load_file(database.ranks).values())


def test_a_set_as_a_search_prepares_it() -> None:
    language_model = tiny_language_model(seed=3)
    context = EvaluationContext(
        window=16,
        rungs=(1, 2),
        heldout_windows=1,
        calibration_sequences=2,
        calibration_window=16,
        statistics=("X_l2",),
    )
    prepared = prepare(language_model, context)
    told: list[tuple[int, int]] = []
    database = build_levels(prepared, WANDA, "wanda", progress=lambda *at: told.append(at))
    assert told == [(done, len(prepared.sites)) for done in range(len(prepared.sites) + 1)]
    resident = ResidentLevels(language_model, prepared.dense, database)
    levels = {site.name: 100 + place for place, site in enumerate(prepared.sites)}
    resident.apply(levels)
    assert stands_at(language_model, prepared, levels)


@pytest.mark.parametrize("level", [-1, 257, 0.5, True, "3", None])
def test_a_level_outside_its_range_is_refused(
    parts: tuple[LanguageModel, Prepared], resident: ResidentLevels, level: object
) -> None:
    first, second = parts[1].sites[:2]
    with pytest.raises(InvalidInput, match=r"is no whole number from 0 to 256") as refusal:
        resident.apply({first.name: 7, second.name: level})  # type: ignore[dict-item]
    assert "\n" not in str(refusal.value)
    assert stands_at(parts[0], parts[1], {})


def test_an_unknown_site_is_refused(resident: ResidentLevels) -> None:
    with pytest.raises(InvalidInput, match="no site 'lm_head'"):
        resident.apply({"lm_head": 1})


def test_a_removed_weight_is_zero_whatever_it_was(parts: tuple[LanguageModel, Prepared], tmp_path: Path) -> None:
    language_model, prepared = parts
    dense = load_file(prepared.dense)
    name = prepared.sites[0].name
    at = load_file(build_levels(prepared, WANDA, "wanda").ranks)[name] < 9
    spoilt = {**dense, name: dense[name].masked_fill(at, float("nan"))}
    save_file(spoilt, tmp_path / "dense.safetensors")
    resident = ResidentLevels(language_model, tmp_path / "dense.safetensors", build_levels(prepared, WANDA, "wanda"))
    resident.apply({name: 9})
    weight = next(bound.weight() for bound in language_model.sites if bound.site.name == name)
    assert (weight[at] == 0).all()
    assert not weight[at].signbit().any()
    with pytest.raises(AuditFailed):
        resident.restore()
    ResidentWeights(language_model, prepared.dense).write_dense(language_model.sites[0])


def test_an_interrupted_change_is_made_good(
    parts: tuple[LanguageModel, Prepared], resident: ResidentLevels, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = {site.name: 90 for site in parts[1].sites}
    write, calls = ResidentWeights.write, iter(range(100))

    def interrupted(*arguments: object) -> None:
        if next(calls) == 3:
            raise KeyboardInterrupt
        write(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ResidentWeights, "write", interrupted)
        resident.apply(levels)
    assert resident.apply({}) == 4  # the three that were written, and the one of which nothing is known
    assert stands_at(parts[0], parts[1], {})


def test_another_database_is_refused(
    parts: tuple[LanguageModel, Prepared], database: LevelDatabase, tmp_path: Path
) -> None:
    language_model, prepared = parts
    other = tiny_language_model("llama", seed=1)
    of_other = tiny_prepared(tmp_path / "other", other)
    of_other_text = tiny_prepared(tmp_path / "text", language_model, seed=10)
    for match, arguments in {
        "criterion 'wanda', not 'magnitude'": (database.name, prepared, "magnitude"),
        "fingerprint 'tiny": (database.name, of_other, "wanda"),
        "statistics '": (database.name, of_other_text, "wanda"),
        "missing": ("levels-of-nobody", prepared, "wanda"),
    }.items():
        with pytest.raises(InvalidInput, match=match) as refusal:
            LevelDatabase.open(*arguments)
        assert "\n" not in str(refusal.value)
    with pytest.raises(InvalidInput, match="of the model with fingerprint"):
        ResidentLevels(other, of_other.dense, database)
    smaller = replace(prepared, facts={**prepared.facts, "sites": prepared.facts["sites"][1:]})
    with pytest.raises(InvalidInput, match="other matrices"):
        LevelDatabase.open(database.name, smaller, "wanda")


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_damaged_manifest_is_refused(parts: tuple[LanguageModel, Prepared], text: str) -> None:
    built = build_levels(parts[1], CRITERIA["magnitude"], f"magnitude before {text}")
    manifest = built.folder / "manifest.json"
    manifest.write_text(text.ljust(manifest.stat().st_size))
    with pytest.raises(InvalidInput, match=r"no readable level database|of format"):
        LevelDatabase.open(built.name, parts[1], f"magnitude before {text}")


def test_scores_that_cannot_be_ranked_leave_nothing_behind(parts: tuple[LanguageModel, Prepared]) -> None:
    class Nan(Metric):
        def score(self, site: Site, inputs: Mapping[str, Tensor]) -> Tensor:
            return inputs["W"] / 0

    class Narrow(Metric):
        def score(self, site: Site, inputs: Mapping[str, Tensor]) -> Tensor:
            return inputs["W"][:, :1]

    before = set(parcel_folder("").iterdir())
    for broken, reason in ((Nan, "NONFINITE"), (Narrow, "TYPE")):
        with pytest.raises(InvalidCandidate, match=reason):
            build_levels(parts[1], broken.from_text("W"), reason)
    with pytest.raises(InvalidInput, match="X_max"):
        build_levels(parts[1], Metric.from_text("mul(abs(W),X_max)"), "max")
    assert set(parcel_folder("").iterdir()) == before


def test_the_manifest_says_what_it_is(parts: tuple[LanguageModel, Prepared], database: LevelDatabase) -> None:
    manifest = json.loads((database.folder / "manifest.json").read_text())
    assert manifest["criterion"] == "wanda"
    assert manifest["fingerprint"] == parts[0].fingerprint
