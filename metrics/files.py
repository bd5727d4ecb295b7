"""Atomic files, canonical JSON and counter-based seeds: small things that every layer above uses."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

from evoprune.metrics.errors import InvalidInput

# What people name is small; reading a disk image by mistake should not take all memory.
_MAX_BYTES = 20_000_000


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


def user_text(path: str | Path, what: str, wanted: str, instead: str) -> str:
    """The text of a file that a person named.

    Args:
        path: as it was typed.
        what: the thing that the file should hold, such as ``allocation``.
        wanted: what to give, such as ``an allocation's .json``.
        instead: what to give if there is no such file.

    Raises:
        InvalidInput: there is no such file, it cannot be read, it is no UTF-8, or it is far too long.
    """
    shown = str(path)[:200]
    try:
        place = user_path(path)
        if not place.is_file():
            raise InvalidInput(f"no file {shown!r}; give {instead}")
        with place.open("rb") as stream:
            data = stream.read(_MAX_BYTES + 1)
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidInput(f"{shown!r} is no text file; give {wanted}") from None
    except (OSError, ValueError) as error:
        raise InvalidInput(f"cannot read {shown!r}: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > _MAX_BYTES:
        raise InvalidInput(f"{shown!r} is larger than {_MAX_BYTES // 1_000_000} MB, so it is no {what}")
    return text


def strict_json(text: str) -> Any:
    """The value of a JSON document.

    Raises:
        ValueError: it is none, or holds a NaN or an infinity.
    """
    return json.loads(text, parse_constant=_refuse_constant)


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


def _refuse_constant(literal: str) -> float:
    raise ValueError(f"{literal} is no JSON number")
