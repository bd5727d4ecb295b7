"""A run's folder: identity and configuration first, then everything that the driver writes, and who may write it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.files import canonical_json, write_atomically
from evoprune.search.engine.commit import CommittedState
from evoprune.search.engine.durable import disk_errors, sync_folder
from evoprune.search.engine.events import LIFE, EventLog
from evoprune.search.engine.lock import RunLock

if TYPE_CHECKING:
    from torch import Tensor

RunState = Literal["running", "interrupted", "finished", "failed"]


def runs_folder() -> Path:
    """Where runs live: `EVOPRUNE_RUNS`, or `runs` below the current folder."""
    return Path(os.environ.get("EVOPRUNE_RUNS") or "runs")


class RunDirectory:
    """One run on disk. `create` and `lock` make this process its driver, the only one that may write.

    Everything that is read back is JSON, YAML or safetensors.

    Args:
        path: a folder that holds a run; `open` finds it by other names.

    Raises:
        InvalidInput: it does not hold one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = RunLock(path / "run.lock")
        self._committed = CommittedState(path)
        self._events = EventLog(path / "events.jsonl")
        try:
            self._identity: dict[str, Any] = json.loads((path / "run.json").read_bytes())
            self.run_id: str = self._identity["run"]
            self.kind: str = self._identity["kind"]
            self.created: str = self._identity["created"]
        except (OSError, ValueError, KeyError, TypeError):
            raise InvalidInput(f"{path} is not a run folder: it has no readable run.json") from None

    # Finding and making

    @classmethod
    def create(
        cls,
        kind: str,
        config: Mapping[str, Any],
        identity: Mapping[str, Any],
        *,
        run_dir: Path | str | None = None,
    ) -> RunDirectory:
        """Make a new run, locked by this process and resumable from now on.

        Args:
            kind: `metric`, `allocation` and so on.
            config: the resolved configuration, kept as `config.yaml`.
            identity: what is known already of versions and hashes, kept in `run.json`; see `add_identity`.
            run_dir: the folder to make; by default one of the run's own name below `runs_folder()`.

        Raises:
            InvalidInput: the folder holds something already, or cannot be written.
        """
        moment = datetime.now(timezone.utc)
        run_id = f"{moment:%Y%m%d-%H%M%S}-{kind}-{secrets.token_hex(2)}"
        path = Path(run_dir) if run_dir is not None else runs_folder() / run_id
        with disk_errors(path):
            made, made_parent = not path.exists(), not path.parent.exists()
            path.mkdir(parents=True, exist_ok=True)
            if not made and any(path.iterdir()):
                raise InvalidInput(
                    f"{path} is not empty; give --run-dir a new folder, or continue a run with `evoprune resume {path}`"
                )
            lock = RunLock(path / "run.lock")
            try:
                lock.acquire()
                write_atomically(path / "config.yaml", _yaml(config))
                known = {**identity, "run": run_id, "kind": kind, "created": moment.isoformat()}
                write_atomically(path / "run.json", _pretty(known))
                sync_folder(path)
                sync_folder(path.parent)
            except BaseException:
                lock.release()
                _remove_contents(path, itself=made)
                if made_parent:
                    with contextlib.suppress(OSError):
                        path.parent.rmdir()
                raise
        run = cls(path)
        run._lock = lock
        run.events("info", "started")
        return run

    @classmethod
    def open(cls, run: Path | str = "latest") -> RunDirectory:
        """An existing run, for reading; `lock` it before writing.

        Args:
            run: a folder, a run's id, or `latest`.

        Raises:
            InvalidInput: there is no such run.
        """
        if str(run) == "latest":
            if not (known := list_runs()):
                raise InvalidInput(f"no run in {runs_folder()} yet; `evoprune search metric` makes one")
            return known[-1]
        for path in (Path(run), runs_folder() / run):
            if path.is_dir():
                return cls(path)
        raise InvalidInput(f"no run {str(run)!r}, neither a folder nor in {runs_folder()}; `evoprune runs` lists them")

    def lock(self) -> None:
        """Become the run's driver.

        Raises:
            InvalidInput: another process is.
        """
        self._lock.acquire()

    def close(self) -> None:
        """Stop being the run's driver."""
        self._committed.close()
        self._lock.release()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What the run is

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration."""
        try:
            found = yaml.safe_load((self.path / "config.yaml").read_text())
        except (OSError, ValueError, yaml.YAMLError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise InvalidInput(f"{self.path / 'config.yaml'} cannot be read")
        return found

    @property
    def identity(self) -> dict[str, Any]:
        """What `run.json` holds: id, kind, time of creation, versions and hashes."""
        return dict(self._identity)

    def add_identity(self, **fields: Any) -> None:
        """Record what became known (the model's hash, say), or check that it is what was recorded.

        Raises:
            InvalidInput: a field is recorded with another value, so going on would make another history.
        """
        fields = json.loads(canonical_json(fields))
        if changed := [name for name, value in fields.items() if self._identity.get(name, value) != value]:
            raise InvalidInput(
                f"{self.run_id} was made with another {' and another '.join(changed)}; restore it, or start a new run "
                f"that reuses the evaluations with `evoprune resume {self.path} --fork`"
            )
        if fields.keys() - self._identity.keys():
            identity = {**self._identity, **fields}
            with disk_errors(self.path):
                write_atomically(self.path / "run.json", _pretty(identity))
            self._identity = identity

    @property
    def state(self) -> RunState:
        """`running` while some process is its driver, then how it ended."""
        if self._lock.is_held():
            return "running"
        if self.result is not None:
            return "finished"
        last = self._events.last_of(LIFE)
        return "failed" if last is not None and last["event"] == "failed" else "interrupted"

    @property
    def seconds(self) -> float:
        """How long drivers have worked on the run, all together."""
        if self._lock.is_held():
            return self._events.seconds(until=time.time())
        written = [
            path.stat().st_mtime for name in ("evaluations.wal", "state.json") if (path := self.path / name).exists()
        ]
        return self._events.seconds(until=max(written, default=0.0))

    def phase_seconds(self, phase: str) -> float:
        """How long drivers have been in a phase, all together."""
        return self._events.phase_seconds(phase)

    @property
    def storage(self) -> str | None:
        """Where the last driver kept the board: a database's URL, its password hidden; None for the run's own file."""
        last = self._events.last_of(("board",))
        return None if last is None else last.get("storage")

    # What the search writes

    def commit(
        self, history_lines: Sequence[str], state: Mapping[str, Any], arrays: Mapping[str, Tensor] | None = None
    ) -> None:
        """Make births and the state after them durable; see `CommittedState.commit`."""
        self._committed.commit(history_lines, state, arrays)

    def restore(self) -> dict[str, Any] | None:
        """The state to go on from, or None at the beginning; see `CommittedState.restore`."""
        return self._committed.restore()

    def peek(self) -> dict[str, Any] | None:
        """The last committed state, for readers."""
        return self._committed.peek()

    def arrays(self) -> dict[str, Tensor]:
        """The arrays of the last committed state."""
        return self._committed.arrays()

    def history(self) -> Iterator[dict[str, Any]]:
        """The committed births, oldest first."""
        return self._committed.history()

    def events(self, level: str, event: str, **fields: Any) -> None:
        """Note that something happened, with the time. Never fails, and nothing depends on it."""
        self._events.add(level, event, **fields)

    def read_events(self) -> Iterator[dict[str, Any]]:
        """The notes, oldest first."""
        return self._events.read()

    def beat(self) -> None:
        """Show other machines, which may not see our lock, that the driver is alive."""
        self._lock.beat()

    def tail_events(self, position: int) -> tuple[list[dict[str, Any]], int]:
        """The notes from a byte position of the file on, and the position after them."""
        return self._events.tail(position)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write `result.json`, which finishes the run.

        Raises:
            FileExistsError: it is finished already.
            InvalidInput: the disk is full or read-only.
        """
        path = self.path / "result.json"
        if path.exists():
            raise FileExistsError(path)
        with disk_errors(path):
            write_atomically(path, _pretty(result))
            sync_folder(self.path)
        self.events("info", "finished")

    @property
    def result(self) -> dict[str, Any] | None:
        """What `write_result` wrote, or None."""
        try:
            found = json.loads((self.path / "result.json").read_bytes())
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or "best" not in found:
            raise InvalidInput(f"{self.path / 'result.json'} is damaged: it is not what evoprune wrote")
        return found


def list_runs(parent: Path | None = None) -> list[RunDirectory]:
    """The runs of a folder, oldest first; what is no run is passed over."""
    folder = parent or runs_folder()
    runs = []
    for path in folder.iterdir() if folder.is_dir() else ():
        with contextlib.suppress(InvalidInput):
            runs.append(RunDirectory(path))
    return sorted(runs, key=lambda run: (run.created, run.run_id))


def _pretty(data: Mapping[str, Any]) -> str:
    """JSON for files that people open."""
    return json.dumps(json.loads(canonical_json(data)), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _yaml(data: Mapping[str, Any]) -> str:
    return yaml.safe_dump(json.loads(canonical_json(data)), sort_keys=False, allow_unicode=True)


def _remove_contents(path: Path, *, itself: bool) -> None:
    """Undo a failed creation."""
    if itself:
        shutil.rmtree(path, ignore_errors=True)
        return
    for name in ("run.json", "config.yaml", "run.lock"):
        (path / name).unlink(missing_ok=True)
