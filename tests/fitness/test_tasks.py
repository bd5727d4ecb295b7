"""Tasks of lm-evaluation-harness on a model in memory, checked by the model's own log-likelihoods."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from evoprune.fitness.forms import cut_model
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.tasks import load_tasks
from evoprune.fitness.units import find_units
from evoprune.metrics.errors import InvalidInput
from tests.models import tiny_language_model
from tests.shapes import cases
from tests.tasks import QUESTIONS, TASK, save_tasks

pytest.importorskip("lm_eval")


def run(folder: Path, language_model: LanguageModel, *, trust: bool = False, **options: int) -> dict[str, float | None]:
    """Scores of the task by metric, and their standard errors under ``+-``."""
    suite = load_tasks(["birds"], folder, trust_remote_code=trust)
    assert suite is not None
    found = suite.run(language_model, lambda *_: None, **options)
    assert suite.run(language_model, lambda *_: None, **options) == found
    assert list(found) == ["birds"]
    scores = found["birds"].items()
    return {name: score.value for name, score in scores} | {f"{name}+-": score.stderr for name, score in scores}


def right_answers(language_model: LanguageModel, context: str = "") -> list[bool]:
    """Whether the likeliest of the choices is the right one, question by question."""
    found = []
    for question in QUESTIONS:
        chances = []
        for choice in question["choices"]:
            given = language_model.tokenizer.encode(context + question["question"])
            ids = torch.tensor([given + language_model.tokenizer.encode(f" {choice}")])
            logs = language_model.model(ids).logits[0].log_softmax(-1)
            chances.append(sum(logs[at - 1, ids[0, at]].item() for at in range(len(given), ids.shape[1])))
        found.append(chances.index(max(chances)) == question["answer"])
    return found


def random_states() -> tuple[object, ...]:
    return random.getstate(), np.random.get_state(legacy=False)["state"]["key"].tolist(), torch.get_rng_state().tolist()


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("compact", [False, True])
def test_accuracies_by_hand(compact: bool, tmp_path: Path) -> None:
    language_model = tiny_language_model()
    if compact:
        widths = find_units(language_model)[0].widths
        language_model, _ = cut_model(language_model, cases(widths)["uneven"], form="compact")
    right = right_answers(language_model)
    assert 0 < sum(right) < len(right)
    states = random_states()
    weights = {name: value.clone() for name, value in language_model.model.named_parameters()}
    found = run(save_tasks(tmp_path / "tasks"), language_model)
    assert found["acc"] == sum(right) / len(right)
    assert found["acc+-"] == pytest.approx(np.std(right, ddof=1) / len(right) ** 0.5)
    assert random_states() == states
    assert all(torch.equal(value, weights[name]) for name, value in language_model.model.named_parameters())
    assert language_model.tokenizer.pad_token is None


def test_only_the_first_examples(tmp_path: Path) -> None:
    language_model = tiny_language_model()
    right = right_answers(language_model)[:2]
    assert run(save_tasks(tmp_path / "tasks"), language_model, limit=2)["acc"] == sum(right) / 2


def test_shots_are_examples_before_the_question(tmp_path: Path) -> None:
    task = TASK + "fewshot_split: test\nfewshot_config: {sampler: first_n}\n"
    language_model = tiny_language_model(max_position_embeddings=256)
    shown = [f"{known['question']} {known['choices'][known['answer']]}\n\n" for known in QUESTIONS[:2]]
    found = run(save_tasks(tmp_path / "tasks", task), language_model, shots=1)
    # No question is its own example.
    right = right_answers(language_model, shown[1])[:1] + right_answers(language_model, shown[0])[1:]
    assert found["acc"] == sum(right) / len(right)


@pytest.mark.slow  # the harness looks through all its tasks, for seconds
def test_python_runs_only_where_it_is_trusted(tmp_path: Path) -> None:
    task = TASK.replace('doc_to_text: "{{question}}"', "doc_to_text: !function helpers.ask")
    folder = save_tasks(tmp_path / "tasks", task)
    (folder / "helpers.py").write_text(
        "from pathlib import Path\n\n\ndef ask(doc):\n    Path('ran').touch()\n    return doc['question']\n"
    )
    language_model = tiny_language_model()
    with pytest.raises(InvalidInput, match="!function"):
        run(folder, language_model)
    assert not (tmp_path / "ran").exists()
    shared = folder / "shared"
    shared.write_text(shared.read_text().replace("data/", f"{folder}/data/"))
    right = right_answers(language_model)
    assert run(folder, language_model, trust=True)["acc"] == sum(right) / len(right)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{{question}}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "cannot be run: .*unsafe"),
        ("metric: acc", "metric: ./metric.py", "scores by './metric.py' of the library evaluate"),
        ("metric: acc", "metric: acc, hf_evaluate: true", "scores by 'acc' of the library evaluate"),
        ("test_split: test", "test_split: nowhere", "task 'birds' cannot be run"),
        ("test_split", "unsafe_code: true\ntest_split", "task 'birds' cannot be run: .*unsafe"),
    ],
)
def test_code_by_other_ways_is_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "metric.py").write_text("open('ran', 'w')\n")
    folder = save_tasks(tmp_path / "tasks", TASK.replace(old, new))
    with pytest.raises(InvalidInput, match=message):
        run(folder, tiny_language_model(), limit=1)
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_names_that_nobody_has(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no task 'arc_eassy'; did you mean 'arc_easy'"):
        load_tasks(["birds", "arc_eassy"], save_tasks(tmp_path / "tasks"))
