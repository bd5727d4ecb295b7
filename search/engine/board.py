"""The Optuna study that the dashboard shows, written in the background.

A projection of the run's history: one trial per evaluated candidate, and a second study with the points of the front.
It may lag, fail or get lost without any harm to the search, and is brought up to date from the history.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evoprune.metrics.errors import InvalidInput
from evoprune.search.engine.background import Background
from evoprune.search.engine.board_storage import open_storage, without_password
from evoprune.search.engine.board_studies import Numbered, OtherTrial, Studies, erase
from evoprune.search.engine.trial_record import Range, TrialRecord, plain

CAPACITY = 20_000
"""Trials that may wait for a slow or absent storage before the board gives up until the next rebuild."""


class Board:
    """Writes a run's studies without ever making the search wait.

    The caller holds the run's lock: nobody else writes to these studies.

    Args:
        run_dir: the run folder; the default storage is its `optuna.log`, and artifacts go to its `artifacts`.
        study_name: the run's id. The front's study is `<study_name>/front`.
        storage_url: a database to use instead: SQLite, PostgreSQL or MySQL, as SQLAlchemy writes it.
        descriptors: name and range of every descriptor; the same for a run's whole life.
        prices: what fitness is bought with on the front.
        warn: receives one line for people when the board gets into trouble and when it is out of it; from any thread.
    """

    def __init__(
        self,
        run_dir: Path,
        study_name: str,
        storage_url: str | None = None,
        *,
        descriptors: Mapping[str, Range] | None = None,
        prices: Sequence[str] = ("complexity",),
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._journal = run_dir / "optuna.log"
        self._artifacts = run_dir / "artifacts"
        self._name = study_name
        self._url = storage_url
        self._descriptors = dict(descriptors or {})
        self._prices = tuple(prices)
        self._warn = warn
        self._studies: Studies | None = None
        self._counts = [0, 0]  # trials and points of the front that were asked for
        self._in_trouble = False
        self._lost = False
        self._latest: dict[str, Any] = {}  # attributes of the study, and its note, that wait to be written
        self._note: str | None = None
        self._latest_waits = False
        self._latest_lock = threading.Lock()
        self._background = Background("board", CAPACITY, self._failed)

    def add(self, record: TrialRecord) -> None:
        """Add the next candidate; candidates come in the order of the history."""
        trial, point = self._take_numbers(record)
        self._put(lambda: self._write([(trial, point, record)]))

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Set attributes of the study: hashes, versions, counters. Of two values that wait the later is written."""
        self._replace(plain(attributes), None)

    def note(self, markdown: str) -> None:
        """Replace the study's note, Markdown that the dashboard renders; see `Studies.note`."""
        self._replace({}, markdown)

    def publish(self, markdown: str, artifacts: Sequence[Path]) -> None:
        """Copy files, which must stay until `close`, to the study's artifacts, then replace the note."""

        def write() -> None:
            studies = self._open()
            for path in artifacts:
                studies.add_artifact(path)
            studies.note(markdown)  # only now, for it may refer to them

        self._put(write)

    def resume(self, records: Iterable[TrialRecord]) -> None:
        """Before the first `add` of a resumed run: bring the studies in line with the whole history so far."""
        numbered = [(*self._take_numbers(record), record) for record in records]

        def bring_up_to_date() -> None:
            try:
                self._open().add_all(numbered)
            except OSError:
                raise
            except Exception as problem:
                if self._url is not None and not isinstance(problem, OtherTrial):
                    raise  # the database is away; a file that cannot be read is damaged
                self._erase()
                self._open().add_all(numbered)

        self._put(bring_up_to_date)

    def rebuild(self, records: Iterable[TrialRecord]) -> None:
        """Write the studies anew from the whole history, now and in this thread.

        Raises:
            InvalidInput: the storage cannot be written.
        """
        self._counts = [0, 0]
        try:
            self._erase()
            self._open().add_all((*self._take_numbers(record), record) for record in records)
        except Exception as problem:
            raise InvalidInput(f"the board cannot be rebuilt: {self._describe(problem)}") from None

    def close(self, patience: float = 30.0, enough: Callable[[], bool] = lambda: False) -> bool:
        """Write what waits; see `Background.close`. False if the board is incomplete."""
        complete = self._background.close(patience, enough) and not self._lost
        if not complete:
            self._warn("the board is incomplete; `evoprune dashboard RUN --rebuild` writes it again from the history")
        return complete

    def _take_numbers(self, record: TrialRecord) -> tuple[int, int]:
        """The numbers that the record's trial and its point of the front will have."""
        numbers = (self._counts[0], self._counts[1])
        self._counts[0] += 1
        self._counts[1] += record.enters_front
        return numbers

    def _write(self, numbered: list[Numbered]) -> None:
        """Add trials, unless the studies turn out to be another history's: then nothing more is written."""
        try:
            self._open().add_all(() if self._lost else numbered)
        except OtherTrial as problem:
            self._lost = True
            self._failed(problem)

    def _replace(self, attributes: dict[str, Any], note: str | None) -> None:
        """Have the latest values written; while the storage is away they wait as one call, not as hundreds."""
        with self._latest_lock:
            waiting, self._latest_waits = self._latest_waits, True
            self._latest.update(attributes)
            self._note = self._note if note is None else note
        if not waiting:
            self._put(self._write_latest)

    def _write_latest(self) -> None:
        """Write attributes and note until none is left that came in meanwhile."""
        while True:
            with self._latest_lock:
                attributes, note = self._latest, self._note
                self._latest, self._note = {}, None
                self._latest_waits = bool(attributes) or note is not None
                if not self._latest_waits:
                    return
            try:
                studies = self._open()
                studies.set_attributes(attributes)
                if note is not None:
                    studies.note(note)
            except Exception:
                with self._latest_lock:
                    self._latest = {**attributes, **self._latest}
                    self._note = note if self._note is None else self._note
                raise

    def _put(self, call: Callable[[], None]) -> None:
        def call_and_recover() -> None:
            call()
            if self._in_trouble and not self._lost:
                self._in_trouble = False
                self._warn("the board's storage answers again")

        if not self._lost and not self._background.put(call_and_recover):
            self._lost = True  # what follows would get the wrong numbers

    def _failed(self, problem: Exception) -> None:
        """Note a failed write; the next attempt opens the storage anew."""
        self._studies = None
        if not self._in_trouble:
            self._in_trouble = True
            self._warn(f"the board is behind: {self._describe(problem)}; the search goes on")

    def _open(self) -> Studies:
        if self._studies is None:
            storage = open_storage(self._journal, self._url)
            self._studies = Studies(storage, self._name, self._descriptors, self._artifacts, self._prices)
        return self._studies

    def _erase(self) -> None:
        """Delete both studies and their artifacts."""
        self._studies = None
        if self._url is not None:
            erase(open_storage(self._journal, self._url), self._name, self._artifacts)
            return
        if self._journal.exists():
            with contextlib.suppress(Exception):  # a file that cannot be read goes all the same
                erase(open_storage(self._journal, None), self._name, self._artifacts)
        self._journal.unlink(missing_ok=True)

    def _describe(self, problem: BaseException) -> str:
        """One line about a failure, without passwords."""
        problem = problem.__cause__ or problem  # Optuna calls a lost connection invalid data
        return without_password(f"{type(problem).__name__}: {problem}", self._url).splitlines()[0][:300]
