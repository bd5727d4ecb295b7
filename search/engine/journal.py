"""The evaluation log: every finished evaluation, on disk before anyone acts on it, found again after any crash."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.files import canonical_json
from evoprune.search.engine.durable import AppendFile, disk_errors
from evoprune.search.engine.executor import Outcome


class EvaluationLog:
    """Outcomes by key, kept as lines `crc32 {"k":key,"o":outcome}`; the first outcome of a key counts.

    In memory are only the keys and where their lines begin: a long search asks for each outcome once. Opening keeps
    the longest valid prefix of the file and cuts the rest off: what follows a damaged line may depend on it. One
    process at a time writes it, the one that holds the run's lock.

    Args:
        path: the file; created when missing.

    Raises:
        InvalidInput: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._starts: dict[str, int] = {}
        with disk_errors(path):
            data = path.read_bytes() if path.exists() else b""
            self._file = AppendFile(path, self._read(data))
            self.dropped_bytes = len(data) - self._file.size

    def get(self, key: str) -> Outcome | None:
        """The outcome of `key`, or None.

        Raises:
            InvalidInput: the file was changed since it was opened.
        """
        start = self._starts.get(key)
        return None if start is None else next(self._outcomes_at([start]))

    def __contains__(self, key: object) -> bool:
        return key in self._starts

    def __len__(self) -> int:
        return len(self._starts)

    def outcomes(self) -> Iterator[Outcome]:
        """Every outcome so far, in the order in which they finished; raises as `get` does."""
        yield from self._outcomes_at(list(self._starts.values()))

    def append(self, key: str, outcome: Outcome) -> None:
        """Keep an outcome for good; a second one for the same key is dropped.

        Raises:
            InvalidInput: the disk is full or read-only; the log is as before.
        """
        self.extend({key: outcome})

    def extend(self, outcomes: Mapping[str, Outcome]) -> None:
        """Keep several outcomes for good, with one flush to disk for all; see `append`."""
        lines = {key: _line(key, outcome) for key, outcome in outcomes.items() if key not in self._starts}
        if not lines:
            return
        start = self._file.size
        with disk_errors(self.path):
            self._file.append(b"".join(lines.values()))
        for key, line in lines.items():
            self._starts[key] = start
            start += len(line)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _read(self, data: bytes) -> int:
        """Take in the valid lines at the start of `data` and return how many bytes they are."""
        position = 0
        while (end := data.find(b"\n", position) + 1) > 0:
            entry = _parse(data[position : end - 1])
            if entry is None:
                break
            self._starts.setdefault(entry[0], position)
            position = end
        return position

    def _outcomes_at(self, starts: Sequence[int]) -> Iterator[Outcome]:
        with self.path.open("rb") as file:
            for start in starts:
                file.seek(start)
                entry = _parse(file.readline().removesuffix(b"\n"))
                if entry is None:
                    raise InvalidInput(f"{self.path} was changed while it was in use; stop whatever else writes it")
                yield entry[1]


def _line(key: str, outcome: Outcome) -> bytes:
    text = canonical_json({"k": key, "o": outcome.to_json()}).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parse(line: bytes) -> tuple[str, Outcome] | None:
    """The key and the outcome of a line without its end, or None if it is damaged."""
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        return None
    try:
        entry = json.loads(text)
        return entry["k"], Outcome.from_json(entry["o"])
    except (ValueError, KeyError, TypeError):
        return None
