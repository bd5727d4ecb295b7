"""`prune`, `eval`, `stats` on a tiny model: what is written, what is printed, and that the two agree."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import evoprune
from evoprune.calibration import HELD_OUT_TOKENS, TEXT
from evoprune.metrics.criterion import CRITERIA, Metric
from evoprune.metrics.emit import MetricExport
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.mask import mask
from evoprune.metrics.records import MaskRule
from tests.door.conftest import Run
from tests.models import INNER, LAYERS


def zeros(folder: Path) -> dict[str, torch.Tensor]:
    """Where the matrices of a saved model are zero, loaded by plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    return {name: value == 0 for name, value in model.named_parameters() if name.endswith("_proj.weight")}


def test_prune_then_eval(run: Run, tiny: Path, place: Path) -> None:
    pruned = run("prune", tiny, "--out", "out", "--sparsity", 0.6, "--json")
    assert pruned.code == 0
    document = pruned.json
    assert list(document) == [
        "out", "sparsity", "removed", "prunable", "pattern", "criterion", "compressor", "allocation", "recovery",
        "layers", "accumulation",
    ]  # fmt: skip
    assert document["out"] == str(place / "out")
    assert (document["pattern"], document["criterion"], document["compressor"]) == (None, "wanda", "mask")
    assert document["allocation"] is None
    assert document["removed"] == sum(int(where.sum()) for where in zeros(place / "out").values())
    assert document["sparsity"] == document["removed"] / document["prunable"]
    assert len(document["layers"]) == 7 * LAYERS
    assert all(list(layer) == ["name", "shape", "sparsity", "error"] for layer in document["layers"])
    last = document["layers"][-1]
    assert (last["name"], last["shape"]) == ("model.layers.1.mlp.down_proj", [32, INNER])
    assert last["sparsity"] == int(0.6 * INNER) / INNER
    assert 0 < last["error"] < 1

    evaluated = run("eval", "out", "--dense", tiny, "--tokens", 1024, "--window", 32, "--json")
    assert evaluated.code == 0
    numbers = evaluated.json
    assert list(numbers) == [
        "model",
        "perplexity",
        "loss",
        "kl",
        "tokens",
        "window",
        "dtype",
        "images",
        "sparsity",
        "data",
    ]
    assert (numbers["model"], numbers["data"], numbers["window"], numbers["tokens"]) == ("out", "corpus", 32, 32 * 31)
    assert numbers["sparsity"] == document["sparsity"]
    assert numbers["kl"] > 0
    dense = run("eval", tiny, "--dense", tiny, "--tokens", 1024, "--window", 32, "--json").json
    assert dense["kl"] == pytest.approx(0, abs=1e-6)
    assert dense["sparsity"] == 0
    assert run("eval", tiny, "--tokens", 1024, "--json").json["kl"] is None

    record = json.loads((place / "out" / "evoprune.json").read_text())
    assert record["recipe"]["criterion"] == "wanda"
    assert record["recipe"]["sparsity"] == 0.6
    assert record["recipe"]["calibration"]["statistics"] == ["X_l2"]
    assert record["report"]["removed"] == document["removed"]


def test_both_errors_of_a_replay_are_told(run: Run, tiny: Path, story: Path, place: Path) -> None:
    words = ("prune", tiny, "--compressor", "refit", "--calibration", story, "--calibration-window", 32)
    dense = run(*words, "--out", "dense", "--json")
    path = run(*words, "--out", "path", "--accumulation", "path", "--json")
    assert (dense.json["accumulation"], path.json["accumulation"]) == ("dense", "path")
    assert all("path_error" not in layer for layer in dense.json["layers"])
    assert all(0 < layer["path_error"] < 1 for layer in path.json["layers"])
    # In the last block a refit to what the matrix is given now suits dense inputs less than one to those.
    last = [document.json["layers"][-1]["error"] for document in (dense, path)]
    assert last[0] < last[1]
    shown = run(*words, "--out", "path", "--accumulation", "path")
    assert "path error" in shown.err
    record = json.loads((place / "path" / "evoprune.json").read_text())
    assert record["recipe"]["accumulation"] == "path"
    assert record["report"]["layers"] == path.json["layers"]
    assert '"accumulation": "path"' in (place / "path" / "README.md").read_text()


def test_a_compressor_that_changes_weights(run: Run, tiny: Path, place: Path) -> None:
    pruned = run("prune", tiny, "--out", "out", "--sparsity", 0.6, "--compressor", "sparsegpt", "--json")
    document = pruned.json
    assert (document["criterion"], document["compressor"]) == (None, "sparsegpt")
    assert document["removed"] == sum(int(where.sum()) for where in zeros(place / "out").values())
    assert all(layer["sparsity"] == int(0.6 * math.prod(layer["shape"])) / math.prod(layer["shape"])
               for layer in document["layers"])  # fmt: skip
    recipe = json.loads((place / "out" / "evoprune.json").read_text())["recipe"]
    assert (recipe["compressor"], recipe["criterion"], recipe["group"]) == ("sparsegpt", None, "layer")
    assert recipe["calibration"]["statistics"] == ["H"]
    wanda = run("prune", tiny, "--out", "masked", "--sparsity", 0.6, "--json").json
    errors = zip(document["layers"], wanda["layers"], strict=True)
    assert sum(ours["error"] < theirs["error"] for ours, theirs in errors) > 10
    report = json.loads((place / "out" / "sparsity_report.json").read_text())
    assert report["removed"] == document["removed"]
    for stored, layer in zip(report["layers"], document["layers"], strict=True):
        assert {name: stored[name] for name in layer} == layer
        assert stored["pattern"] is None and stored["seconds"] > 0
        # A whole process that holds torch is above 64 MiB; where the system does not say, there is no number.
        assert stored["peak_bytes"] is None or stored["peak_bytes"] > 1 << 26
    assert "`sparsity_report.json`" in (place / "out" / "README.md").read_text()
    told = run("prune", tiny, "--out", "out", "--pattern", "2:4", "--compressor", "sparsegpt", "--metric", "ria")
    assert "sparsegpt chooses by itself what goes and does not read --metric" in told.err
    assert "removed 7,680 of 15,360 prunable weights (50.00%) by sparsegpt at 2:4" in told.err
    for where in zeros(place / "out").values():
        assert (where.reshape(where.shape[0], -1, 4).sum(2) == 2).all()
    report = json.loads((place / "out" / "sparsity_report.json").read_text())
    assert {layer["pattern"] for layer in report["layers"]} == {"2:4"}


def test_compressors_with_masks_of_a_metric_and_of_their_own(run: Run, tiny: Path, place: Path) -> None:
    for words, group, said in (
        (("awp:bits=3", "--metric", "ria"), "layer", "awp:bits=3 chooses by itself what goes, from what ria keeps as"),
        (("obs", "--group", "row", "--metric", "ria"), "row", "obs chooses by itself what goes and does not read"),
    ):
        out = words[0].partition(":")[0]
        done = run("prune", tiny, "--out", out, "--sparsity", 0.6, "--compressor", *words)
        assert done.code == 0 and said in " ".join(done.err.split())
        recipe = json.loads((place / out / "evoprune.json").read_text())["recipe"]
        assert (recipe["compressor"], recipe["group"]) == (words[0], group)
        if group == "row":
            for where in zeros(place / out).values():
                assert (where.sum(1) >= int(0.6 * where.shape[1])).all()


def test_what_people_see(run: Run, tiny: Path, place: Path) -> None:
    pruned = run("prune", tiny, "--out", "my out", "--metric", "magnitude")
    assert pruned.code == 0
    assert pruned.out == f"{place / 'my out'}\n"
    assert f"try it: evoprune eval '{place / 'my out'}' --dense {tiny}" in pruned.err
    assert "model.layers.0.self_attn.q_proj" in pruned.err
    assert "removed 7,680 of 15,360 prunable weights (50.00%) by magnitude" in pruned.err
    evaluated = run("eval", "my out", "--dense", tiny, "--tokens", 512)
    assert "50.0000% of the prunable weights are zero" in evaluated.out
    assert "corpus (text C), 504 predicted tokens, windows of 64, float32" in evaluated.out
    assert "nats per token from" in evaluated.out


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["--metric", "magnitude"], MaskRule(0.5, group="layer")),
        (["--metric", "magnitude", "--group", "row"], MaskRule(0.5, group="row")),
        (["--metric", "abs(W)"], MaskRule(0.5, group="row")),
        (["--metric", "abs(W)", "--pattern", "2:4"], MaskRule(pattern=(2, 4))),
        (["--metric", "magnitude", "--pattern", "1:4"], MaskRule(pattern=(1, 4))),
        (["--metric", "abs(W)", "--sparsity", "0.25", "--group", "layer"], MaskRule(0.25, group="layer")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_masks_are_those_of_the_rule(words: list[str], rule: MaskRule, run: Run, tiny: Path, place: Path) -> None:
    assert run("prune", tiny, "--out", "out", *words).code == 0
    dense = dict(AutoModelForCausalLM.from_pretrained(tiny).named_parameters())
    for name, removed in zeros(place / "out").items():
        assert torch.equal(~removed, mask(dense[name].detach().abs(), rule)), name


def test_the_global_group_compares_matrices(run: Run, tiny: Path) -> None:
    document = run("prune", tiny, "--out", "out", "--metric", "magnitude", "--group", "global", "--json").json
    assert document["sparsity"] == 0.5
    assert len({layer["sparsity"] for layer in document["layers"]}) > 1


def test_data_free_criteria_read_no_text(run: Run, tiny: Path, place: Path) -> None:
    (place / "short.txt").write_text("not enough")
    done = run("prune", tiny, "--out", "out", "--metric", "random", "--calibration", "short.txt", "--json")
    assert done.code == 0
    assert {layer["error"] for layer in done.json["layers"]} == {None}


def test_exported_metrics_prune_alike(run: Run, tiny: Path, place: Path) -> None:
    wanda = CRITERIA["wanda"]
    assert isinstance(wanda, Metric)
    expected = run("prune", tiny, "--out", "expected", "--json").json["layers"]
    for suffix in ("json", "py"):
        MetricExport(wanda).write(place / f"metric.{suffix}")
        document = run("prune", tiny, "--out", f"out-{suffix}", "--metric", f"metric.{suffix}", "--json").json
        assert document["layers"] == expected
        assert document["criterion"] == "mul(abs(W),X_l2)"


def test_an_older_checkpoint_is_replaced_and_other_folders_are_not(run: Run, tiny: Path, place: Path) -> None:
    assert run("prune", tiny, "--out", "out", "--metric", "magnitude").code == 0
    assert run("prune", tiny, "--out", "out", "--metric", "magnitude", "--sparsity", 0.75).code == 0
    assert run("eval", "out", "--tokens", 128, "--json").json["sparsity"] == 0.75
    (place / "mine").mkdir()
    (place / "mine" / "notes.txt").write_text("mine")
    done = run("prune", tiny, "--out", "mine", "--metric", "magnitude")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "holds other files" in done.err


def test_stats(run: Run, tiny: Path) -> None:
    words = ("stats", tiny, "--calibration-sequences", 4, "--calibration-window", 16)
    done = run(*words, "--statistics", "X_l2, Y_l2", "--json")
    assert done.code == 0
    document = done.json
    assert Path(document["folder"]).is_dir()
    assert {"X_l2", "Y_l2"} <= set(document["statistics"])
    assert (document["sequences"], document["window"], document["data"]) == (4, 16, "corpus")
    again = run(*words, "--metric", "wanda")
    assert again.out == f"{document['folder']}\n"
    assert run(*words, "--statistics", "X_l3").code == 2
    assert run(*words, "--statistics", "X_l2", "--metric", "wanda").code == 2


@pytest.mark.parametrize("command", ["prune", "stats", "eval"])
def test_the_defaults_in_the_help_are_true(command: str, run: Run) -> None:
    text = " ".join(run(command, "--help").out.replace("│", " ").split())
    if command == "eval":
        assert f"[default: {HELD_OUT_TOKENS}, or all there is]" in text
        assert f"tokens in a window [default: {TEXT.window}]" in text
    else:
        assert f"windows of it [default: {TEXT.calibration_sequences}]" in text
        assert f"tokens in each [default: {TEXT.calibration_window}]" in text


def test_python(tiny: Path, place: Path) -> None:
    model = evoprune.load_model(str(tiny))
    statistics = evoprune.collect_statistics(model, ["X_l2"], calibration_sequences=4)
    assert statistics.tensor("model.layers.0.self_attn.q_proj", "X_l2").shape == (1, 32)
    pruned = evoprune.prune(model, metric="wanda", sparsity=0.5, calibration_sequences=4)
    assert (pruned.out, pruned.sparsity) == (None, 0.5)
    assert pruned.language_model.fingerprint != model.fingerprint
    assert evoprune.evaluate(model, tokens=256).sparsity == 0
    assert evoprune.prune(str(tiny), metric=CRITERIA["magnitude"], sparsity=0.0).removed == 0
    evaluation = evoprune.evaluate(pruned.language_model, dense=model, tokens=256)
    assert evaluation.kl is not None and evaluation.kl > 0
    assert evaluation.sparsity == 0.5
    assert list(place.iterdir()) == []
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = evoprune.nothing
    assert {"prune", "search_metric", "__version__"} <= set(dir(evoprune))


def test_published_gradients_are_imported(tiny: Path, place: Path) -> None:
    """By the public name; other files than dictionaries of tensors are refused, and no object in them is made."""
    model = evoprune.load_model(str(tiny))
    gradients = {
        f"{bound.site.kind}_layer_{bound.site.block}": torch.full_like(bound.weight(), 200.0).half()
        for bound in model.sites
    }
    torch.save(gradients, "gradients.pth")
    found = evoprune.import_gradients(Path("gradients.pth"), model, Path("set"))
    assert found.names == {"G_l2"}
    for bound in model.sites:  # both projects multiply by 100
        torch.testing.assert_close(found.tensor(bound.site.name, "G_l2"), torch.full_like(bound.weight(), 2.0))
    torch.save({"self_attn.q_proj_layer_0": Path("an object")}, "object.pth")
    with pytest.raises(InvalidInput, match="no file of gradient tensors"):
        evoprune.import_gradients(Path("object.pth"), model, Path("other"))
    assert not Path("other").exists()
