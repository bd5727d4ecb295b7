"""Everything that shows people how a search does while it runs: the terminal, the event log, the board."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from evoprune.search.config_sections import SearchConfig
from evoprune.search.engine.board import Board
from evoprune.search.engine.board_storage import without_password
from evoprune.search.engine.executor import Executor, Outcome
from evoprune.search.kinds import Kind, WatchedSearch
from evoprune.search.loop import BirthLoop
from evoprune.search.progress import Progress
from evoprune.search.publishing import describe, make_board
from evoprune.search.rundir import RunDirectory

EVENT_SECONDS = 15.0
"""Between two events `progress`, from which `evoprune show --follow` lives."""
NOTE_SECONDS = 20.0
"""Between two versions of the board's note. Each stays in the journal file, with some hundred bytes."""


STOP_SECONDS = 5.0
"""How long the board may keep a user who has asked to stop."""


class Watch:
    """Tells people about one session of a run. Nothing here has a say in the search.

    Args:
        run: locked by this process.
        config: of the run.
        kind: what is searched.
        progress: the terminal.
        storage: URL of the board's database, or None.
    """

    def __init__(
        self,
        run: RunDirectory,
        config: SearchConfig,
        kind: Kind,
        progress: Progress,
        storage: str | None,
    ) -> None:
        self._run = run
        self._config = config
        self._kind = kind
        self._executor: Executor | None = None
        self._progress = progress
        self._storage = storage
        self._board: Board | None = None
        self._search: WatchedSearch | None = None
        self._loop: BirthLoop | None = None
        self._trials = kind.trials(config)
        self._steps = [0] * self._trials.steps
        self._phase = ""
        self._last_event = self._last_note = 0.0

    def starting(self, executor: Executor) -> None:
        """Workers start, which are counted from now on."""
        self._executor = executor
        self.phase("starting workers")

    def phase(self, name: str, details: str = "") -> None:
        """A part of the work begins."""
        self._phase = name
        self._progress.phase(f"{name}{details}")
        self._run.events("info", "phase", phase=name)

    def searching(
        self, search: WatchedSearch, loop: BirthLoop, history: Iterable[Mapping[str, Any]], outcomes: Iterable[Outcome]
    ) -> None:
        """The search is about to begin, or to go on.

        Args:
            history: of earlier sessions.
            outcomes: of the evaluation log.
        """
        self._search, self._loop = search, loop
        shown = None if self._storage is None else without_password(self._storage, self._storage)
        self._run.events("info", "board", storage=shown)
        self._board = make_board(self._run, self._kind, self._storage, warn=self._board_says)
        lines = list(history)
        for line in lines:
            self._count_steps(line)
        self._board.resume(self._trials.records(lines, outcomes))  # also where a crash came before the first commit
        describe(self._board, self._run, self._config)

    def applied(self, line: Mapping[str, Any], outcome: Outcome | None) -> None:
        """A birth has become a line of the history."""
        assert self._board is not None and self._search is not None and self._loop is not None
        self._count_steps(line)
        for record in self._trials.take(line, None if outcome is None else outcome.telemetry):
            self._board.add(record)
        if (leader := self._search.leader) is not None:
            self._progress.update(best=leader[0], expression=leader[1])
        self._progress.update(self._loop.evaluations)
        self.tick()

    def tick(self) -> None:
        """Something may have changed; called often."""
        self._progress.update(counters=self._counters())
        now = time.monotonic()
        if now - self._last_event > EVENT_SECONDS:
            self._last_event = now
            self._run.events("info", "progress", **self._facts())
            self._run.beat()
        if now - self._last_note > NOTE_SECONDS:
            self._last_note = now
            self._tell_board()

    def close(self, stopping: Callable[[], bool]) -> None:
        """The session ends: a last note of how far it came, and whatever still waits for the board.

        Args:
            stopping: the user does not want to wait; what is missing on the board is written when the run goes on.
        """
        if self._board is not None:
            self._tell_board()
            begin = time.monotonic()
            self._board.close(enough=lambda: stopping() and time.monotonic() - begin > STOP_SECONDS)
        if self._loop is not None:
            self._run.events("info", "progress", **self._facts())

    def _count_steps(self, line: Mapping[str, Any]) -> None:
        for step in self._trials.reached(line):
            self._steps[step] += 1

    def _tell_board(self) -> None:
        if self._board is None or self._search is None or self._loop is None:
            return
        search, evaluations = self._search, self._loop.evaluations
        self._board.note(self._kind.searching_note(self._config, search, evaluations, self._steps))
        self._board.set_attributes({"counters": dict(search.reasons), "evaluations": evaluations})

    def _counters(self) -> dict[str, int | str]:
        """What the terminal shows below the best."""
        shown: dict[str, int | str] = {}
        if self._search is not None and self._loop is not None:
            shown |= self._kind.counters(self._search, self._loop.evaluations, self._steps)
        if self._executor is not None:
            workers = self._executor.counters()
            starting = f" + {workers['starting']} starting" if workers["starting"] else ""
            shown |= {"workers": f"{workers['ready']}{starting}", "deaths": workers["deaths"]}
        return shown

    def _facts(self) -> dict[str, Any]:
        """The event `progress`."""
        facts: dict[str, Any] = {"phase": self._phase}
        if self._executor is not None:
            facts["workers"] = self._executor.counters()
        if self._search is not None and self._loop is not None:
            facts |= {"evaluations": self._loop.evaluations, "births": self._search.births}
            facts["counters"] = self._kind.counters(self._search, self._loop.evaluations, self._steps)
            if (leader := self._search.leader) is not None:
                facts |= {"best": leader[0], "expression": leader[1]}
        return facts

    def _board_says(self, text: str) -> None:
        """Called from the board's thread as well."""
        self._progress.line(text)
        self._run.events("warning", "board_trouble", text=text)
