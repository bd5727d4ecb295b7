"""The engine with evaluations that only take time: how near to ideal it keeps its slots, and what its driver costs.

    python benchmarks/engine_scale.py                                    # five points of 60 s, 8 min with start-up
    python benchmarks/engine_scale.py --slots 64 256 --evaluations 10000       # each 60 s at least
    python benchmarks/engine_scale.py --slots 64 --sigma 1 --window 1024 --memory 64 --failures 0.05 --board

Real are the loop, the run folder with its commits, the evaluation log with its fsyncs, Ray and the actors; the
evaluations sleep. Slots are threads inside at most 8 actor processes, so one machine can hold 256 of them. The slots of
an actor share one queue: a job that waits there goes to the first slot that gets free, not to one of its own.

Efficiency is the sum of the durations that were asked for, over slots and wall time, from the first birth after all
actors are ready to the last result; the drain at the end, when no births follow, is part of it. `busy` is what the
workers were busy with while births still came, `stretch` by how much evaluations overran what was asked: above 1.01
the machine is short of cores, and efficiency says more about it than about the engine. Driver CPU is that of the whole
process, Ray's threads and the memory samples included. Writes benchmarks/out/engine_scale.json.

As `python benchmarks/run.py scale` it takes over 5 minutes and wants a quiet machine, so it is not run by default.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from evoprune.search.engine.board import Board
from evoprune.search.engine.executor import Outcome
from evoprune.search.engine.journal import EvaluationLog
from evoprune.search.engine.ray import RayExecutor
from evoprune.search.engine.trial_record import TrialRecord
from evoprune.search.loop import Birth, BirthLoop, Budget
from evoprune.search.rundir import RunDirectory
from figure import Figure
from synthetic import Load, SyntheticSearch

MOST_ACTORS = 8
SLOTS = (1, 8, 64, 256)
START_SECONDS = 180.0
SAMPLE_SECONDS = 2.0
OUT = Path(__file__).parent / "out" / "engine_scale.json"


@dataclass(frozen=True)
class Point:
    """What to run: so many evaluations of a load on so many slots."""

    slots: int
    evaluations: int
    window: int
    load: Load
    board: bool = False


def measure() -> list[Figure]:
    """Constant durations at every number of slots, and log-normal ones at 64."""
    return figures([run_point(point) for point in default_points(60.0)])


def default_points(seconds: float) -> list[Point]:
    constant = [Point(slots, int(slots * seconds), 4 * slots, Load()) for slots in SLOTS]
    return [*constant, Point(64, int(64 * seconds), 1024, Load(sigma=1.0))]


def run_point(point: Point) -> dict[str, Any]:
    """The point and what was measured, as JSON data."""
    search = SyntheticSearch(point.load)
    executor = RayExecutor(
        "synthetic:build",
        {},
        workers=min(point.slots, MOST_ACTORS),
        slots_per_worker=-(-point.slots // MOST_ACTORS),
        python_path=[str(Path(__file__).parent)],
    )
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        run = stack.enter_context(RunDirectory.create("scale", {}, {}, run_dir=Path(scratch) / "run"))
        log = EvaluationLog(run.path / "evaluations.wal")
        stack.callback(log.close)
        board = Board(run.path, run.run_id) if point.board else None
        born = time.time()

        def applied(birth: Birth, line: dict[str, Any], outcome: Outcome | None) -> None:
            nonlocal born
            if loop.evaluations < point.evaluations:
                born = time.time()
            if board is not None:
                board.add(_trial(line))

        loop = BirthLoop(search, executor, log, run, window=point.window, on_applied=applied)
        stack.callback(executor.close)
        executor.start()
        _wait_for_all(executor)
        with _memory() as samples:
            began, clock, cpu = time.time(), time.perf_counter(), time.process_time()
            loop.run(Budget(point.evaluations))
            seconds, cpu = time.perf_counter() - clock, time.process_time() - cpu
        if board is not None:
            board.close()
        outcomes = list(log.outcomes())
        assert len(outcomes) == point.evaluations
        asked = sum(point.load.job(number, 0.0).payload["seconds"] for number in range(point.evaluations))
        middle, last = _level(samples, 0.5), _level(samples, 1.0)
        return {
            **asdict(point),
            "seconds": seconds,
            "efficiency": asked / point.slots / seconds,
            "busy": _busy(outcomes, began, born) / point.slots,
            "stretch": sum(outcome.telemetry["seconds"] for outcome in outcomes) / asked,
            "failed": sum(outcome.status != "ok" for outcome in outcomes),
            "cpu_ms": 1000 * cpu / point.evaluations,
            "memory_mib": last / 2**20,
            "growth": last / middle - 1,
            "growth_bytes_per_evaluation": 2 * (last - middle) / point.evaluations,
            "samples": samples,
            "history_sha256": hashlib.sha256((run.path / "history.jsonl").read_bytes()).hexdigest(),
        }


def figures(points: list[dict[str, Any]]) -> list[Figure]:
    """What the points say about the targets: efficiency at 64 slots; the driver from 64 slots on, at its worst."""
    found = []
    for point in points:
        plain = not (point["load"]["memory"] or point["load"]["failures"])
        if plain and point["slots"] == 64 and point["load"]["sigma"] in (0.0, 1.0):
            constant = point["load"]["sigma"] == 0.0
            what = "constant" if constant else "log-normal"
            found.append(
                Figure(
                    f"(s) 64 slots, {what} durations, window {point['window']}, share of ideal",
                    point["efficiency"],
                    0.95 if constant else 0.60,
                    at_most=False,
                    details=_brief(point),
                )
            )
    many = [point for point in points if point["slots"] >= 64]
    if many:
        worst = max(many, key=lambda point: point["cpu_ms"])
        found.append(Figure("(s) driver CPU per evaluation, ms, worst", worst["cpu_ms"], 5.0, details=_brief(worst)))
        worst = max(many, key=lambda point: point["growth"])
        found.append(
            Figure(
                "(s) driver memory, growth over the second half, worst", worst["growth"], 0.05, details=_brief(worst)
            )
        )
    return found


def _trial(line: dict[str, Any]) -> TrialRecord:
    if line["loss"] is None:
        return TrialRecord("fail", attributes={"birth": line["birth"]})
    return TrialRecord("complete", line["loss"], {0: line["loss"]}, {"birth": line["birth"]})


def _wait_for_all(executor: RayExecutor) -> None:
    """Until every actor is ready.

    Raises:
        TimeoutError: they do not come.
    """
    deadline = time.monotonic() + START_SECONDS
    while executor.counters()["starting"]:
        executor.poll(0.0)  # raises if none can start
        time.sleep(0.05)
        if time.monotonic() > deadline:
            raise TimeoutError(f"not all actors were ready within {START_SECONDS:g} s")


@contextlib.contextmanager
def _memory() -> Iterator[list[tuple[float, int]]]:
    """(seconds, bytes private to this process) every `SAMPLE_SECONDS`, and once at the end."""
    samples: list[tuple[float, int]] = []
    process, over, began = psutil.Process(), threading.Event(), time.monotonic()

    def sample() -> None:
        samples.append((round(time.monotonic() - began, 2), process.memory_full_info().uss))

    def watch() -> None:
        while not over.wait(SAMPLE_SECONDS):
            sample()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield samples
    finally:
        over.set()
        watcher.join()
        sample()


def _level(samples: list[tuple[float, int]], share: float) -> float:
    """Median bytes of the tenth of the time before `share` of it."""
    end = samples[-1][0] * share
    near = [size for moment, size in samples if end - 0.1 * samples[-1][0] <= moment <= end]
    return statistics.median(near) if near else samples[int(share * (len(samples) - 1))][1]


def _busy(outcomes: list[Outcome], began: float, ended: float) -> float:
    """How many evaluations ran at a time between two moments (Unix time), on average."""
    if ended <= began:
        return 0.0
    spans = ((outcome.telemetry["started"], outcome.telemetry["finished"]) for outcome in outcomes)
    return sum(max(0.0, min(end, ended) - max(start, began)) for start, end in spans) / (ended - began)


def _brief(point: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in point.items() if name != "samples"}


def _print_table(points: list[dict[str, Any]]) -> None:
    print(
        "\nslots window sigma evaluations failed seconds share of ideal   busy stretch driver ms    MiB  growth "
        "bytes/ev  history"
    )
    for point in points:
        print(
            f"{point['slots']:5} {point['window']:6} {point['load']['sigma']:5g} {point['evaluations']:11} "
            f"{point['failed']:6} {point['seconds']:7.1f} {point['efficiency']:14.1%} {point['busy']:6.1%} "
            f"{point['stretch']:7.3f} "
            f"{point['cpu_ms']:9.2f} {point['memory_mib']:6.0f} {point['growth']:7.1%} "
            f"{point['growth_bytes_per_evaluation']:8.0f}  {point['history_sha256'][:8]}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, nargs="+", help="logical workers; the default points if none is given")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="ideal length of a point (60), or more with --evaluations"
    )
    parser.add_argument("--evaluations", type=int, default=0, help="at least so many at each point, beyond --seconds")
    parser.add_argument("--window", type=int, help="births that may wait (4 per slot, 16 if durations vary)")
    parser.add_argument("--mean", type=float, default=1.0, help="seconds of an evaluation (1)")
    parser.add_argument("--sigma", type=float, default=0.0, help="spread of their logarithm: 0 constant, 1 log-normal")
    parser.add_argument("--memory", type=float, default=0.0, help="MiB that an evaluation fills (0)")
    parser.add_argument("--failures", type=float, default=0.0, help="share of evaluations that raise (0)")
    parser.add_argument("--board", action="store_true", help="write the Optuna study as well")
    asked = parser.parse_args()
    load = Load(asked.mean, asked.sigma, int(asked.memory * 2**20), asked.failures)
    points = default_points(asked.seconds)
    if asked.slots:
        per_slot = asked.window or (16 if asked.sigma else 4)
        points = [
            Point(
                slots,
                max(asked.evaluations, int(slots * asked.seconds / asked.mean), 1),
                asked.window or per_slot * slots,
                load,
            )
            for slots in asked.slots
        ]
    measured = []
    for point in points:
        print(f"{point.slots} slots, {point.evaluations} evaluations ...", flush=True)
        measured.append(run_point(replace(point, board=asked.board)))
    _print_table(measured)
    found = figures(measured)
    for figure in found:
        print(f"{'ok' if figure.met else 'MISS':4} {figure.what}: {figure.value:.3g}, target {figure.target_text}")
    OUT.parent.mkdir(exist_ok=True)
    machine = {"cores": os.cpu_count(), "load": os.getloadavg()}
    record = {"machine": machine, "points": measured, "figures": [asdict(figure) for figure in found]}
    OUT.write_text(json.dumps(record, indent=2) + "\n")
    raise SystemExit(0 if all(figure.met for figure in found) else 1)


if __name__ == "__main__":
    main()
