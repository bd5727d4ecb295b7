"""The Ray actors of an executor: started, fed, watched and replaced, in the one thread that talks to Ray."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from evoprune.metrics.errors import AuditFailed, NoCapacity, WorkersFailed
from evoprune.metrics.files import canonical_json
from evoprune.search.engine.admission import Admission
from evoprune.search.engine.dispatch import Dispatcher, Loss, is_audited
from evoprune.search.engine.executor import Job, Notify, Outcome
from evoprune.search.engine.head import Head
from evoprune.search.engine.running import WorkerRecipe, last_line
from evoprune.search.engine.worker_process import WorkerProcess

LONGEST_PAUSE = 30.0
"""Between attempts to replace a worker that dies while it starts."""
DEATHS_BEFORE_READY = 3
"""A worker may die this often on its way up (someone else's memory, a preempted node) before that means it cannot."""
LONGEST_WAIT, SHORTEST_WAIT = 0.2, 0.01
"""Seconds between two looks at new jobs, deadlines and dead workers."""


class WorkerTraceback(Exception):
    """Carries a worker's traceback as the cause of `WorkersFailed`."""


class Crew:
    """The actors and what runs on them.

    Args:
        ray: the module, connected.
        recipe: what each actor builds its worker from.
        size: how many actors there should be.
        options: the resources of one actor, as Ray names them.
        notify: is told what happens to them.
        stall_seconds: how long to go on without any that is ready.
        admission: decides who may take part.
        librarian: the actor from which they get files that their node lacks.
        elastic: whether `size` follows the cluster, by `grow`; a refused worker is then not replaced.
        slots: how many jobs an actor runs at the same time, each in a thread of its own.
        audited: kinds of jobs of which a hundredth is done again by another actor, and must come out the same.
        head: of the cluster, without which no actor can be started; None where it cannot be seen.
    """

    def __init__(
        self,
        ray: Any,
        recipe: WorkerRecipe,
        size: int,
        options: dict[str, Any],
        notify: Notify,
        stall_seconds: float,
        admission: Admission | None = None,
        librarian: Any = None,
        elastic: bool = False,
        slots: int = 1,
        audited: Collection[str] = (),
        head: Head | None = None,
    ) -> None:
        self._ray = ray
        self._head = head
        fixed = {"max_restarts": 0, "max_task_retries": 0, "max_concurrency": slots, "scheduling_strategy": "SPREAD"}
        self._options = {**fixed, **options}
        self._admission = admission or Admission("relaxed")
        self._librarian = librarian
        self._elastic = elastic
        self._refused_nodes: set[str] = set()
        self._recipe = recipe
        self._notify = notify
        self._stall_seconds = stall_seconds
        self._dispatcher = Dispatcher(slots, lambda job: job.kind in audited and is_audited(job))
        self._numbers = itertools.count()
        self._actors: dict[int, Any] = {}
        self._calls: dict[Any, int] = {}  # every open call's ref, in the order of calling -> worker
        self._starting: set[int] = set()
        self._births: list[float] = [0.0] * size  # when each missing worker may be started
        self._pause = 1.0
        self._failures = 0  # workers in a row that were lost before they were ready
        self._refusals = 0  # those among them whose factory raised
        self._size = size
        self._deaths = 0
        self._draining = False
        self._available_at = time.monotonic()

    def counters(self) -> dict[str, int]:
        """Numbers for the display."""
        starting = len(self._starting) + len(self._births)
        return {
            "ready": len(self._actors) - len(self._starting),
            "starting": starting,
            "running": self._dispatcher.running,
            "deaths": self._deaths,
        }

    @property
    def size(self) -> int:
        """How many workers there should be."""
        return self._size

    def grow(self) -> None:
        """Have as many workers as the cluster has room for by now; those that are lost are replaced in any case."""
        if self._head is not None and not self._head.knows_us(self._ray):
            return
        added = room(self._ray, self._options, self._refused_nodes) - self._size
        if added > 0:
            self._births += [0.0] * added
            self._size += added

    def submit(self, jobs: Iterable[Job]) -> None:
        """Queue jobs."""
        self._dispatcher.submit(jobs)

    def drain(self) -> None:
        """Begin no more jobs, and start no more workers."""
        self._draining = True
        self._dispatcher.drain()

    def step(self, wake: threading.Event) -> list[Outcome]:
        """Start what can be started, hand out what can be handed out, wait a moment, and return what is settled.

        Args:
            wake: set when the wait should end early.

        Raises:
            WorkersFailed: no worker can start.
            NoCapacity: no worker has been ready for too long.
            AuditFailed: a worker found its model changed.
        """
        now = time.monotonic()
        if not self._draining:
            self._start_missing(now)
        ready = [worker for worker in self._actors if worker not in self._starting]
        for ahead in (False, True):
            for worker in ready:
                while (job := self._dispatcher.next_job(worker, now, ahead=ahead)) is not None:
                    call = self._actors[worker].work.remote(canonical_json(job.to_json()))
                    self._calls[call] = worker
        settled = [outcome for ready in self._wait(wake) for outcome in self._answer(ready)]
        for worker in self._dispatcher.overdue(time.monotonic()):
            settled += self._lose(worker, "deadline", "a job overran its deadline")
        self._check_capacity()
        return settled

    def dismiss(self) -> None:
        """End every actor."""
        for actor in self._actors.values():
            with contextlib.suppress(Exception):
                self._ray.kill(actor)

    def _start_missing(self, now: float) -> None:
        due = [moment for moment in self._births if moment <= now]
        if due and self._head is not None and not self._head.answers():
            return
        self._births = [moment for moment in self._births if moment > now]
        for _ in due:
            worker = next(self._numbers)
            options = dict(self._options)
            if self._refused_nodes:
                options["label_selector"] = {"ray.io/node-id": f"!in({','.join(sorted(self._refused_nodes))})"}
            actor_class = self._ray.remote(WorkerProcess).options(**options)
            self._actors[worker] = actor_class.remote(self._recipe, self._librarian)
            self._calls[self._actors[worker].ready.remote()] = worker
            self._starting.add(worker)

    def _wait(self, wake: threading.Event) -> list[Any]:
        """Calls that have ended, in the order in which they were made."""
        if not self._calls:
            wake.wait(LONGEST_WAIT)
            return []
        # Ray's wait cannot be woken by a new job, so it is short while a worker has nothing to do.
        moment = SHORTEST_WAIT if self._dispatcher.is_idle() else LONGEST_WAIT
        calls = list(self._calls)
        if not self._ray.wait(calls, num_returns=1, timeout=moment)[0]:
            return []
        return self._ray.wait(calls, num_returns=len(calls), timeout=0)[0]

    def _answer(self, call: Any) -> list[Outcome]:
        """What an ended call settles."""
        worker = self._calls.pop(call, None)
        if worker is None:  # its worker was lost meanwhile
            return []
        try:
            answer = self._ray.get(call)
        except self._ray.exceptions.RayError as problem:
            if not getattr(problem, "actor_init_failed", False):
                return self._lose(worker, _loss(problem), str(problem))
            answer = {"error": str(problem), "line": last_line(str(problem))}
        if worker in self._starting:
            self._welcome(worker, answer)
            return []
        if "audit" in answer:
            raise AuditFailed(f"worker {worker}: {answer['audit']}")
        if "sick" in answer:
            return self._lose(worker, "died", answer["sick"])
        answer["telemetry"]["worker"] = worker
        outcome = self._dispatcher.finish(worker, Outcome.from_json(answer), time.monotonic())
        return [] if outcome is None else [outcome]

    def _welcome(self, worker: int, answer: dict[str, Any]) -> None:
        """A worker is up, or tells why it cannot be."""
        if "error" in answer:
            self._refusals += 1
            self._notify("error", "worker_refused", worker=worker, error=answer["error"])
            if self._refusals >= self._size and len(self._actors) == len(self._starting):
                raise WorkersFailed(f"no worker can start: {answer['line']}") from WorkerTraceback(answer["error"])
            self._lose(worker, "died", answer["line"])
            return
        refusal = self._admission.refusal(answer["code"], answer.pop("numerics"))
        if refusal is not None:
            self._turn_away(worker, answer["node_id"], f"{refusal} (worker on {answer['node']})")
            return
        self._starting.discard(worker)
        self._pause, self._failures, self._refusals = 1.0, 0, 0
        self._dispatcher.add_worker(worker)
        self._notify("info", "worker_ready", worker=worker, **answer)

    def _turn_away(self, worker: int, node: str, reason: str) -> None:
        """Drop a worker that may not take part, and start none on its node again: it would be the same there."""
        self._notify("warning", "worker_refused", worker=worker, error=reason)
        self._refused_nodes.add(node)
        self._starting.discard(worker)  # it started well: this is no failure to retry with a pause
        self._lose(worker, "node", reason)
        if self._elastic:
            self._births.pop()
            self._size -= 1
        if len(self._actors) == len(self._starting) and not room(self._ray, self._options, self._refused_nodes):
            raise WorkersFailed(f"no worker may take part: {reason}")

    def _lose(self, worker: int, loss: Loss, text: str) -> list[Outcome]:
        """Drop a worker, plan its replacement, and return what its loss settles."""
        with contextlib.suppress(Exception):
            self._ray.kill(self._actors[worker])
        del self._actors[worker]
        self._calls = {call: other for call, other in self._calls.items() if other != worker}
        self._deaths += 1
        self._notify("warning", "worker_lost", worker=worker, loss=loss, text=text[-2000:])
        moment = time.monotonic()
        if worker in self._starting:
            self._starting.discard(worker)
            self._failures += 1
            if self._failures >= DEATHS_BEFORE_READY * self._size and len(self._actors) == len(self._starting):
                raise WorkersFailed(f"no worker can start: {last_line(text)}") from WorkerTraceback(text)
            moment += self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
        self._births.append(moment)
        return self._dispatcher.lose(worker, loss, last_line(text))

    def _check_capacity(self) -> None:
        if len(self._actors) > len(self._starting):
            self._available_at = time.monotonic()
        elif not self._draining and time.monotonic() - self._available_at > self._stall_seconds:
            raise NoCapacity(
                f"no worker for {self._stall_seconds:g} s: Ray has no room for one or none gets ready "
                "(searches that share a cluster each need --workers N)"
            )


def room(ray: Any, options: Mapping[str, Any], refused: Collection[str] = ()) -> int:
    """How many workers with these resources the cluster's nodes hold in all, those of others included.

    Args:
        ray: the module, connected.
        options: ``num_cpus`` and ``num_gpus`` of a worker.
        refused: nodes that do not count.
    """
    total = 0
    for node in ray.nodes():
        if not node["Alive"] or node["NodeID"] in refused:
            continue
        cpus, gpus = (node["Resources"].get(kind, 0.0) for kind in ("CPU", "GPU"))
        here = int(cpus / options["num_cpus"])
        share = options["num_gpus"]
        if 0 < share < 1:  # of one device, never of two
            here = min(here, int(gpus) * int(1 / share + 1e-9))
        elif share >= 1:
            here = min(here, int(gpus / share))
        total += here
    return total


def _loss(problem: Exception) -> Loss:
    """What Ray's error says about the end of a worker."""
    if type(problem).__name__ == "OutOfMemoryError":  # the memory monitor's; no subclass of RayActorError
        return "oom"
    if getattr(problem, "preempted", False) or "its node has died" in str(problem):
        return "node"
    return "died"
