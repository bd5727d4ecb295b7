"""How many workers a window feeds, in virtual time: the real loop, dispatcher, log and commits; no Ray and no waiting.

    python benchmarks/virtual_time.py                       # a table over workers and windows, sigma 0 and 1
    python benchmarks/virtual_time.py --workers 10000 --window 40000 --sigma 1 --evaluations 100000

A worker runs one job and has the next beside it, as on a cluster; durations are log-normal with mean 1. `of ideal` is
the sum of durations over workers and virtual time, first birth to last result, and `steady` the same while births came.
`driver ms` is CPU of this process, and `per second` how many evaluations it manages on this machine with all fsyncs:
the most that any number of workers could get from it, were there no Ray.
"""

from __future__ import annotations

import argparse
import heapq
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from evoprune.search.engine.dispatch import Dispatcher
from evoprune.search.engine.executor import Executor, Job, Outcome
from evoprune.search.engine.journal import EvaluationLog
from evoprune.search.loop import Birth, BirthLoop, Budget
from evoprune.search.rundir import RunDirectory
from synthetic import Load, SyntheticSearch

TABLE = [
    (workers, window, sigma)
    for sigma in (0.0, 1.0)
    for workers in (64, 1000)
    for window in (2 * workers, 4 * workers, 16 * workers)
]


class VirtualExecutor(Executor):
    """Jobs end when their `seconds` are over, on a clock that jumps from one end to the next."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.now = 0.0
        self.work = 0.0
        self._dispatcher = Dispatcher()
        self._lanes: dict[int, list[Job]] = {worker: [] for worker in range(workers)}
        self._ends: list[tuple[float, int]] = []  # a heap: when the job that a worker runs ends
        self._idle = list(reversed(range(workers)))
        self._short = set(self._idle)  # workers with nothing beside what they run
        for worker in range(workers):
            self._dispatcher.add_worker(worker)

    def start(self) -> None:
        """All workers are there."""

    def submit(self, jobs: Iterable[Job]) -> None:
        self._dispatcher.submit(jobs)
        while self._idle and self._take(self._idle[-1]):
            self._idle.pop()
        while self._short and not self._idle and self._take(next(iter(self._short))):
            pass

    def poll(self, timeout: float) -> list[Outcome]:
        """Jump to the next end."""
        if not self._ends:
            return []
        self.now, worker = heapq.heappop(self._ends)
        job = self._lanes[worker].pop(0)
        self.work += job.payload["seconds"]
        outcome = self._dispatcher.finish(worker, Outcome(job.key, "ok", {"loss": job.payload["loss"]}), self.now)
        assert outcome is not None
        self._short.add(worker)
        if self._lanes[worker]:
            self._begin(worker)
            self._take(worker)
        elif not self._take(worker):
            self._idle.append(worker)
        return [outcome]

    def drain(self) -> None:
        self._dispatcher.drain()

    def counters(self) -> dict[str, int]:
        return {"ready": self.workers, "starting": 0, "running": self._dispatcher.running, "deaths": 0}

    def close(self) -> None:
        """Nothing to stop."""

    def _take(self, worker: int) -> bool:
        """Give a worker one more job, if there is one for it."""
        job = self._dispatcher.next_job(worker, self.now)
        if job is None:
            return False
        self._lanes[worker].append(job)
        if len(self._lanes[worker]) == 1:
            self._begin(worker)
        else:
            self._short.discard(worker)
        return True

    def _begin(self, worker: int) -> None:
        heapq.heappush(self._ends, (self.now + self._lanes[worker][0].payload["seconds"], worker))


def simulate(workers: int, window: int, sigma: float, evaluations: int) -> dict[str, float]:
    """Shares of ideal, CPU milliseconds of the driver per evaluation, and evaluations per second."""
    executor = VirtualExecutor(workers)
    steady = [0.0, 0.0]

    def applied(birth: Birth, line: dict[str, Any], outcome: Outcome | None) -> None:
        if loop.evaluations < evaluations:
            steady[:] = executor.now, executor.work

    with tempfile.TemporaryDirectory() as scratch, RunDirectory.create("x", {}, {}, run_dir=Path(scratch) / "r") as run:
        log = EvaluationLog(run.path / "evaluations.wal")
        search = SyntheticSearch(Load(sigma=sigma))
        loop = BirthLoop(search, executor, log, run, window=window, on_applied=applied)
        clock, cpu = time.perf_counter(), time.process_time()
        loop.run(Budget(evaluations))
        seconds, cpu = time.perf_counter() - clock, time.process_time() - cpu
        log.close()
    return {
        "of_ideal": executor.work / workers / executor.now,
        "steady": steady[1] / workers / steady[0] if steady[0] else 0.0,
        "cpu_ms": 1000 * cpu / evaluations,
        "per_second": evaluations / seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--window", type=int)
    parser.add_argument("--sigma", type=float, default=0.0)
    parser.add_argument("--evaluations", type=int, help="64 per worker, at least 4 windows, if not given")
    asked = parser.parse_args()
    rows = TABLE
    if asked.workers:
        rows = [(asked.workers, asked.window or 4 * asked.workers, asked.sigma)]
    print("workers window sigma evaluations of ideal steady driver ms per second", flush=True)
    for workers, window, sigma in rows:
        evaluations = asked.evaluations or max(64 * workers, 4 * window)
        found = simulate(workers, window, sigma, evaluations)
        print(
            f"{workers:7} {window:6} {sigma:5g} {evaluations:11} {found['of_ideal']:8.1%} {found['steady']:6.1%} "
            f"{found['cpu_ms']:9.2f} {found['per_second']:10.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
