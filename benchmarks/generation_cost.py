"""What a candidate of a real allocation search costs, stages and parents included, on one worker and on two.

Five generations of the default search on the reference model, seed 0, from two allocators. Counted is all that workers
do to answer: passes from the parent's prefix, passes in full, the parent's own passes, matrices rewritten. Divided by
what candidates are measured on: a child of the second stage on 16 windows, of which the first stage has read four; the
parent in the last stage only, where it competes. The baseline is transformers' own dense forward pass with
cross-entropy on as many tokens, in the batches that candidates run in or four times as many, whichever is faster,
measured between the jobs. The workers take jobs in turn, in this
process on one thread; times are of the processor.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from evoprune.fitness.allocation_worker import AllocationWorker
from evoprune.fitness.prepare import Prepared
from evoprune.fitness.teacher import BATCH
from evoprune.search.allocation_run import AllocationRun
from evoprune.search.config import resolve_as
from evoprune.search.config_allocation import AllocationSearchConfig
from evoprune.search.loop import Budget
from evoprune.search.progress import Progress
from evoprune.search.rundir import RunDirectory
from evoprune.search.worker_session import Resources
from figure import Figure
from shared import Resident

GENERATIONS = 5
WINDOWS = 16
EVERY = 8
"""Jobs between two measurements of the baseline."""


class _Turns:
    """Several workers as one: each takes the next job. What jobs and plain passes between them take is kept.

    Attributes:
        spent: seconds of all jobs about levels, by the number of windows.
        children, parents: how many of them, by the number of windows.
        plain: seconds a window of the dense forward pass, by the number of windows in a batch.
    """

    def __init__(self, workers: Sequence[AllocationWorker]) -> None:
        self._first = workers[0]
        self._turn = cycle(workers)
        self._jobs = 0
        self.spent: defaultdict[int, float] = defaultdict(float)
        self.children: Counter[int] = Counter()
        self.parents: Counter[int] = Counter()
        self.plain: dict[int, list[float]] = defaultdict(list)

    def handle(self, kind: str, payload: dict[str, Any]) -> dict[str, Any]:
        worker = next(self._turn)
        began = time.process_time()
        answer = worker.handle(kind, payload)
        if kind == "levels":
            windows = payload["last"] - payload["first"]
            self.spent[windows] += time.process_time() - began
            (self.parents if payload["levels"] == payload["parent"] else self.children)[windows] += 1
            self._jobs += 1
            if self._jobs % EVERY == 0:
                self._measure_plain(self._first.prepared(payload["prepared"]))
        return answer

    @torch.no_grad()
    def _measure_plain(self, prepared: Prepared) -> None:
        model, (windows, _) = self._first.language_model.model, prepared.text("search")
        for batch in (BATCH, WINDOWS):
            began = time.process_time()
            for first in range(0, WINDOWS, batch):
                part = windows[first : first + batch]
                model(input_ids=part, labels=part, use_cache=False).loss.item()
            self.plain[batch].append((time.process_time() - began) / WINDOWS)


def measure() -> list[Figure]:
    overrides = {"seed": 0, "evaluations": 10_000, "data.heldout_windows": 16, "searcher.seeds": ["uniform", "owl"]}
    config = resolve_as(AllocationSearchConfig, overrides=overrides)
    torch.set_num_threads(config.threads)
    workers = [AllocationWorker(config.context()) for _ in range(2)]
    return [_figure(config, workers[:count]) for count in (1, 2)]


def _figure(config: AllocationSearchConfig, workers: Sequence[AllocationWorker]) -> Figure:
    turns = _Turns(workers)
    with tempfile.TemporaryDirectory() as scratch:
        run = RunDirectory.create("allocation", config.model_dump(mode="json"), {}, run_dir=Path(scratch) / "run")
        try:
            with Progress(title="") as progress:
                session = AllocationRun(run, config, Resources(executor="inline"), progress)
                executor = Resident(turns)
                prepared = session.prepare(turns.handle, executor.ask)
                search = session.build_search(prepared, executor.ask)
                loop = session.build_loop(search, executor)

                loop.run(Budget(None, expired=lambda: search.generation > GENERATIONS))
        finally:
            run.close()
    plain = min(statistics.mean(taken) for taken in turns.plain.values())
    by_stage, spent, tokens, seen = {}, 0.0, 0, 0
    for stage in config.searcher.stages:
        unseen = stage.windows - seen
        measured = turns.children[unseen] + (turns.parents[unseen] if stage is config.searcher.stages[-1] else 0)
        by_stage[f"{stage.windows} windows"] = turns.spent[unseen] / (measured * stage.windows) / plain
        spent += turns.spent[unseen]
        tokens += measured * stage.windows
        seen = stage.windows
    name = "1 worker" if len(workers) == 1 else f"{len(workers)} workers"
    return Figure(
        f"mean candidate of a search on {name} / dense forward with cross-entropy",
        spent / tokens / plain,
        0.80,
        details={"by stage": by_stage, "seconds a window": plain},
    )
