"""What an adapter says about a family, and how its sites are bound to a live model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.records import Site
from evoprune.metrics.registry import Registry

USUAL_WIDTH = "intermediate_size"
"""What most configs call the number of neurons."""


@dataclass(frozen=True, slots=True)
class AttentionLayout:
    """Where the attention of a block is: paths inside the block.

    Attributes:
        module: the attention, which knows its ``head_dim``.
        inputs: linear layers whose rows are query, key and value, or one whose rows are these three in this order.
        output: linear layer whose columns are the query heads, in the order of the query's rows.
        norms: norms that nothing but the attention needs; they go with it.
    """

    module: str
    inputs: tuple[str, str, str] | tuple[str]
    output: str
    norms: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MlpLayout:
    """Where the MLP of a block is: paths inside the block.

    Attributes:
        module: the MLP; empty where its layers lie in the block itself.
        inputs: linear layers whose rows are the neurons: one, or gate and up. One layer with twice as many rows as
            there are neurons holds gate and up, in this order.
        output: linear layer whose columns are the neurons.
        norms: norms that nothing but the MLP needs; they go with it.
        width: what the config calls the number of neurons; empty where it has no name for it.
    """

    module: str
    inputs: tuple[str, ...]
    output: str
    norms: tuple[str, ...] = ()
    width: str = USUAL_WIDTH


@dataclass(frozen=True, slots=True)
class ModelAdapter:
    """Where the prunable matrices of a model family are.

    Attributes:
        blocks: module path of the list of decoder blocks in the causal language model, such as ``model.layers``.
        kinds: paths of the prunable linear layers inside a block, in the order in which a forward pass uses them.
        attention, mlp: what has to be cut together; None where nobody has said so.
        shared_norms: norms that attention and MLP both read; they go with both.
    """

    blocks: str
    kinds: tuple[str, ...]
    attention: AttentionLayout | None = None
    mlp: MlpLayout | None = None
    shared_norms: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SiteModule:
    """A site bound to the module that holds its weight.

    Attributes:
        site: name, kind, place and shape.
        module: the linear layer.
        transposed: the layer stores [in, out], as GPT-2's Conv1D does.
    """

    site: Site
    module: nn.Module
    transposed: bool

    def weight(self) -> Tensor:
        """[out, in] view of the live weight, in the model's dtype: what is written into it the model uses."""
        weight = self.module.get_parameter("weight").detach()
        return weight.T if self.transposed else weight

    def bias(self) -> Tensor | None:
        """[out] view of the live bias, if there is one."""
        bias = getattr(self.module, "bias", None)
        return bias.detach() if isinstance(bias, Tensor) else None


class Prunable(Protocol):
    """What has matrices to prune.

    Attributes:
        model: the live model; its class names it in allocations.
        sites: prunable matrices in model order, bound to `model`.
    """

    @property
    def model(self) -> nn.Module: ...

    @property
    def sites(self) -> tuple[SiteModule, ...]: ...


ADAPTERS: Registry[ModelAdapter] = Registry("model family", "evoprune.fitness.adapters")


def described_families() -> list[str]:
    """Families whose adapters say what has to be cut together."""
    return [name for name in ADAPTERS if ADAPTERS[name].attention is not None and ADAPTERS[name].mlp is not None]


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a dense layer whose weight a site can bind."""
    return isinstance(module, (nn.Linear, Conv1D))


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a live model whose matrices may be pruned.

    Attributes:
        component: its name, such as ``language_model``.
        blocks: (module path, block) in the order of a forward pass.
        kinds: paths of the prunable linear layers inside a block, in the order in which a forward pass uses them.
        where: module path, for messages.
    """

    component: str
    blocks: list[tuple[str, nn.Module]]
    kinds: tuple[str, ...]
    where: str


def linear_kinds(where: str, blocks: Iterable[nn.Module]) -> tuple[str, ...]:
    """Paths of every linear layer inside some block, in the order in which the modules list them.

    Raises:
        InvalidInput: some are those of experts.
    """
    found = (path for block in blocks for path, module in block.named_modules() if is_linear(module))
    kinds = tuple(dict.fromkeys(found))
    experts = [kind for kind in kinds if has_experts(kind)]
    if experts:
        raise InvalidInput(
            f"mixture-of-experts models are not supported yet: the blocks in {where} hold {', '.join(experts[:4])}"
        )
    return kinds


def block_list(model: PreTrainedModel, adapter: ModelAdapter) -> list[tuple[str, nn.Module]]:
    """(module path, block) of each decoder block, in model order."""
    try:
        blocks = model.get_submodule(adapter.blocks)
    except AttributeError:
        raise InvalidInput(
            f"{type(model).__name__} has no {adapter.blocks!r}: give a causal language model, "
            f"as AutoModelForCausalLM loads it"
        ) from None
    return [(f"{adapter.blocks}.{index}", block) for index, block in blocks.named_children()]


def bind_sites(model: nn.Module, parts: Sequence[Part], *, others_stay_dense: bool = False) -> list[SiteModule]:
    """The sites that `parts` name, block by block, numbered through.

    Args:
        model: the live model.
        parts: in the order of a forward pass.
        others_stay_dense: let a block hold weights that its part does not name.

    Raises:
        InvalidInput: a block holds weights that its part does not name, two sites share one weight, or there is no
            block.
    """
    sites: list[SiteModule] = []
    owners: dict[int, str] = {}
    n_blocks = sum(len(part.blocks) for part in parts)
    numbered = [(part, *block) for part in parts for block in part.blocks]
    for index, (part, block_name, block) in enumerate(numbered):
        modules = dict(block.named_modules())
        linears = {kind: modules[kind] for kind in part.kinds if is_linear(modules.get(kind, block))}
        if not others_stay_dense:
            refuse_unlisted(model, block_name, block, linears)
        for kind, linear in linears.items():
            name = f"{block_name}.{kind}" if kind else block_name
            weight = linear.get_parameter("weight")
            if not weight.is_floating_point():
                raise InvalidInput(f"{name} holds {weight.dtype} weights: prune the model before it is quantised")
            if id(weight) in owners:
                raise InvalidInput(
                    f"{name} shares its weight with {owners[id(weight)]}: shared blocks cannot be pruned"
                )
            owners[id(weight)] = name
            transposed = isinstance(linear, Conv1D)
            out_features, in_features = weight.T.shape if transposed else weight.shape
            site = Site(name, kind, index, n_blocks, out_features, in_features, part.component)
            sites.append(SiteModule(site, linear, transposed))
    if not sites:
        where = " and ".join(part.where for part in parts)
        raise InvalidInput(f"{type(model).__name__} has nothing to prune: {where} is empty")
    return sites


def rebind(sites: Iterable[SiteModule], model: nn.Module) -> tuple[SiteModule, ...]:
    """The same sites bound to a copy of their model."""
    return tuple(replace(bound, module=model.get_submodule(bound.site.name)) for bound in sites)


def refuse_unlisted(model: nn.Module, block_name: str, block: nn.Module, listed: dict[str, nn.Module]) -> None:
    """Refuse a block with weights of two or more dimensions outside `listed`, norms and embeddings.

    Such weights, above all the fused tensors that hold a layer's experts, would otherwise stay dense unnoticed.

    Raises:
        InvalidInput: names up to four of the weights.
    """
    unlisted = []
    for path, module in block.named_modules():
        if path in listed or isinstance(module, nn.Embedding) or "norm" in type(module).__name__.lower():
            continue
        for leaf, parameter in module.named_parameters(prefix=path, recurse=False):
            if parameter.dim() >= 2:
                unlisted.append((leaf, parameter))
    if not unlisted:
        return
    shown = ", ".join(f"{leaf} {list(parameter.shape)}" for leaf, parameter in unlisted[:4])
    if len(unlisted) > 4:
        shown += f" and {len(unlisted) - 4} more"
    if any(has_experts(leaf) for leaf, _ in unlisted):
        raise InvalidInput(f"mixture-of-experts models are not supported yet: {block_name} holds {shown}")
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    raise InvalidInput(f"model family {family!r} is not supported: {block_name} holds {shown}, which no site covers")


def has_experts(path: str) -> bool:
    """Whether a module or parameter path leads into the experts or the router of a mixture."""
    return any(part in ("expert", "experts", "router") for part in path.split("."))


@torch.no_grad()
def zero_fraction(sites: list[SiteModule] | tuple[SiteModule, ...]) -> float:
    """Fraction of the prunable weights that is exactly zero."""
    zeros = sum(int((bound.weight() == 0).sum()) for bound in sites)
    return zeros / max(sum(bound.site.weights for bound in sites), 1)
