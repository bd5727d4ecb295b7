"""Whether units that nobody has described are units: a model that is cut says what it says where they give zeros."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from evoprune.fitness.adapters import Prunable, SiteModule
from evoprune.fitness.hub import one_line
from evoprune.fitness.surgeon import Surgeon
from evoprune.fitness.units import AttentionUnits, BlockUnits
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.shape import BlockShape, BlockWidths

TOKENS = 6
TOLERANCE = 1e-4
"""Of the length of all logits, in float32 and finer."""
ROUNDINGS = 16
"""In half precision: so many times the spacing of its numbers, since sums of fewer terms round otherwise."""


@torch.no_grad()
def check_units(language_model: Prunable, units: Sequence[BlockUnits]) -> None:
    """Refuse units that cannot be cut as they were found.

    KV groups, query heads of each group, neurons, parts and the first block are cut in turn, and the logits compared
    with those of the whole model in which the columns of the same units read zeros, and with those of the cut model
    that has a cache. Weights on the meta device give no
    logits, so nothing is compared there.

    Args:
        language_model: dense; as it was when this returns.
        units: of all its blocks.

    Raises:
        InvalidInput: says in one line what differs.
    """
    model = language_model.model
    assert isinstance(model, PreTrainedModel)
    if all(parameter.is_meta for parameter in model.parameters()):
        return
    family, surgeon = model.config.model_type, Surgeon(language_model, units)
    if units[0].attention.fused and not _in_order(model, units[0].attention):
        name = units[0].attention.inputs[0].site.name
        raise InvalidInput(
            f"model family {family!r} cannot be cut: the rows of {name} are not those of all queries, then all keys, "
            "then all values"
        )
    try:
        for what, blocks in _cuts(units).items():
            surgeon.restore()
            with _zeros(units, blocks):
                expected = _logits(model)
            try:
                surgeon.apply(blocks)
                found, cached = _logits(model), _cached(model)
            except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
                raise InvalidInput(
                    f"model family {family!r} cannot be cut: without {what} it does not run: {one_line(error)}"
                ) from None
            allowed = _tolerance(model)
            # Not a number is no small distance.
            if not (distance := _distance(found, expected)) <= allowed:
                raise InvalidInput(
                    f"model family {family!r} cannot be cut: without {what} its logits are {distance:.1e} from those "
                    f"with zeros in their place, where {allowed:.0e} is allowed"
                )
            if cached is not None and not (distance := _distance(cached, found[:, -1:])) <= allowed:
                raise InvalidInput(
                    f"model family {family!r} cannot be cut: without {what} its logits with a cache are {distance:.1e} "
                    f"from those without one, where {allowed:.0e} is allowed"
                )
    finally:
        surgeon.restore()


def _cuts(units: Sequence[BlockUnits]) -> dict[str, list[BlockShape]]:
    """Shapes that take every kind of unit away once, by what is gone."""
    widths = units[0].widths
    found = {"half the neurons": [_but(block.widths, neurons=range(1, block.widths.neurons, 2)) for block in units]}
    if widths.groups > 1:
        found["a KV group"] = [_but(block.widths, groups=range(1, block.widths.groups)) for block in units]
    if widths.heads_per_group > 1:
        found["a query head of each KV group"] = [_but(block.widths, first_head=1) for block in units]
    found["the attentions"] = [_but(block.widths, groups=()) for block in units]
    found["the MLPs"] = [_but(block.widths, neurons=()) for block in units]
    found["the first block"] = [BlockShape((), (), ()), *(block.widths.whole for block in units[1:])]
    return found


def _but(
    widths: BlockWidths,
    *,
    groups: Sequence[int] | None = None,
    first_head: int = 0,
    neurons: Sequence[int] | None = None,
) -> BlockShape:
    """A whole block but for these."""
    per_group = widths.heads_per_group
    kept = range(widths.groups) if groups is None else groups
    heads = [group * per_group + head for group in kept for head in range(first_head, per_group)]
    return replace(
        widths.whole,
        groups=tuple(kept),
        heads=tuple(heads),
        neurons=widths.whole.neurons if neurons is None else tuple(neurons),
    )


@contextmanager
def _zeros(units: Sequence[BlockUnits], blocks: Sequence[BlockShape]) -> Iterator[None]:
    """Inside, what goes gives zeros to the matrix that reads it, and a part of which nothing stays writes zeros."""
    with ExitStack() as stack:
        for block, shape in zip(units, blocks, strict=True):
            attention = block.attention.columns(shape.heads)
            for bound, kept in ((block.attention.output, attention), (block.mlp.output, shape.neurons)):
                hook = partial(_masked_input, bound, kept)
                stack.callback(bound.module.register_forward_pre_hook(hook).remove)
                if not kept:
                    stack.callback(bound.module.register_forward_hook(_no_output).remove)
        yield


def _masked_input(bound: SiteModule, kept: Sequence[int], module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    mask = torch.zeros(bound.site.in_features, dtype=torch.bool, device=args[0].device)
    mask[list(kept)] = True
    return (args[0].masked_fill(~mask, 0), *args[1:])


def _no_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return torch.zeros_like(output)


def _logits(model: PreTrainedModel) -> Tensor:
    """[1, TOKENS, vocabulary] float32."""
    tokens = torch.arange(1, TOKENS + 1, device=model.device)[None]
    found: Tensor = model(input_ids=tokens, use_cache=False).logits
    return found.float()


def _cached(model: PreTrainedModel) -> Tensor | None:
    """[1, 1, vocabulary] float32, logits of the last token with the others in a cache; None if the model keeps none."""
    tokens = torch.arange(1, TOKENS + 1, device=model.device)[None]
    past = getattr(model(input_ids=tokens[:, :-1], use_cache=True), "past_key_values", None)
    if past is None:
        return None
    found: Tensor = model(input_ids=tokens[:, -1:], past_key_values=past, use_cache=True).logits
    return found.float()


def _distance(found: Tensor, expected: Tensor) -> float:
    """Length of the difference, of the length of what is expected."""
    return float((found - expected).norm() / expected.norm())


def _tolerance(model: PreTrainedModel) -> float:
    return max(TOLERANCE, ROUNDINGS * torch.finfo(model.dtype).eps)


def _in_order(model: PreTrainedModel, attention: AttentionUnits) -> bool:
    """Whether the rows of a fused matrix are all queries, then all keys, then all values.

    Without those that should then be the first value, the columns of its query heads in the output projection read
    zeros, and all others what they did.
    """
    seen: list[Tensor] = []
    ((start, *_),) = (rows[-attention.head_dim :] for rows in attention.rows([0], []))
    columns = attention.head_dim * (attention.heads // attention.groups)

    def without_value(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        changed = output.clone()
        changed[..., start : start + attention.head_dim] = 0
        return changed

    with ExitStack() as stack:
        reads = attention.output.module.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
        stack.callback(reads.remove)
        _logits(model)
        stack.callback(attention.inputs[0].module.register_forward_hook(without_value).remove)
        _logits(model)
    before, after = seen
    return torch.allclose(before[..., columns:], after[..., columns:]) and not after[..., :columns].any()
