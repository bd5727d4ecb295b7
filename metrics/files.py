"""Atomic files, canonical JSON and counter-based seeds: small things that every layer above uses."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

from evoprune.metrics.errors import InvalidInput


def canonical_json(value: Any) -> str:
    """`value` as JSON with sorted keys and no spaces, equal for equal values.

    Raises:
        ValueError: `value` holds a NaN or an infinity.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def content_hash(value: Any) -> str:
    """sha256 of the canonical JSON of `value`, in hex."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def user_path(text: str | Path) -> Path:
    """A path as a person types it, with ``~`` expanded.

    Raises:
        InvalidInput: it begins with the home of somebody who has none here.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise InvalidInput(f"no home folder for {Path(text).parts[0]!r}: give the whole path") from None


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write a whole file or nothing: a temporary file beside it, flushed to disk, then renamed over it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        with partial.open("wb") as stream:
            stream.write(data.encode() if isinstance(data, str) else data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def derived_seed(seed: int, stream: str, index: int = 0) -> int:
    """A 63-bit seed that depends on nothing but its arguments, so that no generator state needs to be saved."""
    digest = hashlib.sha256(f"{seed}/{stream}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
