"""Where a board is kept: opening it, mending its file, checking a database's address, hiding a password."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from evoprune.metrics.errors import InvalidInput

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

LOCK_SECONDS = 5
"""Optuna holds the journal's lock for milliseconds; one that is this old was left by a killed process."""
CONNECT_SECONDS = 10
"""How long a database may take to answer before it counts as away."""

_DRIVER_OPTIONS = {
    "postgresql": {"connect_timeout": CONNECT_SECONDS},
    "mysql": {"connect_timeout": CONNECT_SECONDS},
    "mariadb": {"connect_timeout": CONNECT_SECONDS},
    "sqlite": {"timeout": CONNECT_SECONDS},  # for a lock, while the dashboard reads
}


def open_storage(journal: Path, url: str | None) -> BaseStorage:
    """The database at `url`, or else the journal file, mended if need be.

    Raises:
        Exception: whatever Optuna, SQLAlchemy or the driver raise.
    """
    if url is not None:
        from optuna.storages import RDBStorage

        return RDBStorage(url, engine_kwargs={"pool_pre_ping": True, "connect_args": _connect_args(url)})
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

    # The lock is a link to the file. Were it relative, it would dangle, and Optuna would wait for it forever.
    file = str(journal.resolve())
    repair_journal(journal)
    return JournalStorage(JournalFileBackend(file, JournalFileSymlinkLock(file, grace_period=LOCK_SECONDS)))


def repair_journal(path: Path) -> None:
    """Undo what a killed writer leaves: a lock that would block for half a minute, a torn line that would spoil the
    next one. Only for the process that holds the run's lock."""
    lock = path.with_name(path.name + ".lock")
    with contextlib.suppress(FileNotFoundError):
        if time.time() - lock.lstat().st_mtime > LOCK_SECONDS:
            lock.unlink()
    if not path.exists():
        return
    position = 0
    with path.open("r+b") as file:
        for line in file:
            try:
                if not line.endswith(b"\n"):
                    break
                json.loads(line)
            except ValueError:
                break
            position += len(line)
        file.truncate(position)


def check_storage(url: str, *, reach: bool = True) -> None:
    """Make sure that `--storage URL` can work, before anything heavy starts.

    Args:
        reach: also connect. A run that goes on does without: the board waits for a database that is away.

    Raises:
        InvalidInput: not a database URL, its driver is not installed, or it cannot be reached.
    """
    import sqlalchemy

    try:
        parsed = sqlalchemy.make_url(url)
    except sqlalchemy.exc.ArgumentError:
        raise InvalidInput(
            "--storage is not a database URL; examples: sqlite:///board.db, postgresql+psycopg://user@host/name"
        ) from None
    shown = parsed.render_as_string(hide_password=True)
    try:
        engine = sqlalchemy.create_engine(url, connect_args=_connect_args(url))
        if reach:
            with engine.connect():
                pass
        engine.dispose()
    except ImportError as problem:
        raise InvalidInput(f"--storage {shown} needs the Python package {problem.name!r}; install it") from None
    except sqlalchemy.exc.NoSuchModuleError:
        raise InvalidInput(f"--storage {shown}: SQLAlchemy knows no database {parsed.drivername!r}") from None
    except Exception as problem:
        line = without_password(str(problem).splitlines()[0][:300], url)
        raise InvalidInput(f"--storage {shown} cannot be reached: {line}") from None


def without_password(text: str, url: str | None) -> str:
    """`text` with the password of `url`, and the URL itself, hidden."""
    if url is None:
        return text
    import sqlalchemy

    with contextlib.suppress(sqlalchemy.exc.ArgumentError):
        parsed = sqlalchemy.make_url(url)
        text = text.replace(url, parsed.render_as_string(hide_password=True))
        if parsed.password:
            text = text.replace(str(parsed.password), "***")
    return text


def _connect_args(url: str) -> dict[str, int]:
    """What the driver of this database is told about patience."""
    import sqlalchemy

    return dict(_DRIVER_OPTIONS.get(sqlalchemy.make_url(url).get_backend_name(), {}))
