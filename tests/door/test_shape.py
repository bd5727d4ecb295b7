"""`prune --shape` and the same in Python: what is cut, written, evaluated and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import evoprune
from evoprune.fitness.models import load_model
from evoprune.fitness.structure_weights import with_merges
from evoprune.fitness.units import find_units
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.shape import Shape
from evoprune.metrics.shape_file import to_json, write_shape
from tests.door.conftest import Run
from tests.models import random_windows, save_tiny
from tests.shapes import cases, shape_of


@pytest.fixture(scope="module")
def uneven(tiny: Path) -> Shape:
    language_model = load_model(str(tiny))
    units = find_units(language_model)
    shape = shape_of("LlamaForCausalLM", units, cases(units[0].widths)["uneven"])
    return replace(shape, fingerprint=language_model.fingerprint)


@pytest.fixture
def file(uneven: Shape, place: Path) -> Path:
    return write_shape(uneven, place / "shape.json")


@pytest.mark.parametrize(
    ("form", "written"), [("auto", "compact"), ("compact", "compact"), ("padded", "padded"), ("masked", "masked")]
)
def test_every_form_is_written_and_evaluated(
    form: str, written: str, run: Run, tiny: Path, file: Path, story: Path, place: Path
) -> None:
    done = run("prune", tiny, "--shape", file, "--form", form, "--out", "out", "--json")
    assert done.code == 0, done.err
    document = done.json
    assert (document["form"], document["dense_parameters"], document["pattern"]) == (written, 31968, None)
    # By hand: query rows 32 x (4 - 2) x 8 twice, 8 key and value rows of block 0, 33 and 8 neurons of three vectors.
    gone = 32 * 8 * ((2 + 2) + (1 + 1) + (2 + 2)) + 3 * 32 * (33 + 8)
    assert document["removed"] == gone
    by_name = {layer["name"]: layer for layer in document["layers"]}
    assert by_name["model.layers.0.self_attn.k_proj"]["sparsity"] == 0.5
    assert by_name["model.layers.1.self_attn.k_proj"] == {
        "name": "model.layers.1.self_attn.k_proj",
        "shape": [16, 32],
        "sparsity": 0.0,
        "error": None,
    }
    kept = {"compact": 31968 - gone, "masked": 31968, "padded": 31968 - 3 * 32 * 8 * 2}[written]
    assert document["parameters"] == kept
    record = json.loads((place / "out" / "evoprune.json").read_text())
    assert record["recipe"]["shape"]["blocks"][0]["neurons"].startswith("3,6,9")
    card = (place / "out" / "README.md").read_text()
    assert "3,6,9" not in card
    assert "| 0 | 1 of 2 | 2 of 4 | 15 of 48 |\n| 1 | 2 of 2 | 2 of 4 | 40 of 48 |" in card
    assert (document["shape"], document["widths"]) == ([[1, 2, 15], [2, 1, 40]], [[2, 4, 48]] * 2)
    times = {row["pass"]: (row["dense"], row["cut"]) for row in document["milliseconds"]}
    assert list(times) == ([] if form == "masked" else ["prefill of 1 x 64 tokens", "a token behind 1 x 63 tokens"])
    for words, (before, now) in times.items():
        assert f"| ms for {words} | {before:.3f} | {now:.3f} | {now / before:.3f} |" in card
    assert (f"| parameters | 31,968 | {kept:,} |" in card) == (form != "masked")
    measured = run("eval", "out", "--dense", tiny, "--data", story, "--window", 32, "--tokens", 128, "--json")
    assert measured.code == 0, measured.err
    assert measured.json["kl"] > 0


def test_all_forms_say_the_same_in_python(tiny: Path, uneven: Shape) -> None:
    model = load_model(str(tiny))
    dense = model.model(input_ids=random_windows()).logits
    found = [evoprune.prune_shape(model, uneven, form=form) for form in ("compact", "padded", "masked")]
    logits = [done.language_model.model(input_ids=random_windows()).logits for done in found]
    assert all(torch.allclose(logits[0], other, atol=1e-5) for other in logits)
    assert torch.equal(model.model(input_ids=random_windows()).logits, dense)
    assert not torch.allclose(logits[0], dense, atol=1e-2)
    assert len({done.language_model.fingerprint for done in found} | {model.fingerprint}) == 4


def test_what_people_read(run: Run, tiny: Path, uneven: Shape, place: Path) -> None:
    write_shape(replace(uneven, fingerprint="another"), place / "shape.json")
    done = run("prune", tiny, "--shape", "shape.json", "--out", "out")
    assert done.out == f"{place / 'out'}\n"
    assert "; compact: 25,472 of 31,968 parameters" in done.err
    assert "found on other weights of this class" in done.err
    assert "prefill of 1 x 64 tokens: " in done.err
    assert "try it: evoprune eval" in done.err
    blocks = [line.split("  ") for line in done.err.splitlines() if " of " in line and line.split()[0] in ("0", "1")]
    told = [[cell.strip() for cell in row if cell.strip()] for row in blocks]
    assert told == [["0", "1 of 2", "2 of 4", "15 of 48"], ["1", "2 of 2", "2 of 4", "40 of 48"]]


def test_no_time_is_taken_where_nobody_asks(run: Run, tiny: Path, file: Path, place: Path) -> None:
    done = run("prune", tiny, "--shape", file, "--out", "out", "--no-latency", "--json")
    assert done.json["milliseconds"] == []
    assert "ms for" not in (place / "out" / "README.md").read_text()


def test_a_compact_checkpoint_can_lose_weights_by_a_mask(run: Run, tiny: Path, file: Path, place: Path) -> None:
    assert run("prune", tiny, "--shape", file, "--out", "small").code == 0
    done = run("prune", "small", "--metric", "magnitude", "--sparsity", 0.5, "--out", "sparse", "--json")
    assert done.code == 0, done.err
    assert load_model(str(place / "sparse")).cut
    assert done.json["prunable"] < 15360


@pytest.mark.parametrize(
    "words",
    [
        ("--sparsity", 0.5),
        ("--pattern", "2:4"),
        ("--allocation", "owl"),
        ("--metric", "wanda"),
        ("--compressor", "mask"),
        ("--budget", "*.mlp.*=0.5"),
    ],
)
def test_nothing_else_says_what_goes(
    words: tuple[Any, ...], refused: Callable[..., str], tiny: Path, file: Path
) -> None:
    told = refused("prune", tiny, "--shape", file, "--out", "out", *words)
    assert f"--shape says by itself what goes: leave out {words[0]}" in told


def test_shapes_that_do_not_fit(
    refused: Callable[..., str], tiny: Path, file: Path, uneven: Shape, place: Path
) -> None:
    def told(document: Any, *words: str, model: Path = tiny) -> str:
        file.write_text(json.dumps(document))
        return refused("prune", model, "--shape", file, "--out", "out", *words)

    document = to_json(uneven)
    opt = save_tiny(place / "opt", "opt")
    wide = save_tiny(place / "wide", intermediate_size=64)
    assert "is of another model, LlamaForCausalLM and not this OPTForCausalLM" in told(document, model=opt)
    assert "48 neurons there and 4 query heads in 2 KV groups and 64 neurons here" in told(document, model=wide)
    assert "--form plain cannot hold this shape: its blocks differ" in told(document, "--form", "plain")
    assert "give compact, padded or masked" in told(document, "--form", "plain")
    assert "output projections by 'magic', which this" in told(document | {"weights": {"method": "magic"}})
    assert "do not say what they were refitted with" in told(document | {"weights": {"method": "database"}})
    along = {
        "method": "database", "accumulation": "path", "calibration": {"text": "corpus", "sequences": 2, "window": 8},
        "seed": 0, "threads": 1, "path": [["0", "0-1", "0-99"], ["", "", ""]],
    }  # fmt: skip
    said = told(document | {"weights": along})
    assert "the 'path' in the shape's 'weights': the neurons of block 0 have '0-99', which is not" in said
    refit = {**along, "method": "path-refit", "accumulation": "dense", "correction": 2}
    assert "'weights' have correction '2': give a number from 0 to 1" in told(document | {"weights": refit})
    document["blocks"][0]["neurons"] = "40-48"
    assert "the neurons of block 0 have '40-48', which is not ascending from 0 to 47" in told(document)
    assert "no file 'nowhere.json'; give a shape's .json" in refused(
        "prune", tiny, "--shape", "nowhere.json", "--out", "out"
    )


def test_models_that_cannot_be_cut(refused: Callable[..., str], run: Run, tiny: Path, file: Path, place: Path) -> None:
    olmo = save_tiny(place / "olmo", "olmo2")
    assert "q_norm.weight [32] beside its matrices: it cannot be cut" in refused(
        "prune", olmo, "--shape", file, "--out", "out"
    )
    assert run("prune", tiny, "--shape", file, "--out", "small").code == 0
    assert "is cut already: give the dense model" in refused("prune", "small", "--shape", file, "--out", "out")
    config = json.loads((place / "small" / "config.json").read_text())
    config["per_layer_config"]["0"]["intermediate_size"] = -1
    (place / "small" / "config.json").write_text(json.dumps(config))
    assert "does not say num_attention_heads, num_key_value_heads, intermediate_size" in refused("eval", "small")
    with pytest.raises(InvalidInput, match="a shape's"):
        evoprune.prune_shape(str(tiny), "nowhere")


def test_another_refit_than_that_of_the_shape(
    run: Run, refused: Callable[..., str], tiny: Path, story: Path, file: Path, uneven: Shape, place: Path
) -> None:
    words = ("prune", tiny, "--shape", file, "--form", "padded", "--out")
    assert run(*words, "plain").code == 0
    done = run(*words, "refitted", "--refit", "path-refit", "--calibration", story, "--seed", 3, "--json")
    assert done.code == 0, done.err
    said = json.loads((place / "refitted" / "evoprune.json").read_text())["recipe"]["shape"]["weights"]
    assert (said["method"], said["correction"], said["seed"]) == ("path-refit", 0.5, 3)
    assert said["calibration"]["text"] == story.name
    lines = evoprune.evaluate(place / "refitted", dense=tiny, data=str(story), window=32, tokens=256)
    before = evoprune.evaluate(place / "plain", dense=tiny, data=str(story), window=32, tokens=256)
    assert lines.held_out.kl < before.held_out.kl
    # As the weights of the dense model are, whatever the shape says of them.
    recipe = {"text": str(story), "sequences": 4, "window": 32}
    database = {"method": "database", "accumulation": "dense", "calibration": recipe, "seed": 7, "threads": 1}
    database |= {"correction": 0.2}
    write_shape(replace(uneven, weights=database), file)
    assert run(*words, "none", "--refit", "none").code == 0
    one, other = (place / name / "model.safetensors" for name in ("none", "plain"))
    assert one.read_bytes() == other.read_bytes()
    # The windows that the shape says, of its text or of another, and its correction.
    shutil.copy(story, "moved.txt")
    for out, more, text in (("own", (), story.name), ("moved", ("--calibration", "moved.txt"), "moved.txt")):
        assert run(*words, out, "--refit", "path-refit", *more).code == 0
        own = json.loads((place / out / "evoprune.json").read_text())["recipe"]["shape"]["weights"]
        assert own["calibration"] == {**recipe, "text": text}
        assert (own["seed"], own["correction"]) == (7, 0.2)
    one, other = (place / name / "model.safetensors" for name in ("own", "moved"))
    assert one.read_bytes() == other.read_bytes()
    merged = replace(uneven, weights=with_merges(database, [(False, False), (False, True)]))
    write_shape(replace(merged, blocks=(uneven.blocks[0], replace(uneven.blocks[1], neurons=()))), file)
    assert "what is merged is refitted as the shape says" in refused(*words, "out", "--refit", "path-refit")
