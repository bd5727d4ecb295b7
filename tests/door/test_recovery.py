"""`prune --recovery` and the same in Python: what is written, said, continued and refused."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import evoprune
from evoprune.fitness import recovery_trainer
from evoprune.fitness.models import load_model
from evoprune.fitness.recoveries import RECOVERIES
from evoprune.fitness.units import find_units
from evoprune.metrics.errors import Interrupted, InvalidInput
from evoprune.metrics.shape_file import write_shape
from tests.door.conftest import Run
from tests.shapes import cases, shape_of

# Six steps of two windows.
TRAINING = (
    "--recovery-tokens",
    12 * 64 + 63,
    "--recovery-set",
    "batch_tokens=128",
    "--recovery-set",
    "learning_rate=0.01",
)
IN_PYTHON: dict[str, Any] = {
    "recovery_tokens": 12 * 64 + 63,
    "recovery_parameters": {"batch_tokens": 128, "learning_rate": 0.01},
}


@pytest.fixture(autouse=True, scope="module")
def collected() -> Iterator[None]:
    """Each training collects garbage, and what other tests have left would take longer than all of this."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("name", sorted(RECOVERIES))
def test_a_mask_is_recovered_from(name: str, run: Run, tiny: Path, story: Path, place: Path) -> None:
    words = ("prune", tiny, "--metric", "magnitude", "--pattern", "2:4", "--calibration", story)
    assert run(*words, "--out", "without").code == 0
    done = run(*words, "--recovery", name, *TRAINING, "--out", "out", "--json")
    assert done.code == 0, done.err
    assert sorted(path.name for path in place.iterdir()) == ["out", "without"]
    found = done.json["recovery"]
    assert (found["method"], found["loss"], found["tokens"], found["steps"]) == (name, "distill", 768, 6)
    assert found["after"]["kl"] < found["before"]["kl"]
    measured = run("eval", "out", "--dense", tiny, "--data", story, "--json").json
    assert measured["kl"] == pytest.approx(found["after"]["kl"], abs=1e-6)
    masked, recovered = (load_model(str(place / folder)) for folder in ("without", "out"))
    for before, after in zip(masked.sites, recovered.sites, strict=True):
        assert torch.equal(before.weight() == 0, after.weight() == 0)
        assert not torch.equal(before.weight(), after.weight())
    record = json.loads((place / "out" / "evoprune.json").read_text())
    assert record["report"]["recovery"] == found
    parameters = record["recipe"]["recovery"]["parameters"]
    assert (parameters["batch_tokens"], parameters["learning_rate"]) == (128, 0.01)
    assert (record["recipe"]["recovery"]["text"], record["recipe"]["recovery"]["side"]) == ("story.txt", "A")
    card = (place / "out" / "README.md").read_text()
    assert f"| recovery before | {found['before']['perplexity']:.4f} |" in card
    assert f"| recovery after | {found['after']['perplexity']:.4f} |" in card


def test_a_shape_is_recovered_from(run: Run, tiny: Path, story: Path, place: Path) -> None:
    units = find_units(load_model(str(tiny)))
    write_shape(shape_of("LlamaForCausalLM", units, cases(units[0].widths)["uneven"]), place / "shape.json")
    words = ("prune", tiny, "--shape", "shape.json", "--recovery", "lora", "--recovery-loss", "lm")
    done = run(*words, *TRAINING, "--calibration", story, "--out", "out")
    assert done.code == 0, done.err
    assert "; compact: 25,472 of 31,968 parameters" in done.err
    assert "recovered by lora: " in done.err
    assert "parameters learned from 768 tokens (lm)" in done.err
    assert " before, " in done.err and "KL" not in done.err
    assert load_model(str(place / "out")).cut


def test_what_a_method_leaves_is_recovered_and_timed(run: Run, tiny: Path, story: Path, place: Path) -> None:
    words = ("prune", tiny, "--method", "laco", "--sparsity", 0.5, "--method-set", "highest=2", "--calibration", story)
    done = run(*words, "--recovery", "full", *TRAINING, "--out", "out", "--json")
    assert done.code == 0, done.err
    found = done.json["recovery"]
    assert found["after"]["kl"] < found["before"]["kl"]
    measured = run("eval", "out", "--dense", tiny, "--data", story, "--json").json
    assert measured["kl"] == pytest.approx(found["after"]["kl"], abs=1e-6)
    assert [row["cut"] < row["dense"] for row in done.json["milliseconds"]] == [True, True]
    record = json.loads((place / "out" / "evoprune.json").read_text())["recipe"]
    assert (record["method"], record["recovery"]["method"]) == ("laco", "full")
    assert "| ms for prefill of 1 x 64 tokens |" in (place / "out" / "README.md").read_text()
    untimed = run(*words, "--no-latency", "--out", "untimed", "--json")
    assert (untimed.code, untimed.json["milliseconds"]) == (0, [])


def test_the_same_call_goes_on_after_a_kill(
    run: Run, tiny: Path, story: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery_trainer, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(recovery_trainer, "CHECKPOINT_SHARE", 0.0)

    def killed(what: str, done: int, total: int) -> None:
        if what.startswith("recovering by full on 768 tokens") and done == 3:
            raise KeyboardInterrupt

    more: dict[str, Any] = {"metric": "magnitude", "calibration": str(story), "recovery": "full", **IN_PYTHON}
    with pytest.raises(Interrupted, match=r"the same command goes on from the last checkpoint in .*out\.recovery"):
        evoprune.prune(str(tiny), out="out", progress=killed, **more)
    assert [path.name for path in place.iterdir()] == ["out.recovery"]
    undisturbed = evoprune.prune(str(tiny), out="undisturbed", **more)
    words = ("prune", tiny, "--metric", "magnitude", "--calibration", story, "--recovery", "full", *TRAINING)
    done = run(*words, "--out", "out")
    assert done.code == 0, done.err
    assert "the recovery went on from step 2 of 6" in done.err
    assert sorted(path.name for path in place.iterdir()) == ["out", "undisturbed"]
    for file in ("model.safetensors", "evoprune.json"):
        assert (place / "out" / file).read_bytes() == (place / "undisturbed" / file).read_bytes()
    assert undisturbed.recovery is not None and undisturbed.recovery.done.continued == 0


def test_another_configuration_says_that_it_begins_anew(tiny: Path, story: Path, run: Run, place: Path) -> None:
    def killed(what: str, done: int, total: int) -> None:
        if what.startswith("recovering"):
            raise KeyboardInterrupt

    more: dict[str, Any] = {"metric": "magnitude", "calibration": str(story), "recovery": "full", **IN_PYTHON}
    with pytest.raises(KeyboardInterrupt):
        evoprune.prune(str(tiny), sparsity=0.4, out="out", progress=killed, **more)
    words = ("prune", tiny, "--metric", "magnitude", "--calibration", story, "--recovery", "full", *TRAINING)
    done = run(*words, "--out", "out")
    assert done.code == 0, done.err
    assert "its checkpoints are gone, this one began anew" in done.err
    assert "went on" not in done.err


def test_a_loaded_model_stays_as_it_is(tiny: Path, story: Path) -> None:
    model = load_model(str(tiny))
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    more: dict[str, Any] = {"metric": "magnitude", "calibration": str(story)}
    found = [evoprune.prune(model, **more, **training) for training in ({}, {"recovery": "lora"} | IN_PYTHON)]
    assert all(torch.equal(value, before[name]) for name, value in model.model.state_dict().items())
    assert found[0].recovery is None
    assert len({model.fingerprint, *(pruned.language_model.fingerprint for pruned in found)}) == 3


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--recovery", "lora", "--recovery-tokens", 0), "0 tokens of recovery are too few: give such as 300000"),
        (("--recovery", "lora", "--recovery-tokens", -64), "-64 tokens of recovery are too few"),
        (("--recovery", "lora", "--recovery-tokens", 63), "63 tokens of recovery do not fill one window of 64"),
        (("--recovery", "lara"), "no recovery 'lara'; did you mean 'lora'?"),
        (("--recovery", "lora", "--recovery-set", "rank=x"), "rank of recovery 'lora' is 'x': give a value like 8"),
        (("--recovery", "lora", "--recovery-set", "rank"), "--recovery-set 'rank' is not KEY=VALUE"),
        (("--recovery-tokens", 1000), "recovery tokens without a recovery: give --recovery too, such as lora"),
    ],
)
def test_what_cannot_be(words: tuple[object, ...], told: str, refused: Callable[..., str], tiny: Path) -> None:
    assert told in refused("prune", tiny, "--out", "out", *words)


def test_what_lies_in_the_way_is_left_alone(refused: Callable[..., str], tiny: Path, place: Path) -> None:
    (place / "out.recovery").mkdir()
    (place / "out.recovery" / "notes.txt").write_text("mine")
    assert "out.recovery holds other files" in refused("prune", tiny, "--recovery", "lora", "--out", "out")


def test_the_extra_that_is_missing(refused: Callable[..., str], tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(name: str) -> object:
        return None if name == "peft" else name

    monkeypatch.setattr("evoprune.fitness.recoveries.find_spec", installed)
    told = refused("prune", tiny, "--recovery", "lora", "--out", "out")
    assert "recovery 'lora' needs peft: pip install 'evoprune[recovery]'" in told


def test_they_are_listed(run: Run) -> None:
    rows = {row["name"]: row for row in run("list", "recoveries", "--json").json}
    assert set(rows) == set(RECOVERIES) >= {"full", "lora"}
    assert "rank=8" in rows["lora"]["parameters"]
    assert rows["full"]["packages"] == ["accelerate"]
    assert "lora" in run("list", "recoveries").out


def test_python_refuses_as_well(tiny: Path) -> None:
    with pytest.raises(InvalidInput, match="no loss of a recovery 'l2'; there are distill, lm"):
        evoprune.prune(str(tiny), recovery="full", recovery_loss="l2")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RECOVERIES))
def test_the_reference_model_recovers_on_text_that_it_did_not_learn_from(name: str) -> None:
    found = evoprune.prune("reference", metric="magnitude", sparsity=0.6, recovery=name, recovery_tokens=16_384)
    assert found.recovery is not None
    assert found.recovery.after["loss"] < found.recovery.before["loss"]
    assert found.recovery.after["kl"] < 0.9 * found.recovery.before["kl"]
