"""`prune --recipe` and the same in Python: what is made again to the bit, warned of, and refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import evoprune
from evoprune.fitness.maskers import ByMetrics, ByUnits
from evoprune.fitness.models import load_model
from evoprune.fitness.numerics import torch_threads
from evoprune.fitness.policy_file import Calibration, write_policy
from evoprune.fitness.structure_weights import RefitRecipe
from evoprune.fitness.units import find_units
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.shape_file import write_shape
from evoprune.recipe_file import read_recipe
from tests.door.conftest import Run
from tests.models import save_tiny
from tests.policies import policy_of
from tests.shapes import cases, shape_of

EXAMPLES = Path(__file__).parents[2] / "examples" / "recipes"
WORDS: dict[str, tuple[object, ...]] = {
    "expression": ("--metric", "mul(abs(W),powc(X_l2,0.25))", "--sparsity", 0.6, "--group", "layer"),
    "pattern": ("--pattern", "2:4", "--seed", 3),
    "random": ("--metric", "random",),
    "allocator": ("--allocation", "owl", "--allocation-set", "spread=0.1", "--compressor", "refit"),
    "compressor": ("--compressor", "sparsegpt:bits=4", "--pattern", "2:4", "--accumulation", "path"),
    "bits": (
        "--compressor", "sparsegpt", "--pattern", "2:4", "--bits", 3.5, "--allocation", "dp", "--accumulation", "path",
    ),
    "start": ("--compressor", "awp:ramp=5", "--sparsity", 0.5, "--metric", "ria"),
    "tokens": ("--tokens", "amia", "--sparsity", 0.5),
    "thresholds": ("--compressor", "scap"),
    "wrappers": ("--compressor", "armor:block=4,rounds=2", "--pattern", "2:4"),
    "tree": ("--metric", "tree.json"),
    "method": ("--method", "shortgpt", "--sparsity", 0.5),
    "shape": ("--shape", "shape.json", "--form", "masked"),
    "refitted": ("--shape", "refitted.json", "--form", "masked"),
    "policy": ("--policy", "policy.json"),
    "policy of metrics": ("--policy", "metrics.json"),
}  # fmt: skip
FEW = ("--calibration-sequences", 5, "--calibration-window", 24)
# All of them take seconds; these add little to what the others check.
SLOW = ("random", "start", "tokens", "thresholds", "wrappers", "tree", "policy", "shape")
READS_NO_TEXT = ("random", "shape", "policy")


@pytest.fixture
def files(tiny: Path, story: Path, place: Path) -> None:
    """What the words above name."""
    dense = load_model(str(tiny))
    units = find_units(dense)
    tree = {"data": "mul", "left": {"data": "W"}, "right": {"data": "X"}}
    (place / "tree.json").write_text(json.dumps(tree))
    shape = shape_of("LlamaForCausalLM", units, cases(units[0].widths)["uneven"])
    write_shape(shape, place / "shape.json")
    refit = RefitRecipe("path-refit", "dense", str(story), sequences=4, window=32, seed=0, threads=1)
    write_shape(replace(shape, weights=refit.to_json()), place / "refitted.json")
    write_policy(policy_of(dense, ByUnits(("kv-group", "neurons:20")), np.arange(10) % 3 > 0), place / "policy.json")
    calibration = Calibration(str(story), 4, 32, 1, 1)
    metrics = policy_of(dense, ByMetrics((2, 4), ("wanda", "magnitude")), calibration=calibration)
    write_policy(metrics, place / "metrics.json")


def written(folder: Path) -> dict[str, bytes]:
    """All that a checkpoint says and holds, but for the card and the sparsity report, which have times.

    Errors of layers are left out: what they are measured with depends on the statistics that the cache happens to have.
    """
    timed = ("README.md", "sparsity_report.json")
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in timed}
    record = json.loads(files["evoprune.json"])
    for layer in record["report"]["layers"]:
        del layer["error"]
    return files | {"evoprune.json": json.dumps(record).encode()}


@pytest.mark.parametrize("what", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in WORDS])
@pytest.mark.usefixtures("files")
def test_a_checkpoint_is_made_again_to_the_bit(
    what: str, run: Run, tiny: Path, story: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = WORDS[what]
    reads = what not in READS_NO_TEXT
    # Policies and shapes say themselves what they read.
    text = ("--calibration", story, *FEW) if reads and not {"--policy", "--shape"} & set(words) else ()
    done = run("prune", tiny, *words, *text, "--no-latency", "--out", "first")
    assert done.code == 0, done.err
    for name in ("tree.json", "shape.json", "refitted.json", "policy.json", "metrics.json"):
        (place / name).unlink()
    # Statistics of the first time are not there.
    monkeypatch.setenv("EVOPRUNE_CACHE", str(place / "cold"))
    where = ("--calibration", story) if reads else ()
    again = run("prune", tiny, "--recipe", "first", *where, "--no-latency", "--out", "second")
    assert again.code == 0, again.err
    assert "warning: the" not in again.err
    first, second = written(place / "first"), written(place / "second")
    assert first == second
    recipe = yaml.safe_load(first["recipe.yaml"])
    assert (recipe["calibration"] is None) == (not text)
    assert not any(str(story.parent).encode() in content for content in second.values())


def test_threads_are_those_of_the_first_time(tiny: Path) -> None:
    with torch_threads(2):
        first = evoprune.prune(str(tiny), metric="magnitude").recipe
    assert first is not None
    with torch_threads(1):
        second = evoprune.prune_recipe(first, str(tiny)).recipe
    assert second == first and first.recipe.threads == 2


@pytest.mark.slow
def test_a_recovery_is_made_again(tiny: Path, story: Path) -> None:
    training: dict[str, Any] = {"recovery": "full", "recovery_tokens": 4 * 64 + 63, "recovery_loss": "lm"}
    first = evoprune.prune(
        str(tiny), metric="magnitude", pattern="2:4", calibration=str(story), out="first", **training
    )
    second = evoprune.prune_recipe("first", str(tiny), calibration=str(story), out="second")
    assert first.recipe is not None and first.recipe.recipe.recovery is not None
    # What was found out on the way is written out.
    assert first.recipe.recipe.recovery.parameters["learning_rate"] > 0
    assert second.recipe == first.recipe
    assert (Path("first") / "model.safetensors").read_bytes() == (Path("second") / "model.safetensors").read_bytes()


def test_other_weights_are_pruned_with_a_warning(run: Run, tiny: Path, tmp_path: Path) -> None:
    assert run("prune", tiny, "--metric", "magnitude", "--out", "first").code == 0
    other = save_tiny(tmp_path / "other", seed=1)
    done = run("prune", other, "--recipe", "first/recipe.yaml", "--out", "second", "--json")
    assert done.code == 0 and done.json["sparsity"] == 0.5
    assert done.err.count("warning: the recipe was made on other weights") == 1
    expected = evoprune.prune(str(other), metric="magnitude").language_model
    found = load_model("second")
    assert all((a.weight() == b.weight()).all() for a, b in zip(expected.sites, found.sites, strict=True))


@pytest.mark.parametrize("what", ["allocator", "policy"])
@pytest.mark.usefixtures("files")
def test_a_model_of_other_sizes_is_refused(
    what: str, run: Run, refused: Callable[..., str], tiny: Path, story: Path, tmp_path: Path
) -> None:
    text = () if what in READS_NO_TEXT else ("--calibration", story)
    few = FEW if text else ()
    assert run("prune", tiny, *WORDS[what], *text, *few, "--no-latency", "--out", "first").code == 0
    other = save_tiny(tmp_path / "other", intermediate_size=64)
    refused("prune", other, "--recipe", "first", *text, "--out", "second")
    assert not Path("second").exists()


def test_another_text_of_the_same_name_is_told(tiny: Path, story: Path, tmp_path: Path) -> None:
    first = evoprune.prune(str(tiny), calibration=str(story), calibration_sequences=4)
    assert first.recipe is not None
    other = tmp_path / story.name
    other.write_text(story.read_text().replace("holds", "keeps"))
    second = evoprune.prune_recipe(first.recipe, str(tiny), calibration=str(other))
    assert second.doubt is not None and "other tokens" in second.doubt


GOOD = """\
format: evoprune-recipe/1
model: {name: reference}
weights:
  metric: wanda
  expression: mul(abs(W),X_l2)
  sparsity: 0.5
  compressor: {name: awp, parameters: {ramp: 5}}
"""


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--metric", "wanda"), "leave out --metric"),
        (("--sparsity", 0.5), "leave out --sparsity"),
        (("--form", "plain"), "leave out --form"),
        (("--seed", 1), "leave out --seed"),
        (("--recovery-set", "rank=3"), "leave out --recovery-set"),
        (("--calibration", "other.txt"), "the recipe reads no text, not 'other.txt'"),
    ],
)
def test_what_contradicts_is_refused(
    words: tuple[object, ...], told: str, refused: Callable[..., str], tiny: Path, place: Path
) -> None:
    (place / "recipe.yaml").write_text(GOOD)
    assert told in refused("prune", tiny, "--recipe", "recipe.yaml", *words, "--out", "second")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("recipe/1", "recipe/2", "format 'evoprune-recipe/2' is not known"),
        ("weights:", "weight:", "weight: no such field"),
        ("  sparsity: 0.5", "  sparsity: half", "weights.sparsity: Input should be a valid number"),
        ("  sparsity: 0.5", "  sparsity: 1.5", "weights.sparsity: Input should be less than 1"),
        ("  sparsity: 0.5", "  sparsity: .nan", "weights.sparsity: Input should be"),
        ("  sparsity: 0.5", "  pattern: 2:4", "weights.pattern: write a pattern in quotes"),
        ("  sparsity: 0.5", "  sparsity: 0.5\n  pattern: '2:4'", "give a sparsity or a pattern, not both"),
        ("name: reference", "label: reference", "model.name: Field required"),
        ("{ramp: 5}", "{ramp: [5]}", "weights.compressor.parameters.ramp: give a number, text"),
        ("{ramp: 5}", "{slope: 5}", "has no parameter 'slope'"),
        ("name: awp", "name: swp", "no compressor 'swp'"),
        ("{name: awp, parameters: {ramp: 5}}", "{name: obq, parameters: {bits: 9}}", "bits 9 is outside [2, 8]"),
        ("{name: awp, parameters: {ramp: 5}}", "{name: block, parameters: {height: 5}}", "blocks of 5 × 16 do not"),
        ("X_l2)", "X_l1)", "weights.expression: metric 'wanda' is mul(abs(W),X_l2) here"),
        ("format", "method: {name: laco}\nformat", "this has weights and method"),
        ("format", "seed: '1'\nformat", "seed: Input should be a valid integer"),
        ("format", "calibration: {tokens: amia, choice: {near: 3}}\nformat", "calibration.choice.near: no such"),
        ("{name: reference}", "!!python/object/apply:os.getcwd []", "is not a YAML file"),
        ("{name: reference}", "[", "is not a YAML file"),
        ("  sparsity: 0.5", "  allocation: {file: ../a.json, sha256: '0'}", "weights.allocation.file: String should"),
        (GOOD, "- one", "format 'list' is not known"),
    ],
)
def test_a_wrong_recipe_is_refused_by_its_field(
    old: str, new: str, told: str, refused: Callable[..., str], tiny: Path, place: Path
) -> None:
    assert old in GOOD
    (place / "recipe.yaml").write_text(GOOD.replace(old, new, 1))
    assert told in refused("prune", tiny, "--recipe", "recipe.yaml", "--out", "out")


def test_a_changed_file_beside_it_is_refused(refused: Callable[..., str], tiny: Path, place: Path) -> None:
    evoprune.prune(str(tiny), metric="magnitude", allocation="erk", out="first")
    file = place / "first" / "allocation.json"
    file.write_text(file.read_text().replace('"sparsity": 0.5', '"sparsity": 0.25', 1))
    assert "'allocation.json' is not the file that 'recipe.yaml' names" in refused(
        "prune", tiny, "--recipe", "first", "--out", "second"
    )
    file.unlink()
    assert "no file" in refused("prune", tiny, "--recipe", "first", "--out", "second")


def test_a_folder_without_a_recipe_is_refused(refused: Callable[..., str], tiny: Path) -> None:
    assert "give a recipe's .yaml" in refused("prune", tiny, "--recipe", tiny, "--out", "out")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_are_recipes_of_the_reference_model(path: Path) -> None:
    assert read_recipe(path).recipe.model.name == "reference"
    assert f"--recipe examples/recipes/{path.name} " in path.read_text()


@pytest.mark.slow
def test_an_example_gives_the_loss_that_it_says() -> None:
    path = EXAMPLES / "sparsegpt-2-4.yaml"
    done = evoprune.prune_recipe(path, out="pruned")
    assert done.sparsity == 0.5
    assert done.doubt is None or "tokens" in done.doubt
    found = re.search(r"loss ([\d.]+), dense ([\d.]+)", path.read_text())
    assert found is not None
    said = float(found[1]) - float(found[2])
    # The embedded corpus is another one in each version of Python.
    lost = evoprune.evaluate("pruned").loss - evoprune.evaluate().loss
    assert lost == pytest.approx(said, rel=0.15)


def test_what_only_python_knows_has_no_recipe(tiny: Path, place: Path) -> None:
    from evoprune.metrics.criterion import RandomCriterion

    pruned = evoprune.prune(str(tiny), metric=RandomCriterion(seed=5), out="first")
    assert pruned.recipe is None and not (place / "first" / "recipe.yaml").exists()
    with pytest.raises(InvalidInput, match="no file"):
        evoprune.prune_recipe("first", str(tiny))
