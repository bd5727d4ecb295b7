"""(a) One new candidate at full fidelity (masks, forward pass, KL) over a plain dense forward pass with cross-entropy.

Exactly 4,096 tokens, float32, one thread, the two in turn, median of seven.
"""

from __future__ import annotations

import statistics
import time

import torch

from evoprune.fitness.objectives import OBJECTIVES
from evoprune.fitness.samples import n_tokens
from evoprune.metrics.criterion import Metric
from evoprune.metrics.mask import MAX_TIED_ROWS
from figure import Figure
from shared import reference_worker

TURNS = 7
WINDOWS = 16
WINDOW = 256


def measure() -> Figure:
    _, evaluator, _ = reference_worker(rungs=(WINDOWS,), window=WINDOW)
    model, windows = evaluator.language_model.model, evaluator.windows[:WINDOWS]
    assert n_tokens(windows) == 4096
    kl = OBJECTIVES["kl"]
    plain, candidate = [], []
    for turn in range(TURNS + 1):
        evaluator.restore()
        began = time.perf_counter()
        with torch.no_grad():
            model(input_ids=windows, labels=windows, use_cache=False).loss.item()
        middle = time.perf_counter()
        # Another exponent each turn: a new candidate, not a remembered one.
        metric = Metric.from_text(f"mul(abs(W),mul(powc(X_l2,{0.7 + turn / 50}),powc(G_l2,{0.3 + turn / 50})))")
        evaluator.evaluate(metric, kl, (WINDOWS,), (), MAX_TIED_ROWS)
        if turn:
            plain.append(middle - began)
            candidate.append(time.perf_counter() - middle)
    ratios = [c / p for c, p in zip(candidate, plain, strict=True)]
    return Figure(
        "(a) candidate at full fidelity / plain forward with cross-entropy, 4,096 tokens",
        statistics.median(ratios),
        1.20,
        details={"plain_seconds": plain, "candidate_seconds": candidate},
    )
