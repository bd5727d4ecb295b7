"""What every compressor must hold to, and the mask alone in detail."""

from __future__ import annotations

import pytest
import torch

from evoprune.fitness.compressors import COMPRESSORS, compress, relative_output_error
from evoprune.metrics.errors import EvopruneError, UnknownName

TOKENS, OUT, IN = 200, 6, 8


@pytest.fixture
def inputs() -> torch.Tensor:
    """[TOKENS, IN], correlated."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(TOKENS, IN, generator=generator) @ torch.randn(IN, IN, generator=generator)


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def keep(weight: torch.Tensor) -> torch.Tensor:
    return weight.abs() > 0.5


@pytest.fixture(params=sorted(COMPRESSORS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_contract(name: str, inputs: torch.Tensor, weight: torch.Tensor, keep: torch.Tensor) -> None:
    statistics = {"H": inputs.T @ inputs / TOKENS}
    before, mask_before = weight.clone(), keep.clone()
    result = compress(name, weight, keep, statistics)
    assert torch.equal(weight, before)
    assert torch.equal(keep, mask_before)
    assert result.weight.shape == weight.shape
    assert result.weight.dtype == torch.float32
    assert torch.equal(result.weight[~result.mask], torch.zeros(int((~result.mask).sum())))
    assert not COMPRESSORS[name].keeps_mask or torch.equal(result.mask, keep)
    lost = (inputs @ (weight - result.weight).T).square().sum() / (inputs @ weight.T).square().sum()
    assert result.error == pytest.approx(lost.item(), rel=1e-4)


def test_the_mask_alone_changes_no_kept_weight(weight: torch.Tensor, keep: torch.Tensor) -> None:
    result = compress("mask", weight, keep, {})
    assert torch.equal(result.weight[keep], weight[keep])
    assert result.error is None


def test_removed_weights_become_plain_zero() -> None:
    weight = torch.tensor([[float("nan"), -1.0, 2.0]])
    result = compress("mask", weight, torch.tensor([[False, False, True]]), {})
    assert result.weight.tolist() == [[0, 0, 2]]
    assert not result.weight.signbit().any()


def test_error_by_hand() -> None:
    weight, new = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    squares = torch.tensor([[4.0, 1.0]])
    expected = (1 * 4 + 16 * 1) / (1 * 4 + 4 * 1 + 9 * 4 + 16 * 1)
    assert relative_output_error(weight, new, input_squares=squares) == pytest.approx(expected)
    assert relative_output_error(weight, new, gram=squares[0].diag()) == pytest.approx(expected)
    assert relative_output_error(weight, torch.zeros(2, 2), gram=squares[0].diag()) == 1
    assert relative_output_error(weight, weight, input_squares=squares) == 0
    assert relative_output_error(weight, new, input_squares=torch.zeros(2)) == 0
    assert relative_output_error(weight, new) is None


def test_broken_compressors_are_caught(
    weight: torch.Tensor, keep: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for broken in (weight, weight / 0):
        monkeypatch.setattr(COMPRESSORS["mask"], "compress", lambda *_, new=broken: (new, keep), raising=False)
        with pytest.raises(EvopruneError, match="outside its mask"):
            compress("mask", weight, keep, {})


def test_unknown_name(weight: torch.Tensor, keep: torch.Tensor) -> None:
    with pytest.raises(UnknownName, match="no compressor 'masc'; did you mean 'mask'"):
        compress("masc", weight, keep, {})
