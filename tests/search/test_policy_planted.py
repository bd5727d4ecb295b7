"""Heads that give nothing, found from a flat start: the set-up of mask policies, section 9, item 7 of section 15."""

from __future__ import annotations

import os
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


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("policy", ["cp", "pl"])
def test_dead_heads_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, policy: str) -> None:
    monkeypatch.setitem(os.environ, "EVOPRUNE_CACHE", str(tmp_path / "cache"))
    dead = planted(tmp_path, seed)
    config = resolve_as(
        PolicySearchConfig,
        overrides={
            **tiny_options(tmp_path),
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
            "searcher.options": {"policy": policy},
        },
    )
    run = start_search(config, Resources(executor="inline"), run_dir=tmp_path / "run")
    found = read_policy(run.path / "export" / "policy.json")
    assert (~found.mask).tolist() == dead.tolist()
    assert result_of(run)["evaluations"] <= 1220
