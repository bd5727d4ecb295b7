"""The best child is the next parent, and the parent competes on equal terms: parents get no worse, on any text."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from evoprune.fitness.adapters import list_sites
from evoprune.search.config import resolve_as
from evoprune.search.config_allocation import AllocationSearchConfig
from evoprune.search.session import start_search
from evoprune.search.worker_session import Resources
from tests.models import tiny_model
from tests.search.whole_runs import lines_of, tiny_options


@torch.no_grad()
def window_kl(levels: list[int], windows: Tensor) -> Tensor:
    """[n] KL from the dense to the pruned model in nats per token, by magnitude, one row at a time."""
    dense, pruned = tiny_model(), tiny_model()
    for bound, level in zip(list_sites(pruned), levels, strict=True):
        weight = bound.weight()
        order = weight.abs().argsort(dim=1, stable=True)
        weight.scatter_(1, order[:, : level * weight.shape[1] // 256], 0.0)
    ours, theirs = (model(windows).logits[:, :-1].double().log_softmax(-1) for model in (pruned, dense))
    return (theirs.exp() * (theirs - ours)).sum(-1).mean(1)


def test_parents_get_no_worse_on_fixed_held_out_text(world: Path, tmp_path: Path) -> None:
    """Allocation chapter, list 10: text that chose nobody, two paired standard errors from parent to parent."""
    options = {
        **tiny_options(world),
        "target.metric": "magnitude",
        "data.heldout_windows": 32,
        "searcher.seeds": [],
        "searcher.windows": 24,
        "searcher.offspring": 6,
        "searcher.stages": [{"windows": 4, "survivors": 2}, {"windows": 12, "survivors": 1}],
        "evaluations": 61,
    }
    run = start_search(
        resolve_as(AllocationSearchConfig, overrides=options), Resources(executor="inline"), run_dir=tmp_path / "run"
    )
    lines = lines_of(run)
    parents = [lines[0]["genome"]]
    for generation in range(1, 11):
        finalists = [line for line in lines if (line["generation"], line["stage"]) == (generation, 1)]
        (parent,) = [line for line in finalists if line["origin"] == "parent"]
        assert parent["genome"] == parents[-1]
        winner = min(finalists, key=lambda line: line["kl"])
        assert winner["kl"] <= parent["kl"]
        parents.append(winner["genome"])
    assert len({tuple(genome) for genome in parents}) > 4
    folder = Path(os.environ["EVOPRUNE_CACHE"]) / "parcels" / run.identity["files"]
    windows = load_file(folder / "heldout.safetensors")["windows"].long()
    assert len(windows) == 32
    losses = [window_kl(genome, windows) for genome in parents]
    for before, after in pairwise(losses):
        rise = after - before
        assert rise.mean() <= 2 * rise.std() / len(windows) ** 0.5
    assert losses[-1].mean() < losses[0].mean()
    best = (run.result or {})["best"]
    levels = [int(256 * best["allocation"][name]) for name in run.identity["matrices"]]
    assert best["heldout"]["kl"] == pytest.approx(window_kl(levels, windows).mean().item(), rel=1e-4)
