"""The driver process of a search with workers that start at once, for tests that kill either.

    python -m tests.search.planted_driver RUN --workers 2 --evaluations 200

Makes the run, or goes on with it. Exit codes are those of the command line.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from evoprune.metrics.errors import EvopruneError
from evoprune.search.engine.executor import Executor
from evoprune.search.engine.inline import InlineExecutor
from evoprune.search.engine.ray import RayExecutor
from evoprune.search.signals import stop_on_signals
from tests.search.planted import Session

ROOT = Path(__file__).parents[2]
FACTORY = "tests.search.hashed:build"


def _workers(text: str) -> int | None:
    return None if text == "all" else int(text)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--evaluations", type=int, required=True)
    parser.add_argument("--workers", type=_workers, default=1, help="0 is in process, all is as many as there is room")
    parser.add_argument("--address", default="local")
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--log", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stall", type=float)
    asked = parser.parse_args()
    context = {"seconds": asked.seconds, **({} if asked.log is None else {"log": str(asked.log)})}
    factory, session = FACTORY, None
    executor: Executor = (
        RayExecutor(
            factory,
            context,
            workers=asked.workers,
            address=asked.address,
            python_path=[str(ROOT)],
            notify=lambda *what, **fields: session is not None and session.run.events(*what, **fields),
            stall_seconds=asked.stall,
        )
        if asked.workers != 0
        else InlineExecutor(factory, context)
    )
    with stop_on_signals() as stopping:
        try:
            session = Session(asked.run, seed=asked.seed, executor=executor)
            session.go(asked.evaluations, stopping=stopping)
        except EvopruneError as problem:
            print(f"{type(problem).__name__}: {problem}", file=sys.stderr)
            return problem.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
