"""Heads that give nothing, found from a flat start: the set-up of mask policies, section 9, item 7 of section 15."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from evoprune.fitness.models import load_model
from evoprune.fitness.policy_file import read_policy
from evoprune.search.config import resolve_as
from evoprune.search.config_policy import PolicySearchConfig
from evoprune.search.session import start_search
from evoprune.search.worker_session import Resources
from tests.models import save_tiny, tiny_tokenizer
from tests.search.whole_runs import result_of, tiny_options

LAYERS, HEADS, DEAD = 4, 8, 12
SHAPE = {
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "hidden_size": 64,
    "intermediate_size": 128,
    "initializer_range": 0.2,
}


def planted(world: Path, seed: int) -> np.ndarray:
    """Write the model to a folder; which heads are dead, [32] bool."""
    save_tiny(world / "plain", seed=seed, **SHAPE)
    model = load_model(str(world / "plain")).model
    dead = np.zeros(LAYERS * HEADS, dtype=bool)
    dead[np.random.default_rng(seed).permutation(LAYERS * HEADS)[:DEAD]] = True
    with torch.no_grad():
        for layer, here in zip(model.model.layers, dead.reshape(LAYERS, HEADS), strict=True):
            layer.self_attn.o_proj.weight[:, torch.from_numpy(np.repeat(here, 64 // HEADS))] = 0
    model.save_pretrained(world / "model")
    tiny_tokenizer().save_pretrained(world / "model")
    (world / "text.txt").write_text("\n".join(f"{index}: {index * index % 97} apples." for index in range(2000)))
    return dead


def found(world: Path, seed: int, searcher: dict[str, object]) -> tuple[np.ndarray, np.ndarray]:
    """(what the winner removes, what is dead), [32] bool each, after 1,200 evaluations or little more."""
    dead = planted(world, seed)
    config = resolve_as(
        PolicySearchConfig,
        overrides={
            **tiny_options(world),
            "data.window": 16,
            "target.units": ["query-head"],
            "target.budget": "kind",
            "target.sparsity": DEAD / len(dead),
            "searcher.mapping": "flat",
            "searcher.baselines": [],
            "searcher.windows": 64,
            "searcher.batch": 4,
            "searcher.validation": 16,
            "searcher.validate_every": 60,
            "evaluations": 1220,
            "seed": seed,
            **searcher,
        },
    )
    run = start_search(config, Resources(executor="inline"), run_dir=world / "run")
    mask = read_policy(run.path / "export" / "policy.json").mask
    assert result_of(run)["evaluations"] <= 1220 and int(mask.sum()) == len(dead) - DEAD
    return ~mask, dead


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVOPRUNE_CACHE", str(tmp_path / "cache"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("policy", ["cp", "pl"])
def test_dead_heads_are_found(tmp_path: Path, seed: int, policy: str) -> None:
    removed, dead = found(tmp_path, seed, {"searcher.options": {"policy": policy}})
    assert removed.tolist() == dead.tolist()


@pytest.mark.slow
def test_the_released_update_finds_more_than_half_of_them(tmp_path: Path) -> None:
    """On average; of twelve that are guessed 4.5 are dead."""
    released = {"searcher.name": "released", "searcher.samples": 2}
    counts = []
    for seed in range(3):
        world = tmp_path / str(seed)
        world.mkdir()
        options = {"searcher.options": {"rate": 0.2, "start": "problem"}}
        removed, dead = found(world, seed, released | options)
        counts.append(int((removed & dead).sum()))
    assert sum(counts) / 3 >= 7
