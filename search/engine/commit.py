"""The search's own state on disk: what was born so far, and what it takes to go on from there, always in step.

A commit appends to `history.jsonl`, writes the arrays, named by their content, and only then replaces `state.json`,
which says how long the history is and names the arrays. Whatever the moment of a crash, the state on disk is that of
some finished commit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evoprune.metrics.errors import EvopruneError, InvalidInput
from evoprune.metrics.files import canonical_json, write_atomically
from evoprune.search.engine.durable import AppendFile, disk_errors, sync_folder

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = 1
BOOKKEEPING = ("schema", "history_bytes", "history_sha256", "arrays")
"""Keys of `state.json` that are not the search's."""
_ANEW = "`evoprune resume RUN --fork` starts a new run that reuses its evaluations"


class CommittedState:
    """`history.jsonl`, `state.json` and `state-<hash>.safetensors` of one run folder.

    Reading needs no lock and changes nothing; `restore` and `commit` are for the process that holds the run's lock.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._history_path = folder / "history.jsonl"
        self._state_path = folder / "state.json"
        self._history: AppendFile | None = None
        self._digest = hashlib.sha256()

    def restore(self) -> dict[str, Any] | None:
        """The state of the last commit, or None before the first; what a crash left behind it is cut off.

        Raises:
            InvalidInput: the files do not belong together, are of another schema, or cannot be written.
        """
        record = self._read_record()
        size = record["history_bytes"] if record else 0
        committed = self._read_history(size)
        self._digest = hashlib.sha256(committed)
        if len(committed) < size or (record and record["history_sha256"] != self._digest.hexdigest()):
            name = self._state_path.name
            raise InvalidInput(f"{self._history_path} is not the one that {name} was written for; {_ANEW}")
        with disk_errors(self._history_path):
            if self._history is not None:
                self._history.close()
            self._history = AppendFile(self._history_path, size)
        with disk_errors(self._folder):
            self._delete_arrays(keep=record["arrays"] if record else None)
        return _without_bookkeeping(record) if record else None

    def commit(
        self, history_lines: Sequence[str], state: Mapping[str, Any], arrays: Mapping[str, Tensor] | None = None
    ) -> None:
        """Make new lines of the history and the state after them durable, together.

        Args:
            history_lines: one JSON text per birth, without its line end.
            state: JSON data, without times and names of machines; replaces the one before.
            arrays: tensors to keep beside the state; they replace the ones before.

        Raises:
            InvalidInput: the disk is full or read-only; the last commit stands.
            ValueError: a key of the state is one of ours, or a line holds a line end.
        """
        if clash := set(BOOKKEEPING) & state.keys():
            raise ValueError(f"reserved keys in the state: {sorted(clash)}")
        if any("\n" in line for line in history_lines):
            raise ValueError("a line of the history holds a line end")
        if self._history is None:
            self.restore()
            assert self._history is not None
        new_bytes = "".join(f"{line}\n" for line in history_lines).encode()
        digest = self._digest.copy()
        digest.update(new_bytes)
        array_bytes, array_file = _serialized(arrays) if arrays else (b"", None)
        record = {
            **state,
            "schema": SCHEMA,
            "history_bytes": self._history.size + len(new_bytes),
            "history_sha256": digest.hexdigest(),
            "arrays": array_file,
        }
        text = canonical_json(record) + "\n"
        try:
            with disk_errors(self._folder):
                self._history.append(new_bytes)
                if array_file is not None:
                    write_atomically(self._folder / array_file, array_bytes)
                write_atomically(self._state_path, text)
                sync_folder(self._folder)
                self._delete_arrays(keep=array_file)
        except BaseException:
            # Which commit stands depends on where it failed, so the files are asked, now and before the next commit.
            self.close()
            with contextlib.suppress(EvopruneError, OSError):
                self.restore()
            raise
        self._digest = digest

    def peek(self) -> dict[str, Any] | None:
        """The state of the last commit, for readers; None before the first."""
        record = self._read_record()
        return _without_bookkeeping(record) if record else None

    def arrays(self) -> dict[str, Tensor]:
        """The arrays of the last commit, on the CPU."""
        from safetensors.torch import load_file

        record = self._read_record()
        return load_file(self._folder / record["arrays"]) if record and record["arrays"] else {}

    def history(self) -> Iterator[dict[str, Any]]:
        """The committed lines of the history, oldest first."""
        record = self._read_record()
        for line in self._read_history(record["history_bytes"] if record else 0).splitlines():
            yield json.loads(line)

    def close(self) -> None:
        """Close the history."""
        if self._history is not None:
            self._history.close()
            self._history = None

    def _read_record(self) -> dict[str, Any] | None:
        try:
            record = json.loads(self._state_path.read_bytes())
            schema = record["schema"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            raise InvalidInput(f"{self._state_path} is damaged; {_ANEW}") from None
        if schema != SCHEMA:
            raise InvalidInput(f"{self._state_path} has schema {schema}, this version reads {SCHEMA}; {_ANEW}")
        return record

    def _read_history(self, size: int) -> bytes:
        """At most the first `size` bytes of the history."""
        if size == 0:
            return b""
        try:
            with self._history_path.open("rb") as stream:
                return stream.read(size)
        except FileNotFoundError:
            return b""

    def _delete_arrays(self, keep: str | None) -> None:
        """Remove the arrays that no state refers to, and files that a crash left half-written."""
        for pattern in ("state-*.safetensors", ".state*.part"):
            for path in self._folder.glob(pattern):
                if path.name != keep:
                    path.unlink(missing_ok=True)


def _serialized(arrays: Mapping[str, Tensor]) -> tuple[bytes, str]:
    """The bytes of a safetensors file and its name, which follows from them."""
    from safetensors.torch import save

    data = save({key: tensor.detach().cpu().contiguous() for key, tensor in arrays.items()})
    return data, f"state-{hashlib.sha256(data).hexdigest()[:16]}.safetensors"


def _without_bookkeeping(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in BOOKKEEPING}
