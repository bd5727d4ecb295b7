"""Everything that shows people how a search does while it runs: the terminal, the event log, the board."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from evoprune.search.config_sections import SearchConfig
from evoprune.search.engine.board import Board
from evoprune.search.engine.board_storage import without_password
from evoprune.search.engine.executor import Executor, Outcome
from evoprune.search.kinds import BoardKind, WatchedSearch
from evoprune.search.loop import BirthLoop
from evoprune.search.progress import Progress
from evoprune.search.publishing import describe, make_board
from evoprune.search.rundir import RunDirectory
from evoprune.search.trials import Trials

EVENT_SECONDS = 15.0
"""Between two events `progress`, from which `evoprune show --follow` lives."""
NOTE_SECONDS = 20.0
"""Between two versions of the board's note. Each stays in the journal file, with some hundred bytes."""


STOP_SECONDS = 5.0
"""How long the board may keep a user who has asked to stop."""


@dataclass(frozen=True)
class _Watched:
    """A search under way.

    Attributes:
        steps: how many candidates have got to each rung or stage.
    """

    kind: BoardKind
    search: WatchedSearch
    loop: BirthLoop
    board: Board
    trials: Trials
    steps: list[int]

    def count_steps(self, line: Mapping[str, Any]) -> None:
        """A birth has become a line of the history."""
        for step in self.trials.reached(line):
            self.steps[step] += 1

    def counters(self) -> dict[str, int | str]:
        """See `BoardKind.counters`."""
        return self.kind.counters(self.search, self.loop.evaluations, self.steps)


class Watch:
    """Tells people about one session of a run. Nothing here has a say in the search.

    Args:
        run: locked by this process.
        config: of the run.
        progress: the terminal.
        storage: URL of the board's database, or None.
        lost_board: where the board was, if this session has no password for it.
    """

    def __init__(
        self,
        run: RunDirectory,
        config: SearchConfig,
        progress: Progress,
        storage: str | None,
        lost_board: str | None = None,
    ) -> None:
        self._run = run
        self._config = config
        self._executor: Executor | None = None
        self._progress = progress
        self._storage = storage
        self._lost_board = lost_board
        self._watched: _Watched | None = None
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
        self,
        kind: BoardKind,
        search: WatchedSearch,
        loop: BirthLoop,
        history: Iterable[Mapping[str, Any]],
        outcomes: Iterable[Outcome],
    ) -> None:
        """The search is about to begin, or to go on.

        Args:
            kind: what is searched.
            history: of earlier sessions.
            outcomes: of the evaluation log.
        """
        shown = None if self._storage is None else without_password(self._storage, self._storage)
        self._run.events("info", "board", storage=shown)
        if self._lost_board is not None:
            self._board_says(f"the board was in {self._lost_board}; give --storage with the password to go on there")
        board = make_board(self._run, kind, self._storage, warn=self._board_says)
        trials = kind.trials(self._config)
        watched = self._watched = _Watched(kind, search, loop, board, trials, [0] * trials.steps)
        lines = list(history)
        for line in lines:
            watched.count_steps(line)
        board.resume(trials.records(lines, outcomes))  # also where a crash came before the first commit
        describe(board, self._run, self._config)

    def applied(self, line: Mapping[str, Any], outcome: Outcome | None) -> None:
        """A birth has become a line of the history."""
        assert self._watched is not None
        watched = self._watched
        watched.count_steps(line)
        for record in watched.trials.take(line, None if outcome is None else outcome.telemetry):
            watched.board.add(record)
        if (leader := watched.search.leader) is not None:
            self._progress.update(best=leader[0], expression=leader[1])
        self._progress.update(watched.loop.evaluated)
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
        if self._watched is not None:
            self._tell_board()
            begin = time.monotonic()
            self._watched.board.close(enough=lambda: stopping() and time.monotonic() - begin > STOP_SECONDS)
            self._run.events("info", "progress", **self._facts())

    def _tell_board(self) -> None:
        if self._watched is None:
            return
        watched, evaluations = self._watched, self._watched.loop.evaluations
        watched.board.note(watched.kind.searching_note(self._config, watched.search, evaluations, watched.steps))
        watched.board.set_attributes({"counters": dict(watched.search.reasons), "evaluations": evaluations})

    def _counters(self) -> dict[str, int | str]:
        """What the terminal shows below the best."""
        shown: dict[str, int | str] = {}
        if self._watched is not None:
            shown |= self._watched.counters()
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
        if self._watched is not None:
            facts |= {"evaluations": self._watched.loop.evaluated, "births": self._watched.search.births}
            facts["counters"] = self._watched.counters()
            if (leader := self._watched.search.leader) is not None:
                facts |= {"best": leader[0], "expression": leader[1]}
        return facts

    def _board_says(self, text: str) -> None:
        """Called from the board's thread as well."""
        self._progress.line(text)
        self._run.events("warning", "board_trouble", text=text)
