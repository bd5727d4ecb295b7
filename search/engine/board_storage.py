"""Where a board is kept: mending its file, checking a database's address, hiding a password."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from evoprune.metrics.errors import InvalidInput


def repair_journal(path: Path) -> None:
    """Undo what a killed writer leaves: a lock that would block for half a minute, a torn line that would spoil the
    next one. Only for the process that holds the run's lock."""
    path.with_name(path.name + ".lock").unlink(missing_ok=True)
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


def check_storage(url: str) -> None:
    """Make sure that `--storage URL` can work, before anything heavy starts.

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
        engine = sqlalchemy.create_engine(url)
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
