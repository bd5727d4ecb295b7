"""Adaptive multimodal input activation: the few tokens of a sample whose activations stand for all of them.

Source: Lee et al. 2025, TAMP, arXiv:2504.09897, and its released code; multimodal allocation chapter, section 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from evoprune.fitness.diversity import mean_term, token_diversity


@dataclass(frozen=True, slots=True)
class TokenChoice:
    """How tokens are chosen; the defaults are those of the released code, but for `min_tokens`, which is 1 there.

    Attributes:
        knn: neighbours that pass their attention to a token.
        message: how fast what they pass falls with their distance.
        penalty: how fast what a chosen token takes from its neighbours falls with their distance.
        eps: of the distance between chosen and all tokens at which choosing stops.
        min_tokens: choose at least so many, since three to seven, where it often stops, are few for a norm.
        max_tokens: choose at most so many; None sets no bound.
    """

    knn: int = 3
    message: float = 1.0
    penalty: float = 0.2
    eps: float = 0.1
    min_tokens: int = 32
    max_tokens: int | None = None


def select_tokens(
    outputs: Tensor, attention: Tensor, choice: TokenChoice | None = None, *, modality: Tensor | None = None
) -> Tensor:
    """The tokens of one sample that stand for all of it, in the order in which they are chosen.

    A token's worth is its attention and what its neighbours pass on; the worthiest is taken, its neighbours lose, and
    so on until the maximum mean discrepancy between the chosen and all tokens is small against their diversity.

    Args:
        outputs: [tokens, features] of the matrix, any float type.
        attention: [tokens] what the last token of the sample pays to each, mean over heads.
        choice: how; the defaults if None.
        modality: [tokens] int64; None if there is one only.

    Returns:
        [chosen] int64 indices, none twice. A sample with fewer tokens than `min_tokens` is chosen whole.

    The sums behind the discrepancy are carried along, so that a step takes time linear in the tokens.
    """
    choice = choice or TokenChoice()
    n = len(outputs)
    least, most = min(choice.min_tokens, n), min(choice.max_tokens or n, n)
    unit = torch.nn.functional.normalize(outputs.double(), dim=1)
    distance = (1 - unit @ unit.T).clamp_(min=0)
    # A token is no neighbour of itself, even where another is its equal.
    apart = distance.clone().fill_diagonal_(math.inf)
    neighbours = apart.argsort(dim=1, stable=True)[:, : min(choice.knn, n - 1)]
    near = distance.gather(1, neighbours)
    own = attention.double().to(outputs.device)
    worth = own + (torch.exp(-choice.message * near) * own[neighbours]).sum(1)
    kernel = torch.exp(-distance)
    columns, mean = kernel.mean(0), kernel.mean().item()
    terms = token_diversity(outputs, modality, "positive")
    threshold = choice.eps * math.sqrt(max(mean_term(list(terms.values())), 0.0)) if terms else math.inf
    chosen: list[int] = []
    among = torch.zeros_like(own)  # sums of the kernel between each token and the chosen ones
    inner = cross = 0.0
    while len(chosen) < most:
        best = int((worth == worth.max()).nonzero()[0])
        taken = max(worth[best].item(), 0.0)
        worth[neighbours[best]] -= torch.exp(-choice.penalty * near[best]) * taken
        chosen.append(best)
        worth[chosen] = worth.min() - 1
        inner += 2 * among[best].item() + kernel[best, best].item()
        cross += columns[best].item()
        among += kernel[best]
        size = len(chosen)
        if size >= least and mean + inner / size**2 - 2 * cross / size < threshold:
            break
    return torch.tensor(chosen, dtype=torch.int64, device=outputs.device)
