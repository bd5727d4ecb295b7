"""Time to the final fitness of a straightforward EvoPress loop, seeds 0 to 2, over the time of that loop.

The loop is the published one on the same model, texts, stages and number of offspring: it starts from uniform sparsity,
trades levels of a 32nd between matrices of one size, keeps model, teacher and every level of every matrix in memory,
writes the matrices that changed, and runs every candidate in full. Ours asks its allocators first, which counts. The
fitness is the divergence from the dense model on all search text, measured outside the clock. Both run in this process
on one thread; times are of the processor.
Source: Sieberling et al. 2025 (EvoPress, arXiv:2410.14649), section 3.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from evoprune.fitness.allocation_worker import AllocationWorker
from evoprune.fitness.level_evaluator import LevelEvaluator
from evoprune.fitness.teacher import window_losses
from evoprune.search.allocation_run import AllocationRun
from evoprune.search.config import resolve_as
from evoprune.search.config_allocation import AllocationSearchConfig
from evoprune.search.loop import Budget
from evoprune.search.progress import Progress
from evoprune.search.rundir import RunDirectory
from evoprune.search.worker_session import Resources
from figure import Figure
from shared import Resident

SEEDS = (0, 1, 2)
GENERATIONS = 15
STEPS = 32
"""Levels of the published loop, from dense to nearly empty."""

Levels = tuple[int, ...]


def measure() -> Figure:
    runs, ratios = [], []
    for seed in SEEDS:
        config = resolve_as(
            AllocationSearchConfig,
            overrides={"seed": seed, "evaluations": 10_000, "data.heldout_windows": 16},
        )
        torch.set_num_threads(config.threads)
        worker = AllocationWorker(config.context())
        with tempfile.TemporaryDirectory() as scratch:
            trail, evaluator = _ours(config, worker, Path(scratch) / "run")
            windows = config.searcher.windows
            naive_seconds, naive_kl = _naive(config, evaluator, random.Random(seed))
            reached = best = float("inf")
            for seconds, levels in trail:
                names = [site.name for site in evaluator.sites]
                kl = evaluator.evaluate(dict(zip(names, levels, strict=True)), 0, windows).kl
                assert kl is not None
                best = min(best, kl.mean().item())
                if best <= naive_kl:
                    reached = min(reached, seconds)
        ratios.append(reached / naive_seconds)
        runs.append(
            {
                "seed": seed,
                "naive_seconds": naive_seconds,
                "naive_kl": naive_kl,
                "seconds": reached,
                "all_seconds": trail[-1][0],
                "best_kl": best,
            }
        )
    return Figure(
        "time to the final fitness of a plain EvoPress loop / its time, median of 3 seeds",
        statistics.median(ratios),
        1 / 3,
        details={"runs": runs},
    )


def _ours(
    config: AllocationSearchConfig, worker: AllocationWorker, folder: Path
) -> tuple[list[tuple[float, list[int]]], LevelEvaluator]:
    """([seconds and levels of each parent], the worker's evaluator) of a search of `GENERATIONS`."""
    run = RunDirectory.create("allocation", config.model_dump(mode="json"), {}, run_dir=folder)
    try:
        with Progress(title="") as progress:
            session = AllocationRun(run, config, Resources(executor="inline"), progress)
            executor = Resident(worker)
            prepared = session.prepare(worker.handle, executor.ask)
            began = time.process_time()
            search = session.build_search(prepared, executor.ask)
            loop = session.build_loop(search, executor)
            trail: list[tuple[float, list[int]]] = []

            def over() -> bool:
                if search.best is not None:
                    levels = search.space.levels(search.best.genome)
                    if not trail or trail[-1][1] != levels:
                        trail.append((time.process_time() - began, levels))
                return search.generation > GENERATIONS

            loop.run(Budget(None, expired=over))
            return trail, worker.evaluator(search.payload)
    finally:
        run.close()


def _naive(config: AllocationSearchConfig, evaluator: LevelEvaluator, draw: random.Random) -> tuple[float, float]:
    """(seconds, fitness of the last parent) of the published loop."""
    evaluator.restore()
    bound = {entry.site.name: entry for entry in evaluator.language_model.sites}
    ladders: list[list[Tensor]] = []
    names = [site.name for site in evaluator.sites]
    for name in names:
        ladder = []
        for step in range(STEPS):
            evaluator.apply({name: 256 * step // STEPS})
            ladder.append(bound[name].weight().clone())
        ladders.append(ladder)
    evaluator.restore()
    alike = [
        [at for at, other in enumerate(evaluator.sites) if (other.out_features, other.in_features) == shape]
        for shape in sorted({(site.out_features, site.in_features) for site in evaluator.sites})
    ]
    model = evaluator.language_model.model
    resident = [-1] * len(names)

    @torch.no_grad()
    def fitness(levels: Levels, first: int, last: int) -> float:
        for at, level in enumerate(levels):
            if resident[at] != level:
                bound[names[at]].weight().copy_(ladders[at][level])
                resident[at] = level
        assert evaluator.teacher is not None
        teacher = evaluator.teacher[slice(first, last)]
        kl = window_losses(model, evaluator.head, evaluator.windows[first:last], teacher).kl
        assert kl is not None
        return kl.mean().item()

    began = time.process_time()
    parent = tuple(_rounded(config.target.sparsity * STEPS, alike, len(names)))
    for _ in range(GENERATIONS):
        pool: set[Levels] = set()
        while len(pool) < config.searcher.offspring:
            child = list(parent)
            for _ in range(min(draw.randint(1, 3), draw.randint(1, 3))):
                group = draw.choice([places for places in alike if len(places) > 1])
                more, less = draw.sample(group, 2)
                if child[more] + 1 < STEPS and child[less] > 0:
                    child[more] += 1
                    child[less] -= 1
            if tuple(child) != parent:
                pool.add(tuple(child))
        survivors = sorted(pool)
        for stage in config.searcher.stages:
            if stage.survivors == 1:
                survivors.append(parent)
            first = draw.randint(0, config.searcher.windows - stage.windows)
            scored = sorted((fitness(levels, first, first + stage.windows), levels) for levels in survivors)
            survivors = [levels for _, levels in scored[: stage.survivors]]
        (parent,) = survivors
    seconds = time.process_time() - began
    kl = fitness(parent, 0, config.searcher.windows)
    fitness((0,) * len(names), 0, 1)  # dense, as the evaluator believes
    return seconds, kl


def _rounded(level: float, alike: Sequence[Sequence[int]], count: int) -> list[int]:
    """Levels nearest to `level` whose mean over matrices of one size is nearest to it."""
    levels = [0] * count
    for places in alike:
        upper = round(level * len(places)) - int(level) * len(places)
        for number, at in enumerate(places):
            levels[at] = int(level) + (number < upper)
    return levels
