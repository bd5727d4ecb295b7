"""How much of what goes into a part of a model can be told from what comes out: canonical correlations.

Both sides are whitened, with a ridge; the singular values of what is left of their covariance are the correlations.
Source: Hotelling 1936; Hardoon, Szedmak and Shawe-Taylor 2004 (ridge); pruning operators, section 12.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from evoprune.fitness.block_hooks import hidden_output
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.samples import Batch, Sequences, forward_batches


def mean_canonical_correlation(inputs: Tensor, outputs: Tensor, *, ridge: float, top: int) -> float:
    """Mean of the largest canonical correlations of two sets of variables, in [0, 1].

    With S the covariances, damped by `ridge` times the mean of their diagonals, and S = L Lᵀ, they are the singular
    values of L_x⁻¹ S_xy L_y⁻ᵀ.

    Args:
        inputs: [tokens, n].
        outputs: [tokens, m], of the same tokens.
        ridge: 0 or more; above 0 unless there are more tokens than variables.
        top: so many correlations, or as many as there are.

    Returns:
        1 where one of the sides does not vary: nothing of it can be lost.
    """
    x, y = (side.double() - side.double().mean(0) for side in (inputs, outputs))
    covariances = [side.T @ side / len(side) for side in (x, y)]
    scales = [covariance.diagonal().mean() for covariance in covariances]
    if min(scales) <= 0:
        return 1.0
    factors = []
    for covariance, scale in zip(covariances, scales, strict=True):
        covariance.diagonal().add_(ridge * scale)
        factors.append(torch.linalg.cholesky(covariance))
    left = torch.linalg.solve_triangular(factors[0], x.T @ y / len(x), upper=False)
    white = torch.linalg.solve_triangular(factors[1], left.T, upper=False)
    return torch.linalg.svdvals(white)[:top].mean().clamp(0, 1).item()


@torch.no_grad()
def part_correlations(
    language_model: LanguageModel,
    parts: Mapping[str, nn.Module],
    text: Sequences,
    *,
    tokens: int,
    ridge: float,
    top: int,
    padded: bool = True,
) -> dict[str, float]:
    """`mean_canonical_correlation` between the input and the output of parts of a model, by their names.

    Args:
        parts: modules that run once in a forward pass; their inputs and outputs are in memory together.
        text: read from the beginning, until there are enough tokens.
        tokens: at most so many, padding aside.
        ridge, top: as of `mean_canonical_correlation`.
        padded: whether the parts see the tokens of the text, of which padding is left out; a tower sees others.
    """
    body = getattr(language_model.model, "base_model", language_model.model)
    heard: dict[str, tuple[list[Tensor], list[Tensor]]] = {name: ([], []) for name in parts}
    seen = 0
    for batch in forward_batches(text, 1, language_model.device):
        with _listening(parts, heard, batch if padded else replace(batch, keep=None)):
            body(**batch.inputs, use_cache=False)
        seen += batch.tokens
        if seen >= tokens:
            break
    found = {}
    for name in parts:
        inputs, outputs = (torch.cat(side)[:tokens] for side in heard.pop(name))
        found[name] = mean_canonical_correlation(inputs, outputs, ridge=ridge, top=top)
    return found


@contextmanager
def _listening(
    parts: Mapping[str, nn.Module], heard: Mapping[str, tuple[list[Tensor], list[Tensor]]], batch: Batch
) -> Iterator[None]:
    def listener(name: str) -> Any:
        def hear(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            for kept, value in zip(heard[name], (given, hidden_output(output)), strict=True):
                kept.append(batch.real(value))

        return hear

    handles: Iterable[Any] = [
        module.register_forward_hook(listener(name), with_kwargs=True) for name, module in parts.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
