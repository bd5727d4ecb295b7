"""Removal orders in rounds against one column at a time: time, and output error at equal widths.

The layer is 4,096 inputs wide with 2,048 outputs: inputs of a decaying spectrum in a random basis, four of them ten
times as loud, 16,384 tokens, float32, one thread. There are two baselines, both of which score all columns at every
step, take the cheapest, and update all weights and the whole inverse in place: the loop of the papers on a weight as
layers hold it, and the same on one that is held by columns, of which nothing is left to win but memory's speed. Steps
cost the same throughout, so that some of them are timed and the rest is extrapolated. The third ratio is that of the
whole database of the layer, the factor for all widths in float64 too, to the first baseline. Errors are compared on a
layer of 1,024 inputs and on all MLPs of the reference model, where both run in full, at every sixteenth of the width.
The last figure is the second ratio on these MLPs, whose loops run in full; its details also have the time of the whole
database. Times are of the processor, not of the clock.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from evoprune.fitness.context import EvaluationContext
from evoprune.fitness.models import load_model
from evoprune.fitness.prepare import calibration_windows
from evoprune.fitness.refit import Factor, zero_error
from evoprune.fitness.removal_order import Problem, column_order
from evoprune.fitness.structure_build import build_structure_database
from evoprune.fitness.structure_database import read_block
from evoprune.fitness.units import find_units
from figure import Figure

WIDTH, NARROW = 4096, 1024
STEPS = 24
TURNS = 3


def seconds(work: Callable[[], object]) -> float:
    """Processor time of one call."""
    began = time.process_time()
    work()
    return time.process_time() - began


def layer(width: int) -> Problem:
    """A synthetic layer with half as many outputs as inputs."""
    draw = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(width, width, generator=draw)).Q
    spectrum, loud = torch.arange(1, width + 1) ** -0.4, torch.ones(width)
    loud[torch.randperm(width, generator=draw)[:4]] = 10
    gram = torch.zeros(width, width)
    for _ in range(4):
        inputs = torch.randn(width, width, generator=draw) * spectrum @ basis.T * loud
        gram.addmm_(inputs.T, inputs)
    spread = torch.exp(0.3 * torch.randn(width, generator=draw))
    return Problem.of(torch.randn(width // 2, width, generator=draw) * spread / width**0.5, gram)


def one_at_a_time(problem: Problem, steps: int, *, by_column: bool = True) -> Callable[[], list[int]]:
    """The loop with its inverse ready; what is returned runs `steps` of it and gives the columns that went.

    Args:
        by_column: the weight is held as [in, out], and not as [out, in].
    """
    weight, inverse = problem.weight.clone(), torch.cholesky_inverse(problem.factor)
    barred = torch.zeros(len(inverse))
    columns = weight.T.contiguous() if by_column else weight.T

    def run() -> list[int]:
        order = []
        for _ in range(steps):
            norms = torch.linalg.vector_norm(columns, dim=1).square() if by_column else weight.square().sum(0)
            at = int((norms / inverse.diagonal() + barred).argmin())
            row: Tensor = inverse[at].clone()
            pivot = row[at].item()
            columns.addr_(row, columns[at].clone(), alpha=-1 / pivot)
            inverse.addr_(row, row, alpha=-1 / pivot)
            inverse[at, at], barred[at] = 1, float("inf")
            order.append(at)
        return order

    return run


def inverted(problem: Problem) -> float:
    """Processor time of the inverse that the loop begins with."""
    return seconds(partial(torch.cholesky_inverse, problem.factor))


def excess(problem: Problem) -> list[float]:
    """Error of the order in rounds / that of one column at a time, at every sixteenth of the width."""
    total = zero_error(problem)
    rounds, single = (
        Factor.of(problem, order.flip(0)).errors(total) for order in (column_order(problem), column_order(problem, 0))
    )
    sixteenth = len(problem.hessian) // 16
    return (rounds / single)[sixteenth : 16 * sixteenth : sixteenth].tolist()


def reference() -> tuple[float, float, float, list[list[float]]]:
    """Of the reference model: seconds of the whole database, of its orders of neurons, of the loops; and errors."""
    context = EvaluationContext()
    language_model = load_model("reference")
    units = find_units(language_model)
    windows = calibration_windows(language_model, context)
    # A cache of its own: a database that is there already would take no time.
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, {"EVOPRUNE_CACHE": str(Path(folder))}):
        began = time.process_time()
        database = build_structure_database(language_model, units, windows, mode="dense")
        whole = time.process_time() - began
        ours, loops, errors = 0.0, 0.0, []
        for block, name in zip(units, database.manifest["blocks"], strict=True):
            stored = read_block(name)["mlp"]
            back = stored["order"].argsort()
            problem = Problem.of(block.mlp.output.weight(), (stored["lower"] @ stored["lower"].T)[back][:, back])
            ours += seconds(partial(column_order, problem))
            loops += inverted(problem) + seconds(one_at_a_time(problem, block.mlp.neurons))
            errors.append(excess(problem))
    return whole, ours, loops, errors


@torch.no_grad()
def measure() -> list[Figure]:
    torch.set_num_threads(1)
    wide = layer(WIDTH)
    turns = []
    for _ in range(TURNS):
        start, ours = inverted(wide), seconds(partial(column_order, wide))
        factor = seconds(partial(Factor.of, wide, torch.arange(WIDTH)))
        steps = (seconds(one_at_a_time(wide, STEPS, by_column=held)) / STEPS for held in (False, True))
        plain, by_column = (start + WIDTH * step for step in steps)
        turns.append((plain / ours, by_column / ours, plain / (ours + factor), ours))
    plain, by_column, database = (sorted(turn[which] for turn in turns)[TURNS // 2] for which in range(3))
    errors = excess(layer(NARROW))
    whole, ours, loops, real = reference()
    what = "removing 4,096 columns one at a time (extrapolated) / in rounds, processor time"
    error = "output error of rounds / of one column at a time, worst of 15 widths"
    return [
        Figure(what, plain, 20.0, False, {"as layers hold it, by column, database, seconds of rounds": turns}),
        Figure(f"{what}, the loop laid out for speed", by_column, 7.5, False),
        Figure("the same as layers hold it / rounds and the factor for all widths", database, 15.0, False),
        Figure(error, max(errors), 1.03, details={"at every sixteenth": errors}),
        Figure(f"{error}, MLPs of the reference model", max(map(max, real)), 1.03, details={"by block": real}),
        Figure(
            "neurons of the reference model one at a time / in rounds, processor time",
            loops / ours,
            1.0,
            False,
            {"seconds of the whole database": whole, "rounds": ours, "loops": loops},
        ),
    ]
