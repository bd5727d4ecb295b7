"""Level vectors on the reference model: size of the database, cost of a switch, cost of a candidate with its parent.

4,096 tokens in windows of 256, float32, one thread. Times are of the processor, not of the clock: what else runs on the
machine does not count. The baseline is transformers' own dense forward pass with cross-entropy on the same tokens, all
at once or in the batches that candidates run in, whichever is faster. The details of the last figure also compare with
our own dense pass, whose logits are made a piece at a time: what that leaves is what prefixes save.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

import torch

from evoprune.fitness.level_evaluator import LevelEvaluator
from evoprune.fitness.levels import build_levels
from evoprune.fitness.prepare import Prepared
from evoprune.fitness.resident_levels import ResidentLevels
from evoprune.fitness.samples import n_tokens
from evoprune.fitness.teacher import BATCH, window_losses
from evoprune.metrics.criterion import CRITERIA
from evoprune.search.spaces.levels import LevelSpace
from figure import Figure
from shared import reference_worker

WINDOWS, WINDOW = 16, 256
CANDIDATES = 60
SPARSITY = 0.6


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
    assert n_tokens(windows) == 4096
    database = build_levels(prepared, CRITERIA["wanda"], "wanda")
    size = sum(file.stat().st_size for file in database.folder.iterdir())

    resident = ResidentLevels(language_model, prepared.dense, database)
    names = [site.name for site in prepared.sites]
    space = LevelSpace(prepared.sites, SPARSITY)
    draw = random.Random(0)
    uniform = space.near([SPARSITY] * len(names), draw)

    def children() -> Iterator[dict[str, int]]:
        """Children of the uniform allocation, as evolution breeds them."""
        while True:
            if (child := space.switched(uniform, draw, space.spans)) is not None:
                yield dict(zip(names, space.levels(child), strict=True))

    parent = dict(zip(names, space.levels(uniform), strict=True))
    resident.apply(parent)
    # Each but the first writes two matrices: the one before goes back.
    moved = [{**parent, changed: parent[changed] + 1} for changed in names]
    switches = [seconds(partial(resident.apply, levels)) / 2 for levels in moved][1:]
    resident.restore()

    evaluator = LevelEvaluator(language_model, prepared.dense, database, windows, teacher)

    def plain(batch: int) -> None:
        with torch.no_grad():
            for first in range(0, WINDOWS, batch):
                part = windows[first : first + batch]
                model(input_ids=part, labels=part, use_cache=False).loss.item()

    work: dict[str, Callable[[], object]] = {
        "plain": partial(plain, WINDOWS),
        "plain in batches": partial(plain, BATCH),
        "in pieces": partial(window_losses, model, evaluator.head, windows, None),
    }
    times: dict[str, list[float]] = {name: [] for name in (*work, "candidate", "candidate in full")}
    evaluator.adopt(parent, 0, WINDOWS)
    for number, child in enumerate(islice(children(), CANDIDATES)):
        times["candidate"].append(seconds(partial(evaluator.evaluate, child, 0, WINDOWS)))
        if number % 4 == 0:
            for name, run in work.items():
                times[name].append(seconds(run))
    evaluator.prefix.clear()
    for child in islice(children(), CANDIDATES // 4):
        times["candidate in full"].append(seconds(partial(evaluator.evaluate, child, 0, WINDOWS)))
    evaluator.restore()
    baseline = min(statistics.median(times[name]) for name in ("plain", "plain in batches"))
    candidate = statistics.mean(times["candidate"])
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
            candidate / baseline,
            0.80,
            details={**times, "against our own dense pass": candidate / statistics.median(times["in pieces"])},
        ),
    ]
