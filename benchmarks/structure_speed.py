"""What cutting gains: masked against compact models, prefill and evaluation; and predicted against measured latency.

The same half of all heads and neurons goes as zeros, and as rows and columns. Operations are counted as
`evoprune.fitness.unit_costs` counts them; the ratio of times is held against their ratio on the reference model, and
against 1.5 on a random Llama of hidden size 1,024 with four blocks. Predictions are sums of a table of parts, of random
shapes and of the whole model. Everything takes turns, medians of 20 count, and one thread: times are those that it was
at work, so that the load of the machine, which the details have, matters less.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from evoprune.fitness.adapters import list_sites
from evoprune.fitness.context import EvaluationContext
from evoprune.fitness.latency import median_times
from evoprune.fitness.latency_measure import measure_beside
from evoprune.fitness.latency_passes import Work, whole_pass
from evoprune.fitness.models import LanguageModel, load_model
from evoprune.fitness.prepare import prepare
from evoprune.fitness.surgeon import Surgeon
from evoprune.fitness.teacher import linear_head, window_losses
from evoprune.fitness.unit_costs import kept_by, unit_costs
from evoprune.fitness.units import BlockUnits, find_units
from evoprune.metrics.shape import BlockShape
from figure import Figure

WINDOWS = 4
SHAPES = 20


def wide_model() -> LanguageModel:
    """A random Llama of hidden size 1,024 with four blocks."""
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=4096,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    tokenizer = load_model("reference").tokenizer
    return LanguageModel(model, tokenizer, tuple(list_sites(model)), "random-1024", "random-1024")


def half(units: list[BlockUnits]) -> list[BlockShape]:
    """Half of the query heads and of the neurons of every block: one of every two heads where groups have several."""
    shapes = []
    for block in units:
        widths = block.widths
        groups, each = widths.groups, widths.heads_per_group
        kept = (groups, each // 2) if each > 1 else (groups // 2, each)
        shapes.append(widths.first(*kept, widths.neurons // 2))
    return shapes


def alternating(
    language_model: LanguageModel, shape: list[BlockShape], run: Callable[[], Any]
) -> tuple[float, dict[str, Any]]:
    """Time of the masked model / that of the compact one, and both."""
    surgeon = Surgeon(language_model, find_units(language_model))

    def ready(cut: Callable[[list[BlockShape]], None]) -> Callable[[], Any]:
        cut(shape)
        run()
        return run

    masked, compact = median_times(
        [partial(ready, surgeon.masked), partial(ready, surgeon.apply)], language_model.device
    )
    surgeon.restore()
    return masked / compact, {"masked ms": masked / 1e6, "compact ms": compact / 1e6, "load": os.getloadavg()}


def counted(language_model: LanguageModel, shape: list[BlockShape], work: Work) -> float:
    """The ratio of operations."""
    costs = unit_costs(language_model, "flops", batch=work.batch, sequence=work.sequence)
    return (costs.rest + costs.dense) / (costs.rest + costs.of([kept_by(block) for block in shape]))


def evaluation(language_model: LanguageModel) -> tuple[Callable[[], Any], Work]:
    """The KL of a candidate on some windows of text B, and the pass that it takes."""
    context = EvaluationContext(rungs=(WINDOWS,), calibration_sequences=8)
    windows, teacher = prepare(language_model, context).text("search")
    head = linear_head(language_model.model, windows)
    run = partial(window_losses, language_model.model, head, windows[:WINDOWS], teacher and teacher[:WINDOWS])
    return run, Work(WINDOWS, context.window)


def predictions(language_model: LanguageModel, work: Work) -> dict[str, Any]:
    """|predicted / measured - 1| of random shapes, and predicted / measured of the whole model."""
    units, rng = find_units(language_model), random.Random(0)
    ladders = [range(step := block.widths.neurons // 32, block.widths.neurons, step) for block in units]
    shapes = [[block.widths.whole for block in units]]
    for _ in range(SHAPES):
        shapes.append(
            [
                block.widths.first(
                    rng.randint(1, block.widths.groups),
                    rng.randint(1, block.widths.heads_per_group),
                    rng.choice(ladder),
                )
                for block, ladder in zip(units, ladders, strict=True)
            ]
        )
    neurons = [list(ladder) for ladder in ladders]
    table, measured = measure_beside(language_model, units, neurons, work, shapes)
    costs = table.costs
    whole, *others = (
        (costs.rest + costs.of([kept_by(block) for block in shape])) / taken
        for shape, taken in zip(shapes, measured, strict=True)
    )
    gaps = sorted(abs(ratio - 1) for ratio in others)
    return {
        "median gap": median(gaps),
        "largest gap": gaps[-1],
        "within 10 %": sum(gap <= 0.1 for gap in gaps) / len(gaps),
        "median of predicted / measured": median(others),
        "whole model": whole,
        "load": os.getloadavg(),
    }


@torch.no_grad()
def measure() -> list[Figure]:
    torch.set_num_threads(1)
    reference, wide = load_model("reference"), wide_model()
    figures = []
    run, work = evaluation(reference)
    shape, prefill = half(find_units(reference)), Work(1, 512)
    for what, of, its in (
        ("prefill of 512 tokens", whole_pass(reference, prefill)(), prefill),
        (f"KL on {WINDOWS} windows of 256 tokens", run, work),
    ):
        ratio, details = alternating(reference, shape, of)
        operations = counted(reference, shape, its)
        figures.append(
            Figure(
                f"masked / compact time at half, over the ratio of operations: {what}, reference model",
                ratio / operations,
                0.85,
                False,
                {"times": ratio, "operations": operations, **details},
            )
        )
    shape = half(find_units(wide))
    ratio, details = alternating(wide, shape, whole_pass(wide, prefill)())
    operations = counted(wide, shape, prefill)
    figures.append(
        Figure(
            "masked / compact time at half: prefill of 512 tokens, random Llama of hidden size 1,024",
            ratio,
            1.5,
            False,
            {"operations": operations, **details},
        )
    )
    for what, model, passes in (
        ("prefill, reference model", reference, prefill),
        ("decoding, reference model", reference, Work(1, 511, decode=True)),
    ):
        found = predictions(model, passes)
        line = f"predicted against measured latency, median gap of {SHAPES} shapes: {what}"
        figures.append(Figure(line, found["median gap"], 0.1, details=found))
    return figures
