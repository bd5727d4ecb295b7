"""The worker's side: build a worker from its recipe, run one job, turn whatever happens into an outcome."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from evoprune.metrics.errors import AuditFailed, InvalidCandidate
from evoprune.metrics.files import canonical_json
from evoprune.search.engine.executor import Job, Outcome, Status, Worker

ERROR_BYTES = 4096
"""How much of a traceback an outcome keeps: its end."""
DEVICE_ERRORS = ("CUDA error", "cuDNN error", "CUBLAS_STATUS", "CUSOLVER_STATUS", "CUSPARSE_STATUS", "HIP error")
"""What the text of an exception holds when a device, or this process's context on it, is broken."""


class SickWorker(Exception):
    """The worker's process is of no use any more: what it computes from here on would be errors, or wrong.

    Its text is the traceback of what happened.
    """


@dataclass(frozen=True, slots=True)
class WorkerRecipe:
    """All that it takes to make a worker in another process; plain data.

    Args:
        factory: `"module:function"`; the function takes the context and returns a worker.
        context: JSON data.
        threads: torch threads of the worker, or None to leave them. Sums of floats depend on it, so it is part of a
            run's identity.
        python_path: folders to import from, before all others.
        environment: environment variables to set before the factory is imported.
        gpu_share: of a GPU's memory that the worker may take, where several share one; Ray does not see to that.
    """

    factory: str
    context: dict[str, Any]
    threads: int | None = 1
    python_path: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    gpu_share: float = 1.0

    def build(self) -> Worker:
        """The worker, made in this process. The thread count and the environment are those of the process."""
        sys.path[:0] = [folder for folder in self.python_path if folder not in sys.path]
        os.environ.update(self.environment)
        module, _, function = self.factory.partition(":")
        factory = getattr(importlib.import_module(module), function)
        if self.threads is not None:
            set_threads(self.threads)
        if self.gpu_share < 1:
            set_gpu_share(self.gpu_share)
        return factory(json.loads(canonical_json(self.context)))


def get_threads() -> int | None:
    """How many threads torch has, or None while torch is not loaded."""
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch is not None else None


def set_threads(threads: int) -> None:
    """Give torch `threads` threads, if it is loaded: a worker that does without torch need not wait for it."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)


def set_gpu_share(share: float) -> None:
    """Let this process take at most `share` of its GPU's memory, if torch is loaded and there is one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(share)


def run_job(worker: Worker, job: Job) -> Outcome:
    """Do one job; every `Exception` becomes an outcome, unless it says that the process is broken.

    The worker gets a copy of the payload, and its values go through JSON, so that an outcome is the same whether the
    worker lives in this process or in another.

    Raises:
        SickWorker: the job must be done by another process.
        AuditFailed: the worker found that its own model has changed, so that results before may be wrong as well.
    """
    status: Status = "ok"
    values: dict[str, Any] = {}
    error = ""
    telemetry: dict[str, Any] = {"pid": os.getpid(), "started": round(time.time(), 3)}
    clock = time.perf_counter()
    try:
        values = _plain(worker.handle(job.kind, json.loads(canonical_json(job.payload))))
    except InvalidCandidate as problem:
        status, error = "invalid", problem.reason
        telemetry["detail"] = str(problem)[-ERROR_BYTES:]
    except AuditFailed:
        raise
    except Exception as problem:
        status = "oom" if is_out_of_memory(problem) else "error"
        error = tail_of_traceback(problem)
        if status == "error" and is_sick(problem):
            raise SickWorker(error) from problem
    if status == "oom":
        _give_memory_back()
    telemetry["seconds"] = round(time.perf_counter() - clock, 6)
    telemetry["finished"] = round(time.time(), 3)
    return Outcome(job.key, status, values, error, telemetry)


def _plain(values: Any) -> dict[str, Any]:
    """`values` after a round trip through JSON.

    Raises:
        InvalidCandidate: a number is NaN or infinite.
        TypeError: not a dictionary, or not JSON data.
    """
    if not isinstance(values, dict):
        raise TypeError(f"a worker returns a dictionary, not {type(values).__name__}")
    try:
        return json.loads(canonical_json(values))
    except ValueError as problem:
        raise InvalidCandidate("NONFINITE", "a value is NaN or infinite") from problem


def is_out_of_memory(problem: BaseException) -> bool:
    """Whether an exception says that host or device memory ran out. Works without importing torch."""
    return (
        isinstance(problem, MemoryError)
        or type(problem).__name__ == "OutOfMemoryError"
        or (isinstance(problem, RuntimeError) and "can't allocate memory" in str(problem))
    )


def is_sick(problem: BaseException) -> bool:
    """Whether an exception says that the process is broken. Works without importing torch.

    After an error on a device every later call fails as well, whatever it is. A file that cannot be read is the
    machine's fault, not the candidate's.
    """
    if isinstance(problem, OSError) or type(problem).__name__ in ("AcceleratorError", "SafetensorError"):
        return True
    return isinstance(problem, RuntimeError) and any(sign in str(problem) for sign in DEVICE_ERRORS)


def _give_memory_back() -> None:
    """Return what torch keeps for later: the next attempt, or a neighbour on the device, needs it now."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def last_line(text: str) -> str:
    """The last line of a text that is not empty."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"


def tail_of_traceback(problem: BaseException) -> str:
    """The last 4 KiB of an exception's traceback: its end says what happened."""
    text = "".join(traceback.format_exception(problem)).strip()
    return text.encode()[-ERROR_BYTES:].decode(errors="ignore")
