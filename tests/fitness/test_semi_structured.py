"""Which layers torch's kernels for 2:4 can run: against what torch's own packing keeps of a matrix, on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

import evoprune
from evoprune.fitness.pruning import prune_model
from evoprune.fitness.semi_structured import SemiStructured, best_kernels, has_pattern, to_semi_structured, unfit
from evoprune.metrics.criterion import CRITERIA
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.mask import mask
from evoprune.metrics.records import MaskRule
from tests.models import tiny_language_model

KERNELS = (SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS)
GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def pruned(rows: int, columns: int, n: int, m: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    # Torch unpacks float32 as pairs of halves, and a lower half that reads as a NaN comes out changed: here it is 0.
    return weight.masked_fill(~mask(weight.abs(), MaskRule(None, (n, m))), 0).bfloat16().to(dtype)


def layer_of(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def packed_and_back(weight: Tensor) -> Tensor:
    """What is left of a matrix after torch has packed it for CUTLASS."""
    return sparse_semi_structured_to_dense_cutlass(*sparse_semi_structured_from_dense_cutlass(weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("pattern", [(2, 4), (1, 2), (1, 4), (3, 4), (4, 8)])
def test_what_qualifies_is_what_packing_keeps(pattern: tuple[int, int], dtype: torch.dtype) -> None:
    """In float32 torch packs 1 of every 2, and would lose weights of a 2:4 matrix without a word."""
    weight = pruned(32, 64, *pattern, dtype)
    kept = torch.equal(packed_and_back(weight), weight)
    assert (unfit(layer_of(weight), SparseSemiStructuredTensorCUTLASS) is None) == kept
    assert kept == (pattern in ((1, 2), (1, 4)) or (pattern == (2, 4) and dtype != torch.float32))


def test_packing_by_hand() -> None:
    """Kept weights in their order, two for each four columns; where fewer stay, zeros fill up."""
    weight = pruned(32, 64, 2, 4, torch.bfloat16)
    weight[3, :4] = 0
    packed, _ = sparse_semi_structured_from_dense_cutlass(weight)
    assert packed.shape == (32, 32)
    for row in (0, 3, 31):
        for group in range(1 if row == 3 else 0, 16):
            four = weight[row, 4 * group : 4 * group + 4]
            assert packed[row, 2 * group : 2 * group + 2].tolist() == four[four != 0].tolist()
    assert packed[3, :2].tolist() == [0, 0]
    assert torch.equal(packed_and_back(weight), weight)


@pytest.mark.parametrize("kernels", KERNELS)
def test_why_not(kernels: type[SparseSemiStructuredTensorCUTLASS]) -> None:
    sizes = kernels._DTYPE_SHAPE_CONSTRAINTS[torch.bfloat16]
    rows, columns = sizes.sparse_min_rows, sizes.sparse_min_cols
    assert unfit(layer_of(pruned(2 * rows, columns, 2, 4, torch.bfloat16)), kernels) is None
    odd = layer_of(pruned(rows + 1, columns, 2, 4, torch.bfloat16))
    assert unfit(odd, kernels) == f"its {rows + 1} × {columns} weight does not divide into blocks of {rows} × {columns}"
    wide = layer_of(pruned(rows, columns + 4, 2, 4, torch.bfloat16))
    assert "does not divide into blocks" in str(unfit(wide, kernels))
    assert "its weight is float64, and the kernels take bfloat16, float16" in str(
        unfit(layer_of(pruned(64, 64, 2, 4, torch.float64)), kernels)
    )
    assert unfit(layer_of(torch.ones(rows, columns, dtype=torch.bfloat16)), kernels) == "its weight is not 2:4"
    turned = tiny_language_model("gpt2").sites[0].module
    assert unfit(turned, kernels) == "Conv1D stores its weight the other way round"
    assert has_pattern(torch.tensor([[1.0, 0, 0, 2], [0, 0, 0, 0]]), 2, 4)
    assert not has_pattern(torch.tensor([[0.0, 0, 1, 1, 1, 0, 0, 0]]), 1, 4)


def test_what_the_float32_of_2_to_4_is_told() -> None:
    said = unfit(layer_of(pruned(32, 64, 2, 4, torch.float32)), SparseSemiStructuredTensorCUTLASS)
    assert said == "its weight is not 1:2; load the model in bfloat16 for 2:4"


def test_a_processor_has_no_such_kernels() -> None:
    assert evoprune.to_semi_structured is to_semi_structured
    language_model = tiny_language_model()
    for model in (language_model, language_model.model):
        with pytest.raises(InvalidInput, match="the model is on the cpu, and 2:4 kernels run on a GPU of compute"):
            to_semi_structured(model)
    with pytest.raises(InvalidInput, match="no linear layers"):
        to_semi_structured(nn.LayerNorm(4))


def test_an_older_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from evoprune.fitness import semi_structured

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(InvalidInput, match=r"cuda:0 has compute capability 7.5, and 2:4 kernels run on a GPU of"):
        semi_structured._check_device(torch.device("cuda:0"))


def test_the_summary_counts_reasons() -> None:
    found = SemiStructured(("a", "b"), {"c": "its weight is not 2:4", "d": "too odd", "e": "its weight is not 2:4"})
    assert found.summary().splitlines() == [
        "2 of 5 linear layers run on kernels for 2:4",
        "2 dense: its weight is not 2:4",
        "1 dense: too odd",
    ]


@pytest.mark.skipif(not GPU, reason="needs a GPU of compute capability 8.0")
def test_a_converted_model_computes_the_same() -> None:
    language_model = tiny_language_model(hidden_size=128, intermediate_size=256, head_dim=32)
    prune_model(language_model, CRITERIA["magnitude"], MaskRule(None, (2, 4)))
    language_model.sites[0].weight().fill_(0.01)
    model = language_model.model.to("cuda", torch.bfloat16)
    text = torch.arange(1, 65, device="cuda")[None]
    with torch.no_grad():
        before = model(input_ids=text).logits.float()
        found = to_semi_structured(language_model)
        after = model(input_ids=text).logits.float()
    assert list(found.kept) == [language_model.sites[0].site.name]
    assert len(found.converted) == len(language_model.sites) - 1
    assert best_kernels() in KERNELS
    assert (after - before).norm() < 0.03 * before.norm()
