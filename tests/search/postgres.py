"""A PostgreSQL server of a test's own: started as an unprivileged user, on a socket in a temporary folder."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

REQUIRED = "EVOPRUNE_REQUIRE_POSTGRES"
"""Set where a missing server is a failure and no reason to skip."""
PASSWORD = "correct-horse"


def find_program(name: str) -> Path | None:
    """A program of the server; Debian keeps them out of the path."""
    on_path = shutil.which(name)
    if on_path is not None:
        return Path(on_path).resolve()
    return max(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), default=None)


class Postgres:
    """A server that can be stopped and started again.

    Args:
        folder: for data and socket; short, for a socket's path may have a hundred characters.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._data = folder / "data"
        password = folder / "password"
        password.write_text(PASSWORD)
        self._user: list[str] = []
        if os.geteuid() == 0:  # the server refuses to run as root
            names = {entry.pw_name for entry in pwd.getpwall()}
            user = "postgres" if "postgres" in names else "nobody"
            self._user = ["runuser", "-u", user, "--"]
            for path in (folder, password):
                shutil.chown(path, user)
        self._run("initdb", "-D", self._data, "-U", "evoprune", "-A", "scram-sha-256", f"--pwfile={password}")
        self.url = f"postgresql+psycopg://evoprune:{PASSWORD}@/postgres?host={folder}"

    def start(self) -> None:
        """Returns when the server takes connections."""
        options = f"-k {self._folder} -c listen_addresses='' -c fsync=off"
        self._run("pg_ctl", "-D", self._data, "-o", options, "-l", self._folder / "log", "-w", "start")

    def stop(self) -> None:
        """Breaks every connection."""
        self._run("pg_ctl", "-D", self._data, "-m", "fast", "-w", "stop")

    def _run(self, name: str, *words: object) -> None:
        program = find_program(name)
        assert program is not None
        # Not to a pipe: the server would keep it open.
        with (self._folder / f"{name}.out").open("w") as output:
            command = [*self._user, str(program), *map(str, words)]
            subprocess.run(command, check=True, cwd=self._folder, stdout=output, stderr=output, timeout=120)


@contextmanager
def running_postgres() -> Iterator[Postgres]:
    """A running server, or the test is skipped where there is none and none is required."""
    if find_program("initdb") is None:
        if os.environ.get(REQUIRED):
            pytest.fail(f"{REQUIRED} is set, but there is no initdb")
        pytest.skip("no PostgreSQL server here: there is no initdb (Debian: apt-get install postgresql)")
    folder = Path(tempfile.mkdtemp(prefix="evoprune-pg-"))
    try:
        server = Postgres(folder)
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
