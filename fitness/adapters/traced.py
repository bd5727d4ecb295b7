"""What has to be cut together in a family that nobody has described, read off the dependency graph of a block.

Torch-Pruning's graph says which operation of a block reads what; a walk through it finds the linear layers between
which heads and neurons lie, and the norms that one part alone needs. Its pruning groups are not used: they take the
attention product for an element-wise one, and so follow channels into tokens. Whether the rows of these layers are
heads in the order that the rest of the package takes for granted no graph says: that is measured, on the model.

Source: Fang et al. 2023 (DepGraph, arXiv:2301.12900), section 3.2; Ma et al. 2023 (LLM-Pruner, arXiv:2305.11627),
section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from evoprune.fitness.adapters import auto_class
from evoprune.fitness.adapters.base import (
    USUAL_WIDTH,
    AttentionLayout,
    MlpLayout,
    ModelAdapter,
    block_list,
    described_families,
    is_linear,
)
from evoprune.fitness.block_hooks import hidden_argument, input_replaced
from evoprune.fitness.hub import one_line, silence
from evoprune.metrics.errors import InvalidInput

TOKENS = 4
"""How long the text is that the trace reads."""

HOW_TO_INSTALL = "pip install 'evoprune[torch-pruning]'"

# What a walk meets beside linear layers: the hidden states that the block is given, and those that it returns.
_GIVEN, _RETURNED = "<given>", "<returned>"


class _Seen(Exception):
    """The block has been reached; the rest of the forward pass is not needed."""


@dataclass(frozen=True, slots=True)
class _Flow:
    """The dependency graph of a block.

    Attributes:
        linears: node of each linear layer, by path in the block.
        norms: nodes of the parameters, or of the module, of everything else that has parameters, by path.
        names: path of each linear layer, by node.
    """

    linears: dict[str, Any]
    norms: dict[str, list[Any]]
    names: dict[Any, str]

    def readers(self, start: Any) -> set[str]:
        """Linear layers that read what `start` gives with no other between, and `_RETURNED` if the block returns it."""
        return self._walk(start, lambda node: node.outputs, _RETURNED)[0]

    def sources(self, start: Any) -> set[str]:
        """Linear layers that `start` reads with no other between, and `_GIVEN` if it reads what the block is given."""
        return self._walk(start, lambda node: node.inputs, _GIVEN)[0]

    def between(self, start: Any) -> list[Any]:
        """Nodes behind `start` and before the next linear layers."""
        return self._walk(start, lambda node: node.outputs, _RETURNED)[1]

    def _walk(self, start: Any, further: Callable[[Any], Iterable[Any]], end: str) -> tuple[set[str], list[Any]]:
        found: set[str] = set()
        seen: dict[Any, None] = {}
        waiting = [start]
        while waiting:
            node = waiting.pop()
            following = list(further(node))
            if not following and not isinstance(node.module, nn.Parameter):
                found.add(end)
            for other in following:
                if other in self.names:
                    found.add(self.names[other])
                elif other not in seen:
                    seen[other] = None
                    waiting.append(other)
        return found, list(seen)


def traced_layout(model: PreTrainedModel, adapter: ModelAdapter) -> ModelAdapter:
    """`adapter` with the layout of attention and MLP that the dependency graph of the first block shows.

    Args:
        model: dense; the first block is run on a few tokens, its weights may be on the meta device.
        adapter: where the blocks and their linear layers are.

    Returns:
        Linear layers are told apart by what reads them and by their sizes; the order of their rows is a guess, and the
        name of the config's field for the width is one that has its value, empty if none has.

    Raises:
        InvalidInput: Torch-Pruning is not installed, the block cannot be traced, or it is not one attention and one
            MLP.
    """
    family = model.config.model_type
    try:
        torch_pruning = import_module("torch_pruning")
    except ImportError:
        raise InvalidInput(
            f"model family {family!r} cannot be cut into heads and neurons; supported: "
            f"{', '.join(described_families())}; to have others looked into: {HOW_TO_INSTALL}"
        ) from None
    blocks = block_list(model, adapter)
    kinds = [[path for path, module in block.named_modules() if is_linear(module)] for _, block in blocks]
    if any(found != kinds[0] for found in kinds):
        raise InvalidInput(f"model family {family!r} cannot be cut: its blocks have different layers")
    name, block = blocks[0]
    try:
        flow = _flow(torch_pruning, model, block, kinds[0])
    except Exception as error:  # whatever a forward pass of a family that nobody has tried may raise
        raise InvalidInput(
            f"model family {family!r} cannot be cut: {name} cannot be traced: {one_line(error)}"
        ) from None
    try:
        return _layout(model, adapter, block, flow)
    except InvalidInput as error:
        raise InvalidInput(f"model family {family!r} cannot be cut: in {name}, {error}") from None


def _flow(torch_pruning: Any, model: PreTrainedModel, block: nn.Module, kinds: list[str]) -> _Flow:
    args, kwargs = _arguments(model, block)
    hidden = hidden_argument(args, kwargs).clone().requires_grad_()

    def forward(module: nn.Module, given: dict[str, Any]) -> Tensor:
        # Torch-Pruning looks at each grad_fn; only what was computed from something that needs a gradient has one.
        with input_replaced(module, hidden):
            return _first(module(*args, **given))

    with _gradients(block):
        graph = torch_pruning.DependencyGraph().build_dependency(
            block, example_inputs=kwargs, forward_fn=forward, verbose=False
        )
    nodes: dict[Any, Any] = graph.module2node
    modules = dict(block.named_modules())
    if unseen := [path for path in kinds if modules[path] not in nodes]:
        raise InvalidInput(f"{unseen[0]} is not used, or is a {type(modules[unseen[0]]).__name__} that is no nn.Linear")
    linears = {path: nodes[modules[path]] for path in kinds}
    norms = {}
    for path, module in modules.items():
        own = [module, *module.parameters(recurse=False)]
        if path not in kinds and len(own) > 1:
            norms[path] = [nodes[thing] for thing in own if thing in nodes]
    return _Flow(linears, norms, {node: path for path, node in linears.items()})


@torch.no_grad()
def _arguments(model: PreTrainedModel, block: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the block is given in a forward pass."""
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append((args, kwargs))
        raise _Seen

    device = model.device
    tokens = torch.arange(1, TOKENS + 1, device=device)[None]
    # Without memory a mask cannot be asked whether it hides anything, and one that is ready is not.
    mask = torch.zeros(1, 1, TOKENS, TOKENS, device=device) if device.type == "meta" else None
    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        model(input_ids=tokens, attention_mask=mask, use_cache=False)
    except _Seen:
        return given[0]
    finally:
        handle.remove()
    raise InvalidInput("a forward pass does not reach it")


@contextmanager
def _gradients(block: nn.Module) -> Iterator[None]:
    """Inside, the parameters of the block need gradients, and the block is as in evaluation."""
    before = {parameter: parameter.requires_grad for parameter in block.parameters()}
    training = {module: module.training for module in block.modules()}
    try:
        with torch.enable_grad():
            block.requires_grad_(True)
            yield
    finally:
        for parameter, needed in before.items():
            parameter.requires_grad_(needed)
        for module, trained in training.items():
            module.training = trained


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _layout(model: PreTrainedModel, adapter: ModelAdapter, block: nn.Module, flow: _Flow) -> ModelAdapter:
    readers = {path: flow.readers(node) for path, node in flow.linears.items()}
    parts = {
        path: tuple(other for other, found in readers.items() if found == {path})
        for path, found in readers.items()
        if _RETURNED in found
    }
    if len(parts) != 2 or sum(map(len, parts.values())) + 2 != len(readers) or not all(parts.values()):
        raise InvalidInput(f"{', '.join(readers)} are not one attention and one MLP")
    products = {path: _product(flow, inputs) for path, inputs in parts.items()}
    attending = [path for path, product in products.items() if product is not None]
    if len(attending) != 1:
        raise InvalidInput(f"there are {len(attending)} attentions between linear layers, not one")
    output = attending[0]
    (written,) = set(parts) - {output}
    inputs, mlp_inputs = (
        _heads_in(flow, block, parts[output], output),
        _neurons_in(flow, block, parts[written], written),
    )
    place, mlp_place = _parent(*inputs, output), _parent(*mlp_inputs, written)
    if not place:
        raise InvalidInput("its attention is no module of its own")
    if not isinstance(getattr(block.get_submodule(place), "layer_idx", None), int):
        raise InvalidInput(
            f"{place} does not know the index of its block, which a dropped attention needs for the cache"
        )
    own: dict[str, list[str]] = {"attention": [], "mlp": [], "shared": []}
    for path, nodes in flow.norms.items():
        # Norms of queries and keys go with their attention anyway.
        if nodes and not path.startswith(f"{place}."):
            whose = _owner(flow, nodes, (set(inputs), output), (set(mlp_inputs), written))
            own.setdefault(whose, []).append(path)
    width = _width_name(model, f"{adapter.blocks}.0.{written}", _size(block, written)[1])
    return replace(
        adapter,
        attention=AttentionLayout(place, inputs, output, tuple(own["attention"])),
        mlp=MlpLayout(mlp_place, mlp_inputs, written, tuple(own["mlp"]), width),
        shared_norms=tuple(own["shared"]),
    )


def _product(flow: _Flow, inputs: tuple[str, ...]) -> Any:
    """The node of the attention product behind these layers: a fused one, or a softmax; None if there is none."""
    for path in inputs:
        for node in flow.between(flow.linears[path]):
            name = node.grad_fn.name() if hasattr(node.grad_fn, "name") else ""
            if "ScaledDotProduct" in name or "Softmax" in name:
                return node
    return None


def _heads_in(flow: _Flow, block: nn.Module, found: tuple[str, ...], output: str) -> tuple[str, str, str] | tuple[str]:
    """Query, key and value in this order, or the one layer of all three."""
    if len(found) == 1:
        return (found[0],)
    if len(found) != 3:
        raise InvalidInput(f"{', '.join(found)} are not query, key and value")
    product = _product(flow, found)
    given = [{flow.names[node]} if node in flow.names else flow.sources(node) for node in product.inputs]
    if len(given) == 3 and all(len(sources) == 1 for sources in given):
        # A fused product is given all three, in this order.
        query, key, value = (path for sources in given for path in sources)
    else:
        found = tuple(sorted(found, key=lambda path: product not in flow.between(flow.linears[path])))
        query, key, value = found
    rows = {path: _size(block, path)[0] for path in found}
    columns = _size(block, output)[1]
    if rows[query] != columns:
        # A softmax does not tell them apart; where they are equally tall it does not matter which is called what.
        query, key = key, query
    if {query, key, value} != set(found) or rows[query] != columns or rows[key] != rows[value]:
        sizes = ", ".join(f"{path} has {count} rows" for path, count in rows.items())
        raise InvalidInput(f"{sizes} and {output} {columns} columns: not query, key and value")
    return (query, key, value)


def _neurons_in(flow: _Flow, block: nn.Module, found: tuple[str, ...], output: str) -> tuple[str, ...]:
    """The layers whose rows are the neurons; gate, the one with an activation behind it, before up."""
    neurons = _size(block, output)[1]
    rows = {path: _size(block, path)[0] for path in found}
    fits = [neurons, 2 * neurons] if len(found) == 1 else [neurons]
    if len(found) > 2 or any(count not in fits for count in rows.values()):
        sizes = ", ".join(f"{path} has {count} rows" for path, count in rows.items())
        raise InvalidInput(f"{sizes} and {output} {neurons} columns: neither neurons nor gate and up")
    if len(found) == 1:
        return found
    first, second = found
    meeting = set(flow.between(flow.linears[first])) & set(flow.between(flow.linears[second]))
    direct = [path for path in found if meeting & set(flow.linears[path].outputs)]
    return (second, first) if direct == [first] else found


def _owner(flow: _Flow, nodes: list[Any], *parts: tuple[set[str], str]) -> str:
    """Which part goes nowhere without this norm: ``attention``, ``mlp``, both (``shared``) or none (``block``)."""
    readers = set().union(*(flow.readers(node) for node in nodes))
    sources = set().union(*(flow.sources(_scaled(node)) for node in nodes))
    names = ("attention", "mlp")
    for name, (inputs, output) in zip(names, parts, strict=True):
        if readers <= inputs or sources == {output}:
            return name
    return "shared" if readers <= parts[0][0] | parts[1][0] else "block"


def _scaled(node: Any) -> Any:
    """Where a bare parameter meets what it scales, such as ``x * (1 + weight)``; a module does so itself."""
    if not isinstance(node.module, nn.Parameter):
        return node
    while len(node.inputs) < 2 and node.outputs:
        node = node.outputs[0]
    return node


def _parent(*paths: str) -> str:
    """The deepest module that all these are in; empty for the block itself."""
    shared: list[str] = []
    for names in zip(*(path.split(".")[:-1] for path in paths), strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)


def _size(block: nn.Module, path: str) -> tuple[int, int]:
    """(rows, columns) of a linear layer."""
    out, columns = block.get_submodule(path).get_parameter("weight").shape
    return out, columns


def _width_name(model: PreTrainedModel, output: str, neurons: int) -> str:
    """The config's field for the number of neurons: what has its value, and makes `output` wider when it is more."""
    config = model.config
    values = config.get_text_config().to_dict()
    fields = [name for name, value in values.items() if type(value) is int and value == neurons]
    # Configs keep whatever they are given, so that even the usual name need not mean anything.
    for name in sorted(fields, key=lambda field: field != USUAL_WIDTH):
        wider = deepcopy(config)
        setattr(wider.get_text_config(), name, 2 * neurons)
        try:
            with silence(), torch.device("meta"):
                built = auto_class(wider).from_config(wider)
        except Exception:  # each family refuses in its own words what it cannot build; another field may be the one
            continue
        if 2 * neurons in built.get_submodule(output).get_parameter("weight").shape:
            return name
    return ""
