"""Level vectors on the reference model: size of the database, cost of a switch, cost of a candidate with its parent.

4,096 tokens in windows of 256, float32, one thread. Times are of the processor, not of the clock: what else runs on the
machine does not count. The baseline is the faster of two dense forward passes with cross-entropy on the same tokens:
transformers' own, and the one in chunks that candidates are measured with.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from evoprune.fitness.level_evaluator import LevelEvaluator
from evoprune.fitness.levels import ResidentLevels, build_levels
from evoprune.fitness.prepare import Prepared
from evoprune.fitness.teacher import window_losses
from evoprune.metrics.criterion import CRITERIA
from figure import Figure
from shared import reference_worker

WINDOWS, WINDOW = 16, 256
CANDIDATES = 60
LEVEL = 154  # 60 %


def mutated(parent: dict[str, int], draw: random.Random) -> dict[str, int]:
    """A child by level switches: allocation search, sections 1.2 and 2.1."""
    child = dict(parent)
    for _ in range(min(draw.randint(1, 3), draw.randint(1, 3))):
        less, more = draw.sample(list(child), 2)
        child[less] -= 1
        child[more] += 1
    return child


def seconds(work: Callable[[], object]) -> float:
    """Processor time of one call."""
    began = time.process_time()
    work()
    return time.process_time() - began


def measure() -> list[Figure]:
    worker, _, name = reference_worker(rungs=(WINDOWS,), window=WINDOW)
    prepared = Prepared.open(name)
    language_model = worker.language_model
    model = language_model.model
    windows, teacher = prepared.text("search")
    assert windows.numel() == 4096
    database = build_levels(prepared, CRITERIA["wanda"], "wanda")
    size = sum(file.stat().st_size for file in database.folder.iterdir())

    resident = ResidentLevels(language_model, prepared.dense, database)
    names = [site.name for site in prepared.sites]
    parent = dict.fromkeys(names, LEVEL)
    resident.apply(parent)
    # Each but the first writes two matrices: the one before goes back.
    switches = [seconds(partial(resident.apply, {**parent, changed: LEVEL + 1})) / 2 for changed in names][1:]
    resident.restore()

    evaluator = LevelEvaluator(language_model, prepared.dense, database, windows, teacher)

    def plain() -> None:
        with torch.no_grad():
            model(input_ids=windows, labels=windows, use_cache=False).loss.item()

    def chunked() -> None:
        window_losses(model, evaluator.head, windows, None)

    draw = random.Random(0)
    evaluator.adopt(parent, 0, WINDOWS)
    times: dict[str, list[float]] = {"plain": [], "chunked": [], "candidate": [], "candidate in full": []}
    for _ in range(CANDIDATES):
        child = mutated(parent, draw)
        times["candidate"].append(seconds(partial(evaluator.evaluate, child, 0, WINDOWS)))
        if len(times["plain"]) < CANDIDATES // 4:
            times["plain"].append(seconds(plain))
            times["chunked"].append(seconds(chunked))
    evaluator.prefix.clear()
    for _ in range(CANDIDATES // 4):
        child = mutated(parent, draw)
        times["candidate in full"].append(seconds(partial(evaluator.evaluate, child, 0, WINDOWS)))
    evaluator.restore()
    baseline = min(statistics.median(times["plain"]), statistics.median(times["chunked"]))
    return [
        Figure("level database, bytes per weight", size / sum(site.weights for site in prepared.sites), 1.1),
        Figure(
            "switching one level / dense forward with cross-entropy, 4,096 tokens",
            statistics.mean(switches) / baseline,
            0.05,
            details={"switch_seconds": switches},
        ),
        Figure(
            "mean level candidate from its parent's prefix / dense forward with cross-entropy, 4,096 tokens",
            statistics.mean(times["candidate"]) / baseline,
            0.80,
            details=times,
        ),
    ]
