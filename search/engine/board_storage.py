"""Where a board is kept: opening it, mending its file, checking a database's address, hiding a password."""

from __future__ import annotations

import contextlib
import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, quote_plus, unquote, unquote_plus

from evoprune.metrics.errors import InvalidInput

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

LOCK_SECONDS = 5
"""Optuna holds the journal's lock for milliseconds; one that is this old was left by a killed process."""
CONNECT_SECONDS = 10
"""How long a database may take to answer before it counts as away."""

_MASK = "***"
_USER_PASSWORD = re.compile(r"(://[^:/?@]*:)([^@]*)@")
# What drivers call it in a query: libpq password and sslpassword, MySQL's passwd and ssl_key_password, ODBC's pwd.
_QUERY_PASSWORD = re.compile(r"([?&;][^=&;]*(?:password|passwd|passphrase|pass|pwd|secret|token)=)([^&]*)", re.I)

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
        InvalidInput: not a database URL or a wrongly written one, its driver is not installed, or it cannot be reached.
    """
    import sqlalchemy

    try:
        parsed = sqlalchemy.make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError):  # the latter of a port that is no number
        raise InvalidInput(
            "--storage is not a database URL; examples: sqlite:///board.db, postgresql+psycopg://user@host/name"
        ) from None
    if "@" in (parsed.host or ""):
        raise InvalidInput("--storage has an @ in its password, which must be written as %40")
    shown = without_password(url, url)
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
        line = without_password(str(problem), url).splitlines()[0][:300]
        raise InvalidInput(f"--storage {shown} cannot be reached: {line}") from None


def without_password(text: str, url: str | None) -> str:
    """`text` with the passwords of `url` hidden, wherever the URL or a password alone stands in it.

    A password alone is looked for as it is typed, decoded and encoded. One of two or three characters must be a word of
    its own, and one of a single character is hidden in the URL only: it would be found everywhere.
    """
    if not url:
        return text
    shown = _QUERY_PASSWORD.sub(rf"\1{_MASK}", _USER_PASSWORD.sub(rf"\1{_MASK}@", url))
    return shown.join(_hidden(part, url) for part in text.split(url))


def lacks_password(url: str) -> bool:
    """Whether `url` has come from `without_password`, and no longer opens its database."""
    return _MASK in url


def absolute_storage(url: str) -> str:
    """`url`, with the path of an SQLite file from the root, so that it means the same file in every folder.

    Args:
        url: one that `check_storage` takes.
    """
    import sqlalchemy

    parsed = sqlalchemy.make_url(url)
    file = parsed.database
    if parsed.get_backend_name() != "sqlite" or not file or file.startswith(("/", ":memory:", "file:")):
        return url
    return parsed.set(database=str(Path(file).absolute())).render_as_string(hide_password=False)


def _hidden(text: str, url: str) -> str:
    """`text`, in which `url` does not stand, without the passwords of `url`."""
    found = (_USER_PASSWORD.search(url), *_QUERY_PASSWORD.finditer(url))
    typed = {match[2] for match in found if match is not None}
    plain = typed | {unquote(secret) for secret in typed} | {unquote_plus(secret) for secret in typed}
    secrets = plain | {quote(secret, safe="") for secret in plain} | {quote_plus(secret) for secret in plain}
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) > 1:
            bounds = ("", "") if len(secret) > 3 else (r"(?<!\w)", r"(?!\w)")
            text = re.sub(re.escape(secret).join(bounds), _MASK, text)
    return text


def _connect_args(url: str) -> dict[str, int]:
    """What the driver of this database is told about patience."""
    import sqlalchemy

    return dict(_DRIVER_OPTIONS.get(sqlalchemy.make_url(url).get_backend_name(), {}))
