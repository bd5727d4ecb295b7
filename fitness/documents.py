"""Reading the user's text: plain files, JSON lines, Parquet, Hugging Face datasets, and folders of these."""

from __future__ import annotations

import gzip
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from evoprune.fitness.cache import cache_folder
from evoprune.fitness.hub import one_line, silence
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.files import content_hash, user_path, write_atomically

TEXT_SUFFIXES = (".txt", ".py", ".md")
ROW_SUFFIXES = (".jsonl", ".json", ".parquet")
# Of a larger source the first part is read: some four million tokens, many times what a search looks at.
MAX_CHARACTERS = 1 << 24
# Data sets such as WikiText hold one line a row; rows that are shorter on average are joined into one text.
LINE_CHARACTERS = 400


def read_documents(source: str) -> list[str]:
    """The documents of a user's source in a fixed order, at most about `MAX_CHARACTERS` in all.

    Args:
        source: a text file; a file of rows with the field ``text`` (JSON lines, also gzipped, or Parquet); a folder,
            searched for all of these; or a data set as ``name``, ``name:split`` or ``name:config:split``.

    Raises:
        InvalidInput: there is no such source, or it cannot be read.
    """
    path = user_path(source)
    try:
        if path.is_file():
            return _capped(_read_file(path))
        if path.is_dir():
            return _read_folder(path)
    except OSError as error:
        raise InvalidInput(f"{source} cannot be read: {error.strerror or error}") from error
    if source[:1] in (".", "/", "~") or _suffix(path) in TEXT_SUFFIXES + ROW_SUFFIXES:
        raise InvalidInput(f"no text {source[:200]!r}: there is no such file or folder")
    return _read_dataset(source)


def _read_folder(folder: Path) -> list[str]:
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return _join_lines(_capped(_texts(_load_saved(folder), str(folder))))
    files = sorted(
        (Path(parent) / name for parent, _, names in os.walk(folder) for name in names if _is_text(Path(name))),
        key=lambda file: file.relative_to(folder).as_posix(),
    )
    documents = _capped(document for file in files for document in _read_file(file))
    if not documents:
        raise InvalidInput(f"folder {folder} holds no text in {', '.join(TEXT_SUFFIXES + ROW_SUFFIXES)} files")
    return documents


def _is_text(file: Path) -> bool:
    return not file.name.startswith(".") and _suffix(file) in (*TEXT_SUFFIXES, ".jsonl", ".parquet")


def _suffix(file: Path) -> str:
    return Path(file.stem).suffix.lower() if file.suffix.lower() == ".gz" else file.suffix.lower()


def _read_file(file: Path) -> list[str]:
    suffix = _suffix(file)
    if suffix in TEXT_SUFFIXES and file.suffix.lower() != ".gz":
        with file.open(encoding="utf-8-sig", errors="replace") as stream:
            return [stream.read(MAX_CHARACTERS)]
    if suffix in (".jsonl", ".json"):
        return _join_lines(_capped(_json_lines(file)))
    if suffix == ".parquet":
        return _join_lines(_capped(_parquet_rows(file)))
    known = ", ".join(TEXT_SUFFIXES + ROW_SUFFIXES)
    raise InvalidInput(f"{file} is no text that evoprune reads: give a file that ends in {known}")


def _json_lines(file: Path) -> Iterator[str]:
    opener = gzip.open if file.suffix.lower() == ".gz" else open
    with opener(file, "rt", encoding="utf-8") as stream:
        try:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                    raise InvalidInput(f"{file} line {number} is no JSON object with a string field 'text'")
                yield row["text"]
        except (ValueError, RecursionError, EOFError):  # no JSON, no UTF-8, nested too deeply, cut short
            raise InvalidInput(f"{file} is damaged: give one JSON object a line, each with a field 'text'") from None


def _parquet_rows(file: Path) -> Iterator[str]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InvalidInput("reading Parquet needs pyarrow: pip install 'evoprune[data]'") from None
    try:
        table = ParquetFile(file)
        if "text" not in table.schema_arrow.names:
            raise InvalidInput(f"{file} has no column 'text', only {', '.join(table.schema_arrow.names)[:200]}")
        for batch in table.iter_batches(batch_size=1024, columns=["text"]):
            yield from (str(text) for text in batch.column(0).to_pylist() if text is not None)
    except ArrowException as error:
        raise InvalidInput(f"{file} is no Parquet file: {one_line(error)}") from error


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        return None
    return datasets


def _load_saved(folder: Path) -> Any:
    datasets = _datasets()
    if datasets is None:
        raise InvalidInput(f"reading the data set in {folder} needs datasets: pip install 'evoprune[data]'")
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise InvalidInput(f"the data set in {folder} cannot be read: {one_line(error)}") from error
    if isinstance(loaded, dict):
        return loaded["train"] if "train" in loaded else loaded[sorted(loaded)[0]]
    return loaded


def _read_dataset(source: str) -> list[str]:
    """The first part of a Hub data set, kept in the cache folder: fetched once, the same text for every worker."""
    kept = cache_folder() / "texts" / f"{content_hash(source)[:32]}.jsonl"
    if kept.is_file():
        return _join_lines(_capped(_json_lines(kept)))
    name, *rest = source.split(":")
    if len(rest) > 2 or not all([name, *rest]):
        raise InvalidInput(f"no data set {source[:200]!r}: give name, name:split or name:config:split")
    datasets = _datasets()
    if datasets is None:
        raise InvalidInput(
            f"no text {source[:200]!r}: it is neither corpus nor a file or folder, and reading a data set of that name "
            f"needs datasets: pip install 'evoprune[data]'"
        )
    config, split = (rest[0] if len(rest) == 2 else None), (rest[-1] if rest else "train")
    try:
        with silence():
            # Streamed, because some data sets would not fit on the disk.
            rows = datasets.load_dataset(name, config, split=split, streaming=True)
            documents = _capped(_texts(rows, source))
    except InvalidInput:
        raise
    except Exception as error:  # the library's own errors, those of its HTTP client and of the disk
        raise InvalidInput(f"data set {source[:200]!r} cannot be read: {one_line(error)}") from error
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, "".join(json.dumps({"text": text}) + "\n" for text in documents))
    except OSError as error:
        raise InvalidInput(f"cannot write {kept}: {error.strerror or error}") from error
    return _join_lines(documents)


def _texts(rows: Iterable[Any], source: str) -> Iterator[str]:
    for row in rows:
        if not isinstance(row.get("text"), str):
            raise InvalidInput(f"data set {source[:200]!r} has no field 'text', only {', '.join(row)[:200]}")
        yield row["text"]


def _capped(documents: Iterable[str]) -> list[str]:
    """The documents that are not blank, until their length reaches `MAX_CHARACTERS`."""
    kept, length = [], 0
    for document in documents:
        if document.strip():
            kept.append(document)
            length += len(document)
        if length >= MAX_CHARACTERS:
            break
    return kept


def _join_lines(rows: list[str]) -> list[str]:
    """Rows that are lines rather than documents, as one document; else the rows as they are."""
    if sum(map(len, rows)) < LINE_CHARACTERS * len(rows):
        return ["\n".join(row.rstrip("\n") for row in itertools.chain(rows, [""]))]
    return rows
