"""Searches where blocks only go as a whole, on a model whose blocks matter more the deeper they are."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from evoprune.fitness.allocating import allocate_model, ask_allocator
from evoprune.fitness.allocators import ALLOCATORS, configured
from evoprune.fitness.models import load_model
from evoprune.fitness.statistics import collect_statistics
from evoprune.metrics.criterion import CRITERIA
from evoprune.metrics.errors import InvalidInput
from evoprune.search.config import resolve_as
from evoprune.search.config_allocation import AllocationSearchConfig
from evoprune.search.session import start_search
from evoprune.search.spaces.levels import LevelSpace
from evoprune.search.worker_session import Resources
from tests.models import random_windows, tiny_model, tiny_tokenizer
from tests.search.whole_runs import installed_breeders, lines_of, result_of, tiny_options

BLOCKS, GOING = 16, 4
INLINE = Resources(executor="inline")
# Blocks have one shape, so these ask the same of all of them.
SILENT = {"uniform", "uniform+", "er", "erk"}


@pytest.fixture(scope="module")
def planted(world: Path) -> Path:
    """What a block adds to the hidden states grows with its depth."""
    folder = world / "planted"
    model = tiny_model(num_hidden_layers=BLOCKS)
    for depth, block in enumerate(model.model.layers):
        for matrix in (block.self_attn.o_proj, block.mlp.down_proj):
            matrix.weight.mul_(0.001 * 1.4**depth)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def config(planted: Path, **changes: Any) -> AllocationSearchConfig:
    options = {
        **tiny_options(planted.parent),
        "model.name": str(planted),
        "target.drop": "blocks",
        "target.drop_only": True,
        "target.sparsity": GOING / BLOCKS,
        "searcher.seeds": ["block-influence", "uniform+"],
        "searcher.windows": 4,
        "searcher.offspring": 4,
        "searcher.stages": [{"windows": 1, "survivors": 2}, {"windows": 2, "survivors": 1}],
        "evaluations": 6,
        **changes,
    }
    return resolve_as(AllocationSearchConfig, overrides=options)


def dropped(allocation: Mapping[str, float]) -> set[int]:
    """Blocks that are gone; every other one is whole."""
    by_block: dict[int, set[float]] = {}
    for name, sparsity in allocation.items():
        by_block.setdefault(int(name.split(".")[2]), set()).add(sparsity)
    assert all(found in ({0.0}, {1.0}) for found in by_block.values())
    return {block for block, found in by_block.items() if found == {1.0}}


def test_every_allocator_drops_what_it_ranks_first(planted: Path, tmp_path: Path) -> None:
    model, sparsity = load_model(str(planted)), GOING / BLOCKS
    sites = [bound.site for bound in model.sites]
    space = LevelSpace(sites, sparsity, drop="blocks", only=True)
    text_a, text_b = random_windows(4, seed=1), random_windows(4, seed=2)
    needs = {"X_l2"}.union(*(ALLOCATORS[name].needs for name in ALLOCATORS))
    evidence: dict[str, Any] = {
        "criterion": CRITERIA["wanda"],
        "statistics": collect_statistics(model, text_a, sorted(needs), folder=tmp_path / "statistics"),
        "calibration": text_a,
        "search": text_b,
    }
    silent = set()
    for name in ALLOCATORS:
        allocator = configured(name, {"points": 1} if name == "pmpq" else {})
        asked = ask_allocator(model, allocator, sparsity, **evidence)
        of_block = [0.0] * BLOCKS
        for site, share in zip(sites, asked, strict=True):
            of_block[site.block] += share * site.weights
        try:
            levels = space.levels(space.near(asked, random.Random(0)))
        except InvalidInput:
            silent.add(name)
            continue
        gone = dropped({site.name: level / 256 for site, level in zip(sites, levels, strict=True)})
        assert gone == set(sorted(range(BLOCKS), key=lambda block: -round(of_block[block], 4))[:GOING]), name
        if name in ("block-influence", "shortened-llama"):
            emptying = configured(name, {"drop": True})
            published = allocate_model(model, name, emptying, sparsity, **evidence)
            assert gone == {int(site.name.split(".")[2]) for site in published.sites if site.sparsity > 0.9}
        if name == "block-influence":
            assert gone == {0, 1, 2, 3}
    assert silent == SILENT


def test_the_seed_of_the_run_decides_nothing_but_what_chance_drops(
    planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [start_search(config(planted, seed=seed), INLINE, run_dir=tmp_path / str(seed)) for seed in (0, 1)]
    assert "no seed by uniform+: the same is asked of all 16 parts" in capsys.readouterr().err
    rows = [{row["name"]: dropped(row["allocation"]) for row in result_of(run)["baselines"]} for run in runs]
    assert [list(found) for found in rows] == [["random", "block-influence"]] * 2
    assert rows[0]["block-influence"] == rows[1]["block-influence"] == {0, 1, 2, 3}
    assert len(rows[0]["random"]) == len(rows[1]["random"]) == GOING
    assert rows[0]["random"] != rows[1]["random"]
    assert [line["origin"] for line in lines_of(runs[0])[:2]] == ["seed:random", "seed:block-influence"]


def test_a_front_starts_from_the_same_and_is_compared_with_chance(planted: Path, tmp_path: Path) -> None:
    options = {"target.pareto": "parameters", "target.sparsity_range": (0.125, 0.5), "front.windows": 2, "seed": 3}
    options |= {"evaluations": 16, "target.sparsity": 0.25, "searcher.windows": 2}
    result = result_of(start_search(config(planted, **options), INLINE, run_dir=tmp_path / "run"))
    rows = [(row["name"], dropped(row["allocation"])) for row in result["baselines"]]
    # 0.3125 of 16 blocks is 5.
    assert [found for name, found in rows if name == "block-influence"] == [set(range(n)) for n in (2, 5, 8)]
    assert [name for name, _ in rows] == ["random"] * 3 + ["block-influence"] * 3
    compared = [row for row in result["front"] if row["random"] is not None]
    assert compared and not any("uniform" in row for row in result["front"])
    for row in compared:
        assert row["random"]["sparsity"] == row["sparsity"]


@pytest.mark.parametrize("name", sorted({"random", "tpe"} & set(installed_breeders())))
def test_other_searchers_rank_blocks_too(name: str, planted: Path, tmp_path: Path) -> None:
    run = start_search(config(planted, **{"searcher.name": name}), INLINE, run_dir=tmp_path / "run")
    made = {tuple(line["genome"]) for line in lines_of(run) if line["stage"] == 0}
    assert len(made) >= 3 and {sum(levels) for levels in made} == {256 * GOING}
