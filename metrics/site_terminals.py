"""The leaves of allocation formulas: one number for each matrix of a model.

The matrices stand in model order, like the columns of a matrix with one row, so that the operators of the metric
language mean here what they mean there: ``zsn_t`` standardises over all matrices, ``tmax`` is the largest of them.
What is measured comes from `evoprune.fitness.site_statistics`; the rest follows from the shapes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from evoprune.metrics.records import Site, is_attention
from evoprune.metrics.terminals import TERMINALS, Cost, Terminal
from evoprune.metrics.types import ANY, NONNEGATIVE, POSITIVE, Sign, Type


def _site_terminals() -> dict[str, Terminal]:
    rows: list[tuple[str, Cost, Sign, str, str]] = [
        ("position", "none", NONNEGATIVE, "p", "relative depth of the block, 0 to 1"),
        ("first", "none", NONNEGATIVE, r"[\mathrm{first}]", "1 in the first block, 0 elsewhere"),
        ("last", "none", NONNEGATIVE, r"[\mathrm{last}]", "1 in the last block, 0 elsewhere"),
        ("attention", "none", NONNEGATIVE, r"[\mathrm{attention}]", "1 in an attention, 0 elsewhere"),
        ("mlp", "none", NONNEGATIVE, r"[\mathrm{mlp}]", "1 in an MLP, 0 elsewhere"),
        ("share", "none", POSITIVE, "w", "weights of the matrix, in units of the mean over matrices"),
        ("fan_in", "none", NONNEGATIVE, r"\log n_\mathrm{in}", "log of the number of inputs"),
        ("fan_out", "none", NONNEGATIVE, r"\log n_\mathrm{out}", "log of the number of outputs"),
        ("weight_rms", "none", NONNEGATIVE, r"\mathrm{rms}(W)", "root mean square of the weights"),
        ("tail", "none", POSITIVE, r"\alpha", "exponent of the tail of the matrix's spectrum"),
        ("tail_block", "none", POSITIVE, r"\alpha_b", "mean over the block of exponents of spectra (AlphaPruning)"),
        ("input_rms", "forward", NONNEGATIVE, r"\mathrm{rms}(X)", "root mean square of the norms of inputs"),
        ("score_mean", "forward", ANY, r"\overline{S}", "mean of the scores of the criterion inside"),
        ("outliers", "forward", NONNEGATIVE, "o", "share of the matrix's scores above 5 times their mean"),
        ("outliers_block", "forward", NONNEGATIVE, "o_b", "share of the block's scores above 5 times their mean (OWL)"),
        ("logvar", "forward", NONNEGATIVE, "v", "variance of the log of the matrix's scores"),
        ("logvar_block", "forward", NONNEGATIVE, "v_b", "variance of the log of the block's scores (DSA)"),
        ("error", "forward", NONNEGATIVE, "e", "relative output error at the target, by the inputs' norms"),
        ("diversity", "forward", NONNEGATIVE, r"\delta", "1 - mean cosine between output tokens (TAMP)"),
        ("influence", "forward", NONNEGATIVE, r"\iota", "1 - mean cosine of the block's input and output (ShortGPT)"),
        ("ablation", "forward", ANY, r"\ell", "loss on text B without the block, in nats (Shortened LLaMA)"),
    ]
    return {name: Terminal(name, Type.INVEC, cost, sign, latex, what) for name, cost, sign, latex, what in rows}


SITE_TERMINALS = _site_terminals()

ALL_TERMINALS = {**TERMINALS, **SITE_TERMINALS}
"""Of metrics and of allocation formulas; no name is in both."""


def structure(sites: Sequence[Site]) -> dict[str, list[float]]:
    """The terminals that follow from the shapes alone, by name; one number per site."""
    mean = sum(site.weights for site in sites) / len(sites)
    of_site = {
        "position": lambda site: site.depth,
        "first": lambda site: float(site.block == 0),
        "last": lambda site: float(site.block == site.n_blocks - 1),
        "attention": lambda site: float(is_attention(site.kind)),
        "mlp": lambda site: float(not is_attention(site.kind)),
        "share": lambda site: site.weights / mean,
        "fan_in": lambda site: math.log(site.in_features),
        "fan_out": lambda site: math.log(site.out_features),
    }
    return {name: [number(site) for site in sites] for name, number in of_site.items()}
