"""Units: what has to be cut together so that a model gets smaller and still runs.

A KV group is the rows of one key and one value head, those of the query heads that read them, and their columns in the
output projection; a query head is its own rows and columns; a neuron is a row of gate and up and a column of down.
Biases go with their rows. Dropping all of a part also drops its output bias and the norms that nothing else needs.
Source: Ma et al. 2023 (LLM-Pruner, arXiv:2305.11627), section 3.1; layerwise sparsity allocation, sections 5.1, 6.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args
from weakref import WeakSet

from torch import nn
from transformers import PreTrainedModel

from evoprune.fitness.adapters import Prunable, SiteModule, decoder_blocks
from evoprune.fitness.adapters.base import AttentionLayout, MlpLayout
from evoprune.fitness.factored import refuse_factored
from evoprune.fitness.layouts import layout_of
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.records import LANGUAGE
from evoprune.metrics.shape import BlockShape, BlockWidths

PartName = Literal["attention", "mlp"]
PARTS: tuple[PartName, ...] = get_args(PartName)

# Models whose units were looked up, and hold.
_CHECKED: WeakSet[nn.Module] = WeakSet()


@dataclass(frozen=True, slots=True)
class AttentionUnits:
    """The units of one attention.

    Attributes:
        name: module path.
        inputs: query, key and value, or one matrix with the rows of all three.
        output: the matrix whose columns are the query heads.
        norms: module paths of the norms that go with it, those of queries and keys inside it among them.
        groups: KV groups.
        heads: query heads.
        head_dim: rows of a head.
    """

    name: str
    inputs: tuple[SiteModule, ...]
    output: SiteModule
    norms: tuple[str, ...]
    groups: int
    heads: int
    head_dim: int

    @property
    def fused(self) -> bool:
        """Whether query, key and value are rows of one matrix."""
        return len(self.inputs) == 1

    def rows(self, groups: Sequence[int], heads: Sequence[int]) -> tuple[list[int], ...]:
        """Rows of each of `inputs` that stay, in order, where these KV groups and query heads do."""
        query, key = self.columns(heads), _runs(groups, self.head_dim)
        if not self.fused:
            return query, key, key
        q_rows, kv_rows = self.heads * self.head_dim, self.groups * self.head_dim
        return ([*query, *(q_rows + row for row in key), *(q_rows + kv_rows + row for row in key)],)

    def columns(self, heads: Sequence[int]) -> list[int]:
        """Columns of `output` that stay, in order, where these query heads do."""
        return _runs(heads, self.head_dim)

    def parameters(self, groups: int, heads_per_group: int) -> int:
        """Parameters in matrices and biases if so many KV groups with so many query heads each stay; norms apart."""
        if not groups or not heads_per_group:
            return 0
        heads = groups * heads_per_group
        rows = self.head_dim * (heads + 2 * groups)
        has_bias = [bound.bias() is not None for bound in self.inputs]
        # Query and key may have biases where value has none, so each counts for itself.
        biased = (
            rows * has_bias[0]
            if self.fused
            else self.head_dim
            * sum(count * biased for count, biased in zip((heads, groups, groups), has_bias, strict=True))
        )
        hidden, out = self.inputs[0].site.in_features, self.output.site.out_features
        bias = out if self.output.bias() is not None else 0
        return rows * hidden + biased + out * heads * self.head_dim + bias


@dataclass(frozen=True, slots=True)
class MlpUnits:
    """The units of one MLP.

    Attributes:
        name: module path; that of the block where its layers lie in the block itself.
        inputs: the matrices whose rows are the neurons, or one with the rows of gate and then of up.
        output: the matrix whose columns are the neurons.
        norms: module paths of the norms that go with it.
        neurons: how many.
    """

    name: str
    inputs: tuple[SiteModule, ...]
    output: SiteModule
    norms: tuple[str, ...]
    neurons: int

    @property
    def fused(self) -> bool:
        """Whether gate and up are rows of one matrix."""
        return self.inputs[0].site.out_features == 2 * self.output.site.in_features

    def rows(self, neurons: Sequence[int]) -> tuple[list[int], ...]:
        """Rows of each of `inputs` that stay, in order, where these neurons do."""
        if self.fused:
            return ([*neurons, *(self.neurons + neuron for neuron in neurons)],)
        return tuple(list(neurons) for _ in self.inputs)

    def parameters(self, neurons: int) -> int:
        """Parameters in the matrices and biases if so many neurons stay; norms apart."""
        if not neurons:
            return 0
        rows = [neurons * (2 if self.fused else 1)] * len(self.inputs)
        found = sum(
            count * (bound.site.in_features + (bound.bias() is not None))
            for count, bound in zip(rows, self.inputs, strict=True)
        )
        out = self.output.site.out_features
        return found + out * neurons + (out if self.output.bias() is not None else 0)


@dataclass(frozen=True, slots=True)
class BlockUnits:
    """The units of one decoder block.

    Attributes:
        name: module path of the block.
        block: its index.
        norms: module paths of the norms that attention and MLP share.
    """

    name: str
    block: int
    attention: AttentionUnits
    mlp: MlpUnits
    norms: tuple[str, ...] = ()

    @property
    def widths(self) -> BlockWidths:
        """How many there are."""
        return BlockWidths(self.attention.groups, self.attention.heads, self.mlp.neurons)

    def parameters(self, shape: BlockShape) -> int:
        """Parameters of the matrices and their biases that stay; norms apart."""
        attention = self.attention.parameters(len(shape.groups), shape.heads_per_group)
        return attention + self.mlp.parameters(len(shape.neurons))

    def gone_norms(self, shape: BlockShape) -> tuple[str, ...]:
        """Module paths of the norms that nothing needs any more: those of dropped parts."""
        attention = () if shape.groups else self.attention.norms
        mlp = () if shape.neurons else self.mlp.norms
        return (*attention, *mlp, *(() if shape.groups or shape.neurons else self.norms))


def find_units(language_model: Prunable) -> list[BlockUnits]:
    """The units of every decoder block of the language model, in model order.

    Where no adapter says what belongs together, it is looked up in the dependency graph of a block, and cuts of the
    model are compared with zeros before anything is returned.

    Raises:
        InvalidInput: nobody has said how the blocks of this family can be cut, and it is not found either, or what is
            found does not hold; a part is missing; an attention holds weights for each head beside its matrices, or
            heads that do not come in equal groups; layers have wrappers; or the norms lie behind the parts.
    """
    refuse_factored(language_model.sites)
    model = language_model.model
    assert isinstance(model, PreTrainedModel)
    config = model.config.get_text_config()
    layout = layout_of(model)
    attention, mlp = layout.attention, layout.mlp
    if not getattr(config, "do_layer_norm_before", True):
        raise InvalidInput(
            f"{type(model).__name__} normalises behind attention and MLP (do_layer_norm_before is false), so neither "
            "can be dropped: it cannot be cut"
        )
    bound = {site.site.name: site for site in language_model.sites if site.site.component == LANGUAGE}
    blocks: dict[str, int] = {}
    for name, site in bound.items():
        blocks.setdefault(name.removesuffix(f".{site.site.kind}"), site.site.block)
    for name, _ in decoder_blocks(model):
        layers = (*attention.inputs, attention.output, *mlp.inputs, mlp.output)
        if gone := [path for path in layers if f"{name}.{path}" not in bound]:
            raise InvalidInput(f"{name} has no {gone[0]}, so it is cut already: give the dense model")
    units = [
        BlockUnits(
            name,
            index,
            _attention(model, name, attention, bound),
            _mlp(model, name, mlp, bound),
            tuple(f"{name}.{path}" for path in layout.shared_norms),
        )
        for index, name in enumerate(blocks)
    ]
    if layout.traced and model not in _CHECKED:
        # The surgeon, with which it is checked, cuts what is found here.
        from evoprune.fitness.unit_check import check_units

        check_units(language_model, units)
        _CHECKED.add(model)
    return units


def _attention(
    model: PreTrainedModel, block: str, layout: AttentionLayout, bound: dict[str, SiteModule]
) -> AttentionUnits:
    name = f"{block}.{layout.module}"
    module = model.get_submodule(name)
    inputs = tuple(bound[f"{block}.{path}"] for path in layout.inputs)
    output = bound[f"{block}.{layout.output}"]
    head_dim, query = head_width(model, module), output.site.in_features
    rows = [site.site.out_features for site in inputs]
    key = (rows[0] - query) // 2 if len(inputs) == 1 else rows[1]
    heads, groups = query // head_dim, key // head_dim
    if heads * head_dim != query or groups * head_dim != key or not groups or heads % groups:
        raise InvalidInput(f"{name} has {query} query and {key} key rows for heads of {head_dim}: it cannot be cut")
    cut = {site.module for site in (*inputs, output)}
    _refuse_per_head(name, module, head_dim, cut)
    norms = (*(f"{block}.{path}" for path in layout.norms), *_inner(name, module, cut))
    return AttentionUnits(name, inputs, output, norms, groups, heads, head_dim)


def head_width(model: PreTrainedModel, attention: nn.Module) -> int:
    """Rows of a head: what the attention says, or the config, or what is left of the hidden size for each."""
    config: Any = model.config.get_text_config()
    said = getattr(attention, "head_dim", None) or getattr(config, "head_dim", None)
    return int(said or config.hidden_size // config.num_attention_heads)


def _refuse_per_head(name: str, module: nn.Module, head_dim: int, cut: set[nn.Module]) -> None:
    """Refuse parameters that a cut would have to follow, such as a norm over all heads or a sink for each."""
    for path, inner in module.named_modules():
        for leaf, parameter in inner.named_parameters(prefix=path, recurse=False):
            if inner not in cut and parameter.numel() != head_dim:
                raise InvalidInput(f"{name} holds {leaf} {list(parameter.shape)} beside its matrices: it cannot be cut")


def _mlp(model: PreTrainedModel, block: str, layout: MlpLayout, bound: dict[str, SiteModule]) -> MlpUnits:
    name = f"{block}.{layout.module}" if layout.module else block
    inputs = tuple(bound[f"{block}.{path}"] for path in layout.inputs)
    output = bound[f"{block}.{layout.output}"]
    norms = [f"{block}.{path}" for path in layout.norms]
    if layout.module:
        norms += _inner(name, model.get_submodule(name), {site.module for site in (*inputs, output)})
    return MlpUnits(name, inputs, output, tuple(norms), output.site.in_features)


def _inner(name: str, module: nn.Module, cut: set[nn.Module]) -> list[str]:
    """What else has parameters inside an attention or an MLP, such as norms and activations: it goes with it."""
    modules = module.named_modules()
    return [f"{name}.{path}" for path, inner in modules if inner not in cut and list(inner.parameters(recurse=False))]


def _runs(indices: Sequence[int], length: int) -> list[int]:
    """Each index as the run of `length` numbers that it stands for."""
    return [index * length + offset for index in indices for offset in range(length)]
