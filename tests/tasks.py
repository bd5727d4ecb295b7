"""A folder with one small multiple-choice task in the YAML of lm-evaluation-harness, its data beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TASK = """\
task: birds
include: shared
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
SHARED = """\
dataset_path: json
dataset_kwargs: {data_files: {test: data/birds.jsonl}}
metadata: {version: 1.0}
"""
QUESTIONS: list[dict[str, Any]] = [
    {"question": f"Bird {number} of {number * 7 % 5} is a", "choices": ["hawk", "tit", "swallow"], "answer": number % 3}
    for number in range(7)
]


def save_tasks(folder: Path, task: str = TASK) -> Path:
    """Write the folder; returns it."""
    (folder / "data").mkdir(parents=True)
    (folder / "birds.yaml").write_text(task)
    (folder / "shared").write_text(SHARED)
    (folder / "data" / "birds.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    return folder
