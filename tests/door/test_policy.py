"""`prune --policy` and the same in Python: what is cut, masked, written and refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import evoprune
from evoprune.fitness.maskers import ByMetrics, ByUnits, ByWeights
from evoprune.fitness.models import LanguageModel, load_model
from evoprune.fitness.policy_file import Calibration, policy_shape, write_policy
from evoprune.fitness.text import token_windows
from evoprune.fitness.units import find_units
from evoprune.metrics.errors import InvalidInput
from evoprune.search.rundir import RunDirectory
from tests.door.conftest import Run
from tests.models import random_windows, save_tiny
from tests.policies import policy_of

UNITS = ByUnits(("kv-group", "neurons:20"))
# Of each block the KV groups, then the neurons in runs of 20, 20 and 8.
REFIT = ("--refit", "path-refit")
KEPT = np.array([True, False, True, True, False, True, True, False, False, True])


@pytest.fixture(scope="module")
def dense(tiny: Path) -> LanguageModel:
    return load_model(str(tiny))


@pytest.fixture
def file(dense: LanguageModel, place: Path) -> Path:
    return write_policy(policy_of(dense, UNITS, KEPT), place / "policy.json")


@pytest.fixture
def uneven(dense: LanguageModel, place: Path) -> Path:
    """Of the first KV group one query head goes."""
    mask = np.ones(8, dtype=bool)
    mask[0] = False
    return write_policy(policy_of(dense, ByUnits(("query-head",)), mask), place / "uneven.json")


@pytest.mark.parametrize(
    ("form", "written"), [("auto", "compact"), ("compact", "compact"), ("padded", "padded"), ("masked", "masked")]
)
def test_units_are_cut_in_every_form(
    form: str, written: str, run: Run, tiny: Path, file: Path, dense: LanguageModel, place: Path
) -> None:
    words = ("prune", tiny, "--policy", file, "--form", form, "--no-latency", "--out", "out", "--json")
    done = run(*words)
    assert done.code == 0, done.err
    document = done.json
    # A KV group with its two query heads, 8 + 40 neurons of three vectors.
    gone = 32 * 8 * (2 + 1 + 1 + 2) + 3 * 32 * (8 + 40)
    assert (document["form"], document["removed"], document["pattern"]) == (written, gone, None)
    assert document["policy"]["masker"] == UNITS.to_json()
    assert (document["policy"]["kept"], document["policy"]["origin"]) == (6, {"run": "policy-1"})
    record = json.loads((place / "out" / "evoprune.json").read_text())
    assert record["recipe"]["policy"] == document["policy"]
    assert record["recipe"]["shape"]["blocks"][1]["neurons"] == "40-47"
    assert '"hash"' in (place / "out" / "README.md").read_text()
    shape = policy_shape(policy_of(dense, UNITS, KEPT), find_units(dense))
    assert shape is not None
    expected = evoprune.prune_shape(dense, shape, form="compact").language_model
    found = load_model(str(place / "out"))
    logits = [model.model(input_ids=random_windows()).logits for model in (expected, found)]
    assert torch.allclose(*logits, atol=1e-5)


@pytest.fixture
def told(dense: LanguageModel, story: Path, place: Path) -> Path:
    """A policy that says on what text it was found."""
    text = Calibration(str(story), 8, 32, 3, torch.get_num_threads())
    return write_policy(policy_of(dense, UNITS, KEPT, calibration=text), place / "told.json")


def test_output_matrices_are_refitted_on_the_text_of_the_search(
    run: Run, tiny: Path, told: Path, dense: LanguageModel, story: Path, place: Path
) -> None:
    words = ("prune", tiny, "--policy", told, "--no-latency", "--json")
    plain, done = (run(*words, "--out", name, *more) for name, more in (("plain", ()), ("out", REFIT)))
    assert done.code == 0, done.err
    assert "refit" not in plain.json and plain.json["removed"] == done.json["removed"]
    said = done.json["refit"]
    assert (said["method"], said["text"]) == ("path-refit", story.name)
    measured = [evoprune.evaluate(str(place / name), data=str(story), window=64) for name in ("plain", "out")]
    assert [said[when]["loss"] for when in ("before", "after")] == pytest.approx([found.loss for found in measured])
    assert said["after"]["tokens"] == measured[0].held_out.tokens

    # Of the first block the attention reads what that of the dense model reads: least squares, by hand.
    windows = token_windows(dense.tokenizer, str(story), "A", window=32, count=8, seed=3)
    output = dense.model.get_submodule("model.layers.0.self_attn.o_proj")
    seen: list[torch.Tensor] = []
    hook = output.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, 32).double()))
    dense.model(input_ids=windows)
    hook.remove()
    inputs, wanted = seen[0][:, :16], seen[0] @ output.weight.double().T
    weights = [torch.linalg.lstsq(inputs, wanted).solution.T] + [
        load_model(str(place / name)).model.get_parameter("model.layers.0.self_attn.o_proj.weight").double()
        for name in ("out", "plain")
    ]
    least, refitted, before = (float((inputs @ weight.T - wanted).square().sum()) for weight in weights)
    assert least <= refitted < 1.1 * least < 0.8 * before

    shown = run("prune", tiny, "--policy", told, "--no-latency", "--out", "shown", *REFIT).err
    numbers = f"loss {said['before']['loss']:.4f} before, {said['after']['loss']:.4f} after"
    assert numbers in " ".join(shown.split())
    card = (place / "out" / "README.md").read_text()
    assert f"| refit after | {said['after']['perplexity']:.4f} | {said['after']['loss']:.4f} |" in card
    assert str(story.parent) not in card
    again = run("prune", "--recipe", "out", tiny, "--calibration", story, "--no-latency", "--out", "again")
    assert again.code == 0, again.err
    files = [(place / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert files[0] == files[1]


def test_what_has_no_refit_is_told_so(
    refused: Callable[..., str], dense: LanguageModel, tiny: Path, file: Path, uneven: Path, told: Path, place: Path
) -> None:
    write_policy(policy_of(dense, ByWeights((2, 4), "magnitude")), place / "weights.json")
    for policy, message in (
        (file, "does not say what text it was found on"),
        ("weights.json", "an N:M policy keeps every width: leave it out"),
    ):
        assert message in refused("prune", tiny, "--policy", policy, "--out", "out", *REFIT)
    said = json.loads(told.read_text())["calibration"]
    document = json.loads(uneven.read_text())
    uneven.write_text(json.dumps(document | {"calibration": said}))
    assert "which has no refit" in refused("prune", tiny, "--policy", uneven, "--out", "out", *REFIT)
    assert "--refit goes with --shape or --policy" in refused("prune", tiny, "--out", "out", *REFIT)
    with pytest.raises(InvalidInput, match="no refit 'all'"):
        evoprune.prune_policy(dense, told, refit="all")


def test_query_heads_of_no_shape_are_zeros(
    run: Run, refused: Callable[..., str], tiny: Path, uneven: Path, place: Path
) -> None:
    told = refused("prune", tiny, "--policy", uneven, "--form", "compact", "--out", "out")
    assert "keeps different numbers of query heads in the KV groups of a block; give masked" in told
    done = run("prune", tiny, "--policy", uneven, "--out", "out", "--json")
    assert done.code == 0, done.err
    assert (done.json["removed"], done.json["compressor"]) == (2 * 8 * 32, "mask")
    found = load_model(str(place / "out"))
    attention = found.model.get_submodule("model.layers.0.self_attn")
    assert not attention.get_parameter("q_proj.weight")[:8].any()
    assert not attention.get_parameter("o_proj.weight")[:, :8].any()
    assert attention.get_parameter("k_proj.weight").all()


def test_a_finished_run_is_a_policy(run: Run, refused: Callable[..., str], tiny: Path, file: Path, place: Path) -> None:
    with RunDirectory.create("policy", {}, {}, run_dir=place / "run") as unfinished:
        (place / "run" / "export").mkdir()
        (place / "run" / "export" / "policy.json").write_bytes(file.read_bytes())
        assert "is not finished: resume it first" in refused("prune", tiny, "--policy", "run", "--out", "out")
        unfinished.write_result({"best": {}})
    done = run("prune", tiny, "--policy", "run", "--form", "masked", "--out", "out", "--json")
    assert done.code == 0, done.err
    assert done.json["policy"]["kept"] == 6


def test_a_run_of_another_kind_is_none(refused: Callable[..., str], tiny: Path, place: Path) -> None:
    RunDirectory.create("structure", {}, {}, run_dir=place / "run").close()
    told = refused("prune", tiny, "--policy", "run", "--out", "out")
    assert "searched structures: a run that searched a policy is needed" in told


def test_choices_of_metrics_are_written_as_masks(
    run: Run, dense: LanguageModel, tiny: Path, story: Path, place: Path
) -> None:
    """Each matrix is what pruning the whole model by its metric on the same text makes of it."""
    masker = ByMetrics((2, 4), ("wanda", "magnitude"))
    sites = [bound.site.name for bound in dense.sites]
    mask = np.array([[index % 2 == 0, index % 2 == 1] for index in range(len(sites))]).reshape(-1)
    text = Calibration(str(story), 4, 32, 3, torch.get_num_threads())
    write_policy(policy_of(dense, masker, mask, calibration=text, fingerprint="another"), place / "policy.json")
    done = run("prune", tiny, "--policy", "policy.json", "--out", "out", "--json")
    assert done.code == 0, done.err
    document = done.json
    assert (document["pattern"], document["criterion"], document["compressor"]) == ("2:4", None, "mask")
    assert document["sparsity"] == 0.5
    assert all(0 < layer["error"] < 1 for layer in document["layers"])
    assert document["policy"]["sites"] == {name: masker.metrics[at % 2] for at, name in enumerate(sites)}
    told = run("prune", tiny, "--policy", "policy.json", "--out", "again").err
    assert "found on other weights of this class" in told
    assert "removed 7,680 of 15,360 prunable weights (50.00%) by a policy at 2:4" in told
    assert re.search(r"model\.layers\.0\.self_attn\.k_proj +16 × 32 +0\.5000 +0\.\d{5} +magnitude *\n", told)
    assert document["policy"]["calibration"]["text"] == story.name
    assert '"sites"' not in (place / "out" / "README.md").read_text()
    found = load_model(str(place / "out"))
    for offset, metric in enumerate(masker.metrics):
        calibration = {"calibration": str(story), "calibration_sequences": 4, "calibration_window": 32, "seed": 3}
        expected = evoprune.prune(dense, metric=metric, pattern="2:4", **calibration).language_model
        for here, there in zip(found.sites[offset::2], expected.sites[offset::2], strict=True):
            assert torch.equal(here.weight(), there.weight())


def test_single_weights_in_python(dense: LanguageModel, tmp_path: Path) -> None:
    policy = policy_of(dense, ByWeights((2, 4), "magnitude"))
    done = evoprune.prune(dense, policy=policy, out=tmp_path / "out")
    assert done.sparsity == 0.5
    assert done.language_model.fingerprint != dense.fingerprint
    assert all(bound.weight().all() for bound in dense.sites)
    kept = [bound.weight().flatten() != 0 for bound in load_model(str(tmp_path / "out")).sites]
    assert torch.cat(kept).tolist() == policy.mask.tolist()


def test_in_python_a_policy_says_all(dense: LanguageModel, file: Path) -> None:
    done = evoprune.prune(dense, policy=file)
    assert isinstance(done, evoprune.CutModel)
    assert done.form == "compact"
    with pytest.raises(InvalidInput, match="leave out sparsity"):
        evoprune.prune(dense, policy=file, sparsity=0.5)
    with pytest.raises(InvalidInput, match="no form 'small'"):
        evoprune.prune_policy(dense, file, form="small")
    with pytest.raises(InvalidInput, match="no form 'modules'"):
        evoprune.prune(dense, policy=file, form="modules")
    masked = evoprune.prune(dense, policy=file, form="masked").language_model
    assert [bound.weight().shape for bound in masked.sites] == [bound.weight().shape for bound in dense.sites]


@pytest.mark.parametrize(
    "words",
    [
        ("--sparsity", 0.5),
        ("--pattern", "2:4"),
        ("--allocation", "owl"),
        ("--metric", "wanda"),
        ("--shape", "shape.json"),
        ("--method", "shortgpt"),
        ("--calibration", "corpus"),
        ("--tokens", "amia"),
    ],
)
def test_nothing_else_says_what_goes(
    words: tuple[Any, ...], refused: Callable[..., str], tiny: Path, file: Path
) -> None:
    told = refused("prune", tiny, "--policy", file, "--out", "out", *words)
    first, second = ("--policy", words[0]) if words[0] not in ("--shape", "--method") else (words[0], "--policy")
    assert f"{first} says by itself what goes: leave out {second}" in told


def test_policies_that_do_not_fit(refused: Callable[..., str], tiny: Path, file: Path, place: Path) -> None:
    opt = save_tiny(place / "opt", "opt")
    told = refused("prune", opt, "--policy", file, "--out", "out")
    assert "is of another model, LlamaForCausalLM and not this OPTForCausalLM" in told
    wide = save_tiny(place / "wide", intermediate_size=64)
    told = refused("prune", wide, "--policy", file, "--out", "out")
    assert "model.layers.0.mlp has 48 members in units of neurons:20 there" in told
    document = json.loads(file.read_text())
    document["units"][0]["of"] = 3
    file.write_text(json.dumps(document))
    assert "the file was changed" in refused("prune", tiny, "--policy", file, "--out", "out")
    assert "no file 'nowhere.json'; give a policy's .json" in refused(
        "prune", tiny, "--policy", "nowhere.json", "--out", "out"
    )


def test_a_pattern_keeps_every_width(
    refused: Callable[..., str], dense: LanguageModel, tiny: Path, place: Path
) -> None:
    write_policy(policy_of(dense, ByWeights((2, 4), "magnitude")), place / "policy.json")
    told = refused("prune", tiny, "--policy", "policy.json", "--form", "compact", "--out", "out")
    assert "an N:M policy keeps every width: leave it out" in told
