"""The leaves of the language: the statistics that a metric may read.

Source: symbolic pruning metrics, section 2.1; for norms by modality multimodal allocation, section 5.5 (4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from evoprune.metrics.types import ANY, NONNEGATIVE, POSITIVE, Sign, Type

Cost = Literal["none", "forward", "backward", "local", "hessian"]


@dataclass(frozen=True, slots=True)
class Terminal:
    """A named statistic of one site.

    Attributes:
        type: what it varies with, hence its shape.
        cost: the pass that computes it: none (known without data), forward, backward, local (a backward pass inside
            each block) or hessian (needs the Gram matrix of the inputs).
        sign: the signs it can take.
        latex: how it prints in a formula.
        meaning: its definition in words.
    """

    name: str
    type: Type
    cost: Cost
    sign: Sign
    latex: str
    meaning: str


def _terminals() -> dict[str, Terminal]:
    mat, invec, outvec, scal = Type.MAT, Type.INVEC, Type.OUTVEC, Type.SCAL
    rows: list[tuple[str, Type, Cost, Sign, str, str]] = [
        ("W", mat, "none", ANY, "W", "signed weight"),
        ("X_ss", invec, "forward", NONNEGATIVE, r"\lVert X\rVert_2^2", "mean over sequences of the sum of x squared"),
        ("X_l2", invec, "forward", NONNEGATIVE, r"\lVert X\rVert_2", "l2 norm of x over a sequence: root of X_ss"),
        ("X_l1", invec, "forward", NONNEGATIVE, r"\overline{|X|}", "token mean of |x|"),
        ("X_mean", invec, "forward", ANY, r"\overline{X}", "token mean of x"),
        ("X_var", invec, "forward", NONNEGATIVE, r"\operatorname{var}X", "population variance of x"),
        ("X_max", invec, "forward", NONNEGATIVE, r"\lVert X\rVert_\infty", "largest |x|"),
        ("X_gate_l2", invec, "forward", NONNEGATIVE, r"\lVert gX\rVert_2", "X_l2 weighted by the router gate"),
        (
            "X_v",
            invec,
            "forward",
            NONNEGATIVE,
            r"\lVert X_\mathrm{v}\rVert_2",
            "X_l2 over tokens of images and videos alone",
        ),
        ("X_l", invec, "forward", NONNEGATIVE, r"\lVert X_\mathrm{l}\rVert_2", "X_l2 over tokens of text alone"),
        ("Y_ss", outvec, "forward", NONNEGATIVE, r"\lVert Y\rVert_2^2", "mean over sequences of the sum of y squared"),
        ("Y_l2", outvec, "forward", NONNEGATIVE, r"\lVert Y\rVert_2", "l2 norm of y over a sequence: root of Y_ss"),
        ("G_l2", mat, "backward", NONNEGATIVE, r"\lVert G\rVert_2", "l2 norm over sequences of the loss gradient"),
        ("G_l1", mat, "backward", NONNEGATIVE, r"\lVert G\rVert_1", "l1 norm over sequences of the loss gradient"),
        ("G_mean", mat, "backward", ANY, r"\overline{G}", "mean over sequences of the loss gradient"),
        ("G_reg", mat, "local", NONNEGATIVE, r"\lVert G_b\rVert_2", "root mean square of the block-local gradient"),
        ("Hinv", invec, "hessian", POSITIVE, r"[H^{-1}]_{jj}", "diagonal of the inverse of the damped Hessian"),
        ("Hchol2", invec, "hessian", POSITIVE, r"U_{jj}^2", "squared diagonal of its upper Cholesky factor"),
        ("depth", scal, "none", NONNEGATIVE, "d", "relative depth of the block, 0 to 1"),
        ("n_in", scal, "none", NONNEGATIVE, r"\log n_\mathrm{in}", "log of the number of inputs"),
        ("n_out", scal, "none", NONNEGATIVE, r"\log n_\mathrm{out}", "log of the number of outputs"),
        ("sparsity", scal, "none", NONNEGATIVE, "s", "target sparsity of the matrix"),
    ]
    return {row[0]: Terminal(*row) for row in rows}


TERMINALS = _terminals()

# Terminals that a metric gets without any data.
FREE_TERMINALS = frozenset(name for name, terminal in TERMINALS.items() if terminal.cost == "none")
STATISTICS = frozenset(TERMINALS) - FREE_TERMINALS
