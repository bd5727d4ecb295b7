"""The Optuna study that the dashboard shows. The only file that imports optuna.

A projection of the run's history: one trial per evaluated candidate, and a second study with the points of the front.
It may lag, fail or get lost without any harm to the search, and is brought up to date from the history.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evoprune.metrics.errors import InvalidInput
from evoprune.search.engine.background import Background
from evoprune.search.engine.board_storage import repair_journal, without_password
from evoprune.search.engine.trial_record import Range, TrialRecord, fits, plain

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

CAPACITY = 20_000
"""Trials that may wait for a slow or absent storage before the board gives up until the next rebuild."""


class Board:
    """Writes a run's studies without ever making the search wait.

    The caller holds the run's lock: nobody else writes to these studies.

    Args:
        run_dir: the run folder; the default storage is its `optuna.log`.
        study_name: the run's id. The front's study is `<study_name>/front`.
        storage_url: a database to use instead: SQLite, PostgreSQL or MySQL, as SQLAlchemy writes it.
        descriptors: name and range of every descriptor; the same for a run's whole life.
        warn: receives one line for people when the board is in trouble, at most once per outage.
    """

    def __init__(
        self,
        run_dir: Path,
        study_name: str,
        storage_url: str | None = None,
        *,
        descriptors: Mapping[str, Range] | None = None,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._journal = run_dir / "optuna.log"
        self._name = study_name
        self._url = storage_url
        self._descriptors = dict(descriptors or {})
        self._warn = warn
        self._studies: _Studies | None = None
        self._counts = [0, 0]  # trials and points of the front that were asked for
        self._in_trouble = False
        self._lost = False
        self._background = Background("board", CAPACITY, self._failed)

    def add(self, record: TrialRecord) -> None:
        """Add the next candidate; candidates come in the order of the history."""
        trial, point = self._take_numbers(record)
        self._put(lambda: self._write([(trial, point, record)]))

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Set attributes of the study: hashes, versions, the model's name."""
        cleaned = plain(attributes)
        self._put(lambda: self._open().set_attributes(cleaned))

    def set_counters(self, counters: Mapping[str, int]) -> None:
        """Publish how many births each reason code has stopped; those are no trials."""
        self.set_attributes({"counters": dict(counters)})

    def note(self, markdown: str) -> None:
        """Replace the study's note, which the dashboard renders with formulas and tables."""
        self._put(lambda: self._open().note(markdown))

    def resume(self, records: Iterable[TrialRecord]) -> None:
        """Before the first `add` of a resumed run: bring the studies in line with the whole history so far."""
        numbered = [(*self._take_numbers(record), record) for record in records]

        def bring_up_to_date() -> None:
            try:
                self._open().add_all(numbered)
            except OSError:
                raise
            except Exception as problem:
                if self._url is not None and not isinstance(problem, _OtherTrial):
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

    def close(self, timeout: float = 30.0) -> bool:
        """Write what waits, for at most `timeout` seconds. False if the board is incomplete."""
        complete = self._background.close(timeout) and not self._lost
        if not complete:
            self._warn("the board is incomplete; `evoprune dashboard RUN --rebuild` writes it again from the history")
        return complete

    def _take_numbers(self, record: TrialRecord) -> tuple[int, int]:
        """The numbers that the record's trial and its point of the front will have."""
        numbers = (self._counts[0], self._counts[1])
        self._counts[0] += 1
        self._counts[1] += record.enters_front
        return numbers

    def _write(self, numbered: list[_Numbered]) -> None:
        """Add trials, unless the studies turn out to be another history's: then nothing more is written."""
        try:
            self._open().add_all(() if self._lost else numbered)
        except _OtherTrial as problem:
            self._lost = True
            self._failed(problem)

    def _put(self, call: Callable[[], None]) -> None:
        def call_and_recover() -> None:
            call()
            self._in_trouble = False

        if not self._lost and not self._background.put(call_and_recover):
            self._lost = True  # what follows would get the wrong numbers

    def _failed(self, problem: Exception) -> None:
        """Note a failed write; the next attempt opens the storage anew."""
        self._studies = None
        if not self._in_trouble:
            self._in_trouble = True
            self._warn(f"the board is behind: {self._describe(problem)}; the search goes on")

    def _open(self) -> _Studies:
        if self._studies is None:
            self._studies = _Studies(self._storage(), self._name, self._descriptors)
        return self._studies

    def _storage(self) -> BaseStorage:
        if self._url is not None:
            return _database(self._url)
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        repair_journal(self._journal)
        return JournalStorage(JournalFileBackend(str(self._journal)))

    def _erase(self) -> None:
        """Delete both studies."""
        self._studies = None
        if self._url is None:
            self._journal.unlink(missing_ok=True)
            return
        import optuna

        for name in (self._name, f"{self._name}/front"):
            with contextlib.suppress(KeyError):
                optuna.delete_study(study_name=name, storage=_database(self._url))

    def _describe(self, problem: Exception) -> str:
        """One line about a failure, without passwords."""
        return without_password(f"{type(problem).__name__}: {problem}".splitlines()[0][:300], self._url)


_Numbered = tuple[int, int, TrialRecord]


class _OtherTrial(Exception):
    """The storage holds another trial under this number."""


class _Studies:
    """Both studies of a run, open. Adding a trial that is there already changes nothing, so adding can be repeated."""

    def __init__(self, storage: BaseStorage, name: str, descriptors: Mapping[str, Range]) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._descriptors = descriptors
        self._distributions = {descriptor: _distribution(allowed) for descriptor, allowed in descriptors.items()}
        self._main = _study(storage, name, ["fitness"])
        self._front = _study(storage, f"{name}/front", ["fitness", "complexity"])
        self._known = {
            study.study_name: [_gist(trial) for trial in study.get_trials(deepcopy=False)]
            for study in (self._main, self._front)
        }

    def add_all(self, numbered: Iterable[_Numbered]) -> None:
        """Add the records' trials, and their points of the front, under their numbers.

        Raises:
            _OtherTrial: a number is taken by another trial.
        """
        for number, point, record in numbered:
            value = record.final_value
            self._add(self._main, number, self._trial(record, None if value is None else [value]))
            if record.enters_front and value is not None:
                self._add(self._front, point, self._trial(record, [value, float(record.attributes["complexity"])]))

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Set attributes of the main study."""
        for name, value in attributes.items():
            self._main.set_user_attr(name, value)

    def note(self, markdown: str) -> None:
        """Replace the main study's note, if the dashboard is installed, whose format that is."""
        with contextlib.suppress(ImportError):
            from optuna_dashboard import save_note

            save_note(self._main, markdown)

    def _add(self, study: Study, number: int, trial: FrozenTrial) -> None:
        known = self._known[study.study_name]
        if number < len(known):
            if known[number] != _gist(trial):
                raise _OtherTrial(f"trial {number} of {study.study_name} is not the one in the history")
            return
        if number > len(known):
            raise _OtherTrial(f"trial {len(known)} of {study.study_name} is missing")
        study.add_trial(trial)
        known.append(_gist(trial))

    def _trial(self, record: TrialRecord, values: list[float] | None) -> FrozenTrial:
        from optuna.trial import TrialState, create_trial

        states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "fail": TrialState.FAIL}
        params = {
            name: value
            for name, value in record.descriptors.items()
            if name in self._descriptors and fits(value, self._descriptors[name])
        }
        rungs = plain({"rungs": {rung: float(value) for rung, value in record.rungs.items()}})["rungs"]
        trial = create_trial(
            state=states[record.final_state],
            values=values,
            params=params,
            distributions={name: self._distributions[name] for name in params},
            user_attrs=plain(record.attributes),
            intermediate_values={int(rung): value for rung, value in rungs.items() if not isinstance(value, str)},
        )
        if record.finished is not None:  # Optuna's times are local and naive
            trial.datetime_complete = datetime.fromtimestamp(record.finished)
            trial.datetime_start = datetime.fromtimestamp(record.started or record.finished)
        return trial


def _study(storage: BaseStorage, name: str, metrics: list[str]) -> Study:
    """Open or create a study that minimises `metrics`."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            directions=["minimize"] * len(metrics),
            sampler=optuna.samplers.RandomSampler(),
            load_if_exists=True,
        )
        if study.metric_names != metrics:
            study.set_metric_names(metrics)
    return study


def _gist(trial: FrozenTrial) -> tuple[Any, ...]:
    """What tells one trial from another."""
    return (trial.state, tuple(trial.values or ()), json.dumps(trial.user_attrs, sort_keys=True))


def _distribution(allowed: Range) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(allowed, list):
        return CategoricalDistribution(allowed)
    low, high = allowed
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high)
    return FloatDistribution(low, high)


def _database(url: str) -> BaseStorage:
    from optuna.storages import RDBStorage

    return RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
