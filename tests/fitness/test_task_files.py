"""Files of evaluation tasks are read as data; Python that they name is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from evoprune.fitness.task_files import read_task_files
from evoprune.metrics.errors import InvalidInput
from tests.tasks import TASK, save_tasks

FUNCTION = "process_results: !function helpers.score\n"


def test_what_is_included_is_merged_and_data_are_found_beside_the_file(tmp_path: Path) -> None:
    files = read_task_files(save_tasks(tmp_path / "tasks", TASK + "metadata: {version: 2.0}\ntag: [small]\n"))
    [content] = files.contents
    assert content["dataset_kwargs"] == {"data_files": {"test": str(tmp_path / "tasks" / "data" / "birds.jsonl")}}
    assert content["metadata"] == {"version": 2.0}  # the file itself wins over what it includes
    assert "include" not in content
    assert (files.names(), files.complete(), files.with_python) == ({"birds", "small"}, True, False)


@pytest.mark.parametrize("file", ["birds.yaml", "shared", "inner/other.yaml"])
def test_python_is_refused_wherever_it_is_named(file: str, tmp_path: Path) -> None:
    folder = save_tasks(tmp_path / "tasks")
    place = folder / file
    place.parent.mkdir(exist_ok=True)
    place.write_text((place.read_text() if place.exists() else "task: other\n") + FUNCTION)
    with pytest.raises(InvalidInput, match="tag !function, which runs Python: give --trust-remote-code"):
        read_task_files(folder)
    trusted = read_task_files(folder, trust_remote_code=True)
    assert trusted.with_python and not trusted.complete()
    assert len(trusted.contents) == (1 if file.startswith("inner") else 0)


def test_a_group_that_needs_tasks_of_the_harness(tmp_path: Path) -> None:
    folder = save_tasks(tmp_path / "tasks")
    (folder / "own.yaml").write_text("group: own\ntask: [birds]\n")
    assert read_task_files(folder).complete()
    (folder / "mixed.yaml").write_text("group: mixed\ntask: [birds, arc_easy]\n")
    files = read_task_files(folder)
    assert files.names() == {"birds", "own", "mixed"}
    assert not files.complete()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: [", "is no YAML"),
        ("- 1", "holds no task"),
        ("task: x\nvalue: !!python/object/apply:os.getcwd []\n", "cannot be read"),
        ("task: x\ninclude: wrong.yaml\n", "includes itself"),
        ("task: x\ninclude: nowhere\n", "no file"),
    ],
)
def test_bad_files_are_refused_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(InvalidInput, match=message) as caught:
        read_task_files(tmp_path)
    assert "\n" not in str(caught.value)


def test_folders_without_tasks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="holds no task"):
        read_task_files(tmp_path)
    with pytest.raises(InvalidInput, match="no folder of tasks"):
        read_task_files(tmp_path / "nowhere")
