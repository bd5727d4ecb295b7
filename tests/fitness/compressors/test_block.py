"""Block sparsity against greedy removal by brute force and the best weights for each mask; on a ViT's layers too."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers import ViTConfig, ViTModel

from evoprune.fitness.compressors import COMPRESSORS, Goal, compress, compress_all, relative_output_error
from evoprune.fitness.compressors.block import Block
from evoprune.fitness.pruning import check_rule
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.records import MaskRule
from tests.models import tiny_language_model

OUT, IN, TOKENS = 6, 12, 256
DAMPING = 0.01


@pytest.fixture
def layer() -> tuple[Tensor, Tensor]:
    """A weight and a Gram matrix of correlated inputs, of which one is always zero."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(TOKENS, IN, generator=generator) @ torch.randn(IN, IN, generator=generator)
    inputs[:, 7] = 0
    return torch.randn(OUT, IN, generator=generator), inputs.T @ inputs / TOKENS


def damped(gram: Tensor) -> Tensor:
    hessian = gram.double() / (gram.diagonal().double().sum() / (IN - 1))
    hessian[7, 7] = 1
    return hessian + DAMPING * hessian.diagonal().mean() * torch.eye(IN, dtype=torch.float64)


def best(weight: Tensor, hessian: Tensor, keep: Tensor) -> Tensor:
    """The best weights for a mask, row by row."""
    new = torch.zeros_like(weight, dtype=torch.float64)
    for row, kept in enumerate(keep):
        if kept.any():
            new[row, kept] = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ weight[row].double())
    return new


def loss(weight: Tensor, new: Tensor, hessian: Tensor) -> float:
    change = weight.double() - new
    return ((change @ hessian) * change).sum().item()


def greedy(weight: Tensor, hessian: Tensor, height: int, width: int) -> list[list[tuple[float, int]]]:
    """For each row of blocks (cost, block) in the order of removal: every removal is tried, and solved anew."""
    found = []
    for rows in weight.split(height):
        keep, steps, before = torch.ones_like(rows, dtype=torch.bool), [], 0.0
        while bool(keep.any()):
            tries = []
            for at in range(IN // width):
                columns = slice(at * width, (at + 1) * width)
                if keep[0, columns].any():
                    tried = keep.clone()
                    tried[:, columns] = False
                    tries.append((loss(rows, best(rows, hessian, tried), hessian), at, tried))
            after, at, keep = min(tries, key=lambda tried: tried[0])
            steps.append((after - before, at))
            before = after
        found.append(steps)
    return found


@pytest.mark.parametrize(("height", "width"), [(2, 3), (3, 2), (6, 4), (1, 1)])
def test_removals_are_those_of_brute_force(layer: tuple[Tensor, Tensor], height: int, width: int) -> None:
    weight, gram = layer
    hessian = damped(gram)
    steps = greedy(weight, hessian, height, width)
    order, costs = Block(height, width)._removals(weight.double().view(-1, height, IN), hessian.inverse())
    assert order.tolist() == [[at for _, at in row] for row in steps]
    torch.testing.assert_close(costs, torch.tensor([[cost for cost, _ in row] for row in steps], dtype=torch.float64))


@pytest.mark.parametrize("removed", [0, 6, 24, 31, 71, 72])
def test_masks_are_blocks_with_the_best_weights_there_are(layer: tuple[Tensor, Tensor], removed: int) -> None:
    weight, gram = layer
    [(new, keep)] = Block(2, 3).compress(weight, [Goal(removed)], {"H": gram})
    assert int((~keep).sum()) == removed
    per_block = keep.view(OUT // 2, 2, IN // 3, 3).sum((1, 3))
    whole = (per_block == 0).sum() + (per_block == 6).sum()
    # Where the count is no multiple of a block, one of them goes in part.
    assert int(whole) == per_block.numel() - (removed % 6 > 0)
    torch.testing.assert_close(new.double(), best(weight, damped(gram), keep), rtol=1e-4, atol=1e-5)
    if removed == 0:
        assert torch.equal(new, weight)


def test_which_rows_of_blocks_lose_more_is_said_by_what_it_costs(layer: tuple[Tensor, Tensor]) -> None:
    weight, gram = layer
    weight[2:4] *= 100
    [(_, keep)] = Block(2, 3).compress(weight, [Goal(OUT * IN * 2 // 3)], {"H": gram})
    assert bool(keep[2:4].all())
    assert not bool(keep[:2].any())


def test_more_that_goes_costs_more_and_less_than_whole_blocks_by_size(layer: tuple[Tensor, Tensor]) -> None:
    weight, gram = layer
    results = list(compress_all("block", weight.repeat(8, 4), [Goal(n * 256) for n in range(10)], {"H": wide(gram)}))
    assert all(one.error <= other.error for one, other in pairwise(results))  # type: ignore[operator]
    by_size = weight.repeat(8, 4).view(3, 16, 3, 16).square().sum((1, 3)).flatten().argsort()[:4]
    keep = torch.ones(9, dtype=torch.bool).index_fill(0, by_size, False).view(3, 3)
    masked = weight.repeat(8, 4) * keep.repeat_interleave(16, 0).repeat_interleave(16, 1)
    expected = relative_output_error(weight.repeat(8, 4), masked, gram=wide(gram))
    assert expected is not None and results[4].error is not None and results[4].error < expected


def wide(gram: Tensor) -> Tensor:
    """Four copies of the inputs, each with noise of its own."""
    return gram.repeat(4, 4) + 0.3 * torch.eye(4 * IN)


@torch.no_grad()
def test_a_vision_transformer() -> None:
    """Its linear layers lose half of their blocks, and its output less than by the largest blocks alone."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=4
    )
    model = ViTModel(config, add_pooling_layer=False).eval()
    images = torch.randn(8, 3, 16, 16)
    dense = model(images).last_hidden_state
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert len(layers) == 6
    grams: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: grams.__setitem__(name, args[0].flatten(0, -2).T @ args[0].flatten(0, -2))
        )
        for name, module in layers.items()
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    weights = {name: module.weight.clone() for name, module in layers.items()}
    for name, module in layers.items():
        found = compress("block", weights[name], Goal(module.weight.numel() // 2), {"H": grams[name]})
        tiles = found.mask.view(module.out_features // 16, 16, module.in_features // 16, 16).float().mean((1, 3))
        assert sorted(tiles.flatten().tolist()) == [0] * (tiles.numel() // 2) + [1] * (tiles.numel() // 2)
        module.weight.copy_(found.weight)
    ours = (model(images).last_hidden_state - dense).square().mean()
    for name, module in layers.items():
        sizes = weights[name].view(module.out_features // 16, 16, module.in_features // 16, 16).square().sum((1, 3))
        keep = (sizes > sizes.median()).repeat_interleave(16, 0).repeat_interleave(16, 1)
        module.weight.copy_(weights[name] * keep)
    assert ours < (model(images).last_hidden_state - dense).square().mean()


def test_what_it_cannot_do() -> None:
    block = COMPRESSORS["block"]
    gram = {"H": torch.eye(24)}
    with pytest.raises(InvalidInput, match="blocks of 16 × 16 do not divide a matrix of 32 × 24"):
        list(block.compress(torch.ones(32, 24), [Goal(0)], gram))
    with pytest.raises(InvalidInput, match="whole blocks of 2 × 2, not 2:4: give a sparsity"):
        list(Block(2, 2).compress(torch.ones(32, 24), [Goal(384, (2, 4))], gram))
    with pytest.raises(InvalidInput, match="height 0 is outside"):
        Block(0)
    model = tiny_language_model(intermediate_size=40)
    with pytest.raises(InvalidInput, match=r"mlp\.gate_proj: blocks of 16 × 16 do not"):
        check_rule(model, MaskRule(0.5), "block")
