"""A compressor that is kept alive between masks makes of each what a fresh one makes of it."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from evoprune.fitness.compressing import Compressing, MatrixCompressor, kept_bytes
from evoprune.fitness.compressors import COMPRESSORS, AtRunTime, Goal, compress
from evoprune.metrics.errors import InvalidCandidate, InvalidInput
from evoprune.metrics.mask import mask
from evoprune.metrics.records import MaskRule, Site
from tests.layers import synthetic_layer

OUT, IN = 8, 32
SITE = Site("layers.0.proj", "proj", block=0, n_blocks=1, out_features=OUT, in_features=IN)
# Those that a metric search has, and two that choose by themselves, one of which wants to see all goals first.
SPELLED = [
    *(name for name in COMPRESSORS if COMPRESSORS[name].reads_criterion),
    "refit:steps=3",
    "awp:bits=4,steps=20,rounded_steps=5",
    "sparsegpt",
    "obs",
]


@pytest.fixture(scope="module")
def layer() -> tuple[Tensor, dict[str, Tensor]]:
    weight, gram = synthetic_layer(1.0, out=OUT, width=IN, tokens=200, dead=(3,))
    return weight, {"H": gram}


def goals(spelled: str, weight: Tensor) -> list[Goal]:
    """Masks at several sparsities and at a pattern, one of all weights and one of none."""
    reads = COMPRESSORS[spelled.partition(":")[0]].reads_criterion
    scores = [weight.abs(), -weight.abs(), weight]
    made = [
        *(Goal.of_mask(mask(scores[at], MaskRule(sparsity))) for at, sparsity in enumerate((0.5, 0.75, 0.25))),
        Goal.of_mask(mask(scores[0], MaskRule(None, (2, 4))), (2, 4)),
        Goal.of_mask(torch.ones_like(weight, dtype=torch.bool)),
        Goal.of_mask(torch.zeros_like(weight, dtype=torch.bool)),
    ]
    return made if reads else [Goal(goal.removed, goal.pattern) for goal in made]


@pytest.mark.parametrize("spelled", SPELLED)
def test_what_came_before_changes_nothing(spelled: str, layer: tuple[Tensor, dict[str, Tensor]]) -> None:
    weight, statistics = layer
    begun: list[str] = []

    def given() -> tuple[Tensor, Mapping[str, Tensor]]:
        begun.append(spelled)
        return weight, statistics

    kept, asked = MatrixCompressor(spelled, given), goals(spelled, weight)
    for goal in [*asked, *reversed(asked)]:
        found, fresh = kept.compressed(goal), compress(spelled, weight, goal, statistics)
        assert torch.equal(found.weight, fresh.weight) and torch.equal(found.mask, fresh.mask)
    # One that wants to see all goals first begins anew for each.
    assert len(begun) == (2 * len(asked) if spelled == "obs" else 1)


def test_it_goes_on_after_a_failure(layer: tuple[Tensor, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    weight, statistics = layer
    bad, good, *_ = goals("refit", weight)
    compressing = Compressing("refit", lambda site, needs: (weight, statistics))
    expected = compress("refit", weight, good, statistics).weight
    assert good.mask is not None and bad.mask is not None
    with monkeypatch.context() as patch:
        patch.setattr("evoprune.fitness.compressors.refit.refit", lambda weight, *_: weight / 0)
        with pytest.raises(
            InvalidCandidate, match="NONFINITE: compressor 'refit' returned weights that are not finite"
        ):
            compressing.weight(SITE, bad.mask, None)
    assert torch.equal(compressing.weight(SITE, good.mask, None), expected)


def test_what_is_kept_is_limited(layer: tuple[Tensor, dict[str, Tensor]]) -> None:
    """Of two matrices one is kept; what the other becomes is the same."""
    weight, statistics = layer
    begun: list[str] = []

    def given(site: Site, needs: frozenset[str]) -> tuple[Tensor, Mapping[str, Tensor]]:
        assert needs == {"H"}
        begun.append(site.name)
        return weight, statistics

    room = kept_bytes([SITE])
    compressing = Compressing("refit", given, max_bytes=room)
    other = Site("layers.1.proj", "proj", block=1, n_blocks=2, out_features=OUT, in_features=IN)
    # The weight, H and its damped copy are there at least.
    assert 4 * (OUT * IN + 2 * IN * IN) <= room == kept_bytes([SITE, other], room) < kept_bytes([SITE, other])
    for goal in goals("refit", weight):
        assert goal.mask is not None
        expected = compress("refit", weight, goal, statistics).weight
        for site in (SITE, other):
            assert torch.equal(compressing.weight(site, goal.mask, goal.pattern), expected)
    assert begun.count(SITE.name) == 1 and begun.count(other.name) == len(goals("refit", weight))


def test_statistics_of_no_use_name_the_matrix(layer: tuple[Tensor, dict[str, Tensor]]) -> None:
    weight, _ = layer
    compressing = Compressing("refit", lambda site, needs: (weight, {"H": torch.full((IN, IN), torch.nan)}))
    with pytest.raises(InvalidInput, match=r"cannot compress layers\.0\.proj: .*not positive definite"):
        compressing.weight(SITE, weight > 0, None)


def test_every_compressor_of_masks_is_tested() -> None:
    assert {name for name in COMPRESSORS if COMPRESSORS[name].reads_criterion} <= set(SPELLED)
    assert not any(isinstance(COMPRESSORS[name.partition(":")[0]], AtRunTime) for name in SPELLED)
