"""What tests of whole structure searches share: one on a tiny Llama, and counts of it by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import evoprune
from evoprune.metrics.shape_file import read_shape
from evoprune.search.config import resolve_as
from evoprune.search.config_structure import StructureSearchConfig
from evoprune.search.rundir import RunDirectory
from evoprune.search.worker_session import Resources
from tests.search.whole_runs import result_of, tiny_options

EVALUATIONS = 40
WINDOWS = 13
STAGES = [{"windows": 2, "survivors": 3}, {"windows": 4, "survivors": 2}, {"windows": 8, "survivors": 1}]
INLINE = Resources(executor="inline")
# Asking one criterion is enough where what they keep is not the point.
FEW = {"searcher.seeds": ["flap"]}
# Of the tiny Llama, by hand: a query head has 8 rows and 8 columns of 32, a KV head 8 rows twice, a neuron three
# vectors of 32, and a norm of 32 goes with a part.
HEAD, GROUP, NEURON, NORM = 2 * 8 * 32, 2 * 8 * 32, 3 * 32, 32
DENSE = 2 * (4 * HEAD + 2 * GROUP + 48 * NEURON + 2 * NORM)


def config(world: Path, **changes: Any) -> StructureSearchConfig:
    options = {
        **tiny_options(world),
        "searcher.windows": WINDOWS,
        "searcher.offspring": 8,
        "searcher.stages": STAGES,
        "evaluations": EVALUATIONS,
        **changes,
    }
    return resolve_as(StructureSearchConfig, overrides=options)


def parameters(shape: Sequence[Sequence[int]]) -> int:
    return sum(
        (groups * (GROUP + each * HEAD) + NORM if groups else 0) + (neurons * NEURON + NORM if neurons else 0)
        for groups, each, neurons in shape
    )


def check_export(run: RunDirectory, world: Path, form: str) -> None:
    """Its shape, cut in this form, loses on held-out text what the search measured."""
    best = result_of(run)["best"]
    dense = evoprune.load_model(str(world / "model"))
    shape = read_shape(run.path / "export" / "shape.json")
    kept = [[len(block.groups), block.heads_per_group, len(block.neurons)] for block in shape.blocks]
    assert kept == best["shape"] != [[2, 2, 48]] * 2
    small = evoprune.prune_shape(dense, shape, form=form)
    if form == "compact":
        assert small.parameters == dense_parameters(dense) - DENSE + parameters(best["shape"])
    found = evoprune.evaluate(small.language_model, dense=dense, data=str(world / "text.txt"), window=32, tokens=8 * 32)
    assert found.loss == pytest.approx(best["heldout"]["loss"], rel=1e-5)
    assert found.kl == pytest.approx(best["heldout"]["kl"], rel=1e-4)
    assert found.held_out.tokens == best["heldout"]["tokens"]


def dense_parameters(language_model: Any) -> int:
    return sum(parameter.numel() for parameter in language_model.model.parameters())
