"""The evaluation log: every finished evaluation, on disk before anyone acts on it, found again after any crash."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from evoprune.metrics.files import canonical_json
from evoprune.search.engine.durable import AppendFile, disk_errors
from evoprune.search.engine.executor import Outcome


class EvaluationLog:
    """A cache of outcomes by key, kept as lines `crc32 {"k":key,"o":outcome}`; the first outcome of a key counts.

    Opening keeps the longest valid prefix of the file and cuts the rest off: what follows a damaged line may depend
    on it. One process at a time writes it, the one that holds the run's lock.

    Args:
        path: the file; created when missing.

    Raises:
        InvalidInput: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._outcomes: dict[str, Outcome] = {}
        with disk_errors(path):
            data = path.read_bytes() if path.exists() else b""
            self._file = AppendFile(path, self._read(data))
            self.dropped_bytes = len(data) - self._file.size

    def get(self, key: str) -> Outcome | None:
        """The outcome of `key`, or None."""
        return self._outcomes.get(key)

    def __contains__(self, key: object) -> bool:
        return key in self._outcomes

    def __len__(self) -> int:
        return len(self._outcomes)

    def outcomes(self) -> Iterator[Outcome]:
        """Every outcome, in the order in which they finished."""
        yield from self._outcomes.values()

    def append(self, key: str, outcome: Outcome) -> None:
        """Keep an outcome for good; a second one for the same key is dropped.

        Raises:
            InvalidInput: the disk is full or read-only; the log is as before.
        """
        self.extend({key: outcome})

    def extend(self, outcomes: Mapping[str, Outcome]) -> None:
        """Keep several outcomes for good, with one flush to disk for all; see `append`."""
        new = {key: outcome for key, outcome in outcomes.items() if key not in self._outcomes}
        if not new:
            return
        with disk_errors(self.path):
            self._file.append(b"".join(_line(key, outcome) for key, outcome in new.items()))
        self._outcomes.update(new)

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
            self._outcomes.setdefault(*entry)
            position = end
        return position


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
