"""Linear layers whose weights are 2:4, run by torch's kernels for such matrices on a GPU.

A conversion of the model in memory: what is written to disk stays dense, and loads everywhere.
Source: torch.sparse.to_sparse_semi_structured; Mishra et al. 2021, arXiv:2104.08378.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensor, SparseSemiStructuredTensorCUSPARSELT
from torch.sparse import SparseSemiStructuredTensorCUTLASS as Cutlass
from transformers.pytorch_utils import Conv1D

from evoprune.fitness.models import LanguageModel
from evoprune.metrics.errors import InvalidInput

CAPABILITY = (8, 0)
"""The oldest GPUs whose tensor cores know 2:4."""

Kernels = type[SparseSemiStructuredTensor]

# Of every so many columns so many may be other than zero. In float32 the cores take halves of a group apart.
_PATTERNS = {torch.bfloat16: (2, 4), torch.float16: (2, 4), torch.float32: (1, 2)}


@dataclass(frozen=True)
class SemiStructured:
    """What became of the linear layers of a model.

    Attributes:
        converted: names of those that run on kernels for 2:4 now.
        kept: why each of the others stays dense, by name.
    """

    converted: tuple[str, ...]
    kept: dict[str, str]

    def summary(self) -> str:
        """One line for what was converted, and one for each reason why not, with how many layers it is of."""
        total = len(self.converted) + len(self.kept)
        lines = [f"{len(self.converted)} of {total} linear layers run on kernels for 2:4"]
        reasons = Counter(self.kept.values())
        return "\n".join([*lines, *(f"{count} dense: {reason}" for reason, count in reasons.most_common())])


def to_semi_structured(model: nn.Module | LanguageModel) -> SemiStructured:
    """Let torch's kernels for 2:4 run the layers of a model that they can run; in place, and not to be undone.

    Converted weights are packed tensors: the model computes, and nothing else. It can be neither pruned nor trained nor
    saved; `prune(..., out=...)` writes the dense checkpoint that this begins with.

    Args:
        model: on a GPU of compute capability 8.0 or newer, in bfloat16 or float16. Of a loaded model the prunable
            matrices are meant, of any other module all its linear layers.

    Returns:
        Which layers were converted, and why the others were not: see `unfit`.

    Raises:
        InvalidInput: the model is on no such GPU.
    """
    layers = list(_layers(model))
    if not layers:
        raise InvalidInput("the model has no linear layers: give one that has, such as a pruned language model")
    _check_device(layers[0][1].get_parameter("weight").device)
    kernels = best_kernels()
    converted, kept = [], {}
    for name, layer in layers:
        reason = unfit(layer, kernels)
        if reason is None:
            packed = kernels.from_dense(layer.get_parameter("weight").detach().contiguous())
            layer.weight = nn.Parameter(packed, requires_grad=False)
            converted.append(name)
        else:
            kept[name] = reason
    return SemiStructured(tuple(converted), kept)


def best_kernels() -> Kernels:
    """cuSPARSELt's, or CUTLASS's where torch was built without it."""
    cusparselt = getattr(torch.backends, "cusparselt", None)
    return SparseSemiStructuredTensorCUSPARSELT if cusparselt is not None and cusparselt.is_available() else Cutlass


def unfit(layer: nn.Module, kernels: Kernels) -> str | None:
    """Why kernels cannot run a layer, in words; None if they can. The same on every device.

    Its weight, [out, in], must have a dtype that they take, sizes that their blocks divide, and zeros enough: 2 of
    every 4 columns in bfloat16 and float16. In float32 they take 1 of every 2, which 2:4 is only by chance.
    """
    weight = layer.get_parameter("weight").detach()
    if not isinstance(layer, nn.Linear):
        return f"{type(layer).__name__} stores its weight the other way round"
    known = {dtype: sizes for dtype, sizes in kernels._DTYPE_SHAPE_CONSTRAINTS.items() if dtype in _PATTERNS}
    if weight.dtype not in known:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in known))
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}, and the kernels take {names}"
    sizes = known[weight.dtype]
    rows, columns = sizes.sparse_min_rows, sizes.sparse_min_cols
    if weight.shape[0] % rows or weight.shape[1] % columns or not weight.numel():
        return f"its {' × '.join(map(str, weight.shape))} weight does not divide into blocks of {rows} × {columns}"
    n, m = _PATTERNS[weight.dtype]
    if not has_pattern(weight, n, m):
        other = "; load the model in bfloat16 for 2:4" if (n, m) != (2, 4) else ""
        return f"its weight is not {n}:{m}{other}"
    return None


def has_pattern(weight: Tensor, n: int, m: int) -> bool:
    """Whether at most n of every m consecutive columns of each row are other than zero.

    Args:
        weight: [out, in], m divides in.
    """
    return bool(((weight != 0).view(len(weight), -1, m).sum(2) <= n).all())


def _layers(model: nn.Module | LanguageModel) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(model, LanguageModel):
        yield from ((bound.site.name, model.model.get_submodule(bound.site.name)) for bound in model.sites)
    else:
        yield from ((name, part) for name, part in model.named_modules() if isinstance(part, (nn.Linear, Conv1D)))


def _check_device(device: torch.device) -> None:
    need = f"a GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or newer"
    if device.type != "cuda":
        raise InvalidInput(
            f"the model is on the {device.type}, and 2:4 kernels run on {need}: load it there, device='cuda'"
        )
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        raise InvalidInput(f"{device} has compute capability {found[0]}.{found[1]}, and 2:4 kernels run on {need}")
