"""Reading a folder of evaluation tasks in the YAML of lm-evaluation-harness as data, without running any of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from evoprune.fitness.hub import one_line
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.files import user_path, user_text

_FUNCTION = "!function"
# What names files of a task; the harness would look for them from the working folder.
_FILE_OPTIONS = ("data_files", "data_dir")


@dataclass(frozen=True)
class TaskFiles:
    """What a folder of tasks holds.

    Attributes:
        folder: that was read.
        contents: of each file that describes a task or a group, with what it includes merged in and paths of data
            beside it made absolute.
        with_python: whether some file names Python functions; those files are not in `contents`.
    """

    folder: Path
    contents: tuple[Mapping[str, Any], ...]
    with_python: bool

    def names(self) -> set[str]:
        """Tasks, groups and tags that are described here."""
        keys = (("group",) if "group" in content else ("task", "tag") for content in self.contents)
        pairs = zip(self.contents, keys, strict=True)
        return {name for content, named in pairs for key in named for name in _words(content.get(key))}

    def complete(self) -> bool:
        """Whether every task that a group here names is described here."""
        known = self.names()
        members = (_members(content.get("task")) for content in self.contents if "group" in content)
        return not self.with_python and all(name in known for names in members for name in names)


def read_task_files(folder: str | Path, trust_remote_code: bool = False) -> TaskFiles:
    """The tasks in the YAML files of a folder and the folders in it.

    Args:
        folder: as it was typed.
        trust_remote_code: leave files that name Python functions for the harness, which runs them; otherwise these are
            refused.

    Raises:
        InvalidInput: there is no such folder, it holds no task, a file cannot be read, or names a Python function.
    """
    place = user_path(folder)
    if not place.is_dir():
        raise InvalidInput(f"no folder of tasks {str(folder)[:200]!r}: give one with the .yaml files of lm-eval")
    contents, with_python = [], False
    for file in sorted(place.rglob("*.yaml")):
        try:
            content = _read(file.resolve(), ())
        except _NamesPython as error:
            if not trust_remote_code:
                raise InvalidInput(
                    f"{error} has a tag {_FUNCTION}, which runs Python: give --trust-remote-code if you trust it"
                ) from None
            with_python = True
            continue
        if "task" in content or "group" in content:  # else it is there for others to include
            contents.append(content)
    if not contents and not with_python:
        raise InvalidInput(f"folder {place} holds no task: give one with the .yaml files of lm-eval")
    return TaskFiles(place, tuple(contents), with_python)


class _NamesPython(Exception):
    """A file has a tag that runs Python."""


def _read(file: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """One file, and below it what it includes: what it says itself wins, as in the harness."""
    if file in above:
        raise InvalidInput(f"{file} includes itself: take out one `include`")
    try:
        content = yaml.safe_load(user_text(file, "task", "the YAML of lm-eval", "a file that is there"))
    except yaml.constructor.ConstructorError as error:
        if _FUNCTION in str(error.problem):
            raise _NamesPython(file) from None
        raise InvalidInput(f"{file} cannot be read: {one_line(error)}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise InvalidInput(f"{file} is no YAML: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise InvalidInput(f"{file} holds no task: give names and values, such as `task: my_task`")
    included: dict[str, Any] = {}
    for name in _words(content.pop("include", None)):
        included |= _read((file.parent / name).resolve(), (*above, file))
    included.pop("task_list", None)
    return included | _placed(content, file.parent)


def _placed(content: Any, folder: Path) -> Any:
    """The same with paths of data that exist beside the file made absolute."""
    if isinstance(content, list):
        return [_placed(part, folder) for part in content]
    if not isinstance(content, dict):
        return content
    found = {key: _placed(value, folder) for key, value in content.items()}
    if isinstance(options := found.get("dataset_kwargs"), dict):
        found["dataset_kwargs"] = {
            key: _beside(value, folder) if key in _FILE_OPTIONS else value for key, value in options.items()
        }
    if str(found.get("dataset_path", "")).startswith("."):
        found["dataset_path"] = _beside(found["dataset_path"], folder)
    return found


def _beside(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_beside(part, folder) for part in value]
    if isinstance(value, dict):
        return {key: _beside(part, folder) for key, part in value.items()}
    return str(folder / value) if isinstance(value, str) and (folder / value).exists() else value


def _words(value: Any) -> Iterator[str]:
    """Names from one name, a list of them, or nothing."""
    for word in value if isinstance(value, list) else [value]:
        if isinstance(word, str):
            yield word


def _members(value: Any) -> Iterator[str]:
    """Names of the tasks and groups in a group, also of groups inside."""
    for member in value if isinstance(value, list) else [value]:
        if isinstance(member, str):
            yield member
        elif isinstance(member, dict) and isinstance(member.get("task"), list):
            yield from _members(member["task"])
