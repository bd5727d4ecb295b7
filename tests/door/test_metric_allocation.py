"""`search metric --allocation`: candidates masked at the sparsities of an allocation, from the option to the files."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import evoprune
from evoprune.fitness.adapters import list_sites
from evoprune.fitness.worker import build
from evoprune.metrics.allocation import Allocation, SiteSparsity
from evoprune.metrics.allocation_file import read_allocation, write_allocation
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.exported import load_metric
from evoprune.search.config import validated
from evoprune.search.kinds import kind_of
from evoprune.search.rundir import RunDirectory
from evoprune.search.session import resume_search, start_search
from evoprune.search.worker_session import Resources
from tests.door.conftest import CONFIG, Run
from tests.models import save_tiny, tiny_model

pytestmark = pytest.mark.usefixtures("without_report")

# Of every block: nothing of the attention's output goes, all of one MLP does.
BY_KIND = {"q_proj": 0.5, "k_proj": 0.75, "v_proj": 0.25, "o_proj": 0.0, "gate_proj": 0.5, "up_proj": 0.75}


def by_hand(model_class: str = "LlamaForCausalLM") -> Allocation:
    """An allocation of the tiny Llama whose first MLP is gone."""
    sites = []
    for bound in list_sites(tiny_model()):
        site = bound.site
        sparsity = BY_KIND.get(site.name.rpartition(".")[2], 0.5)
        gone = site.block == 0 and "mlp" in site.name
        sites.append(SiteSparsity(site.name, (site.out_features, site.in_features), 1.0 if gone else sparsity))
    budget = sum(site.removed for site in sites) / sum(site.weights for site in sites)
    return Allocation(model_class, budget, tuple(sites), "hand")


@pytest.fixture
def small(tmp_path: Path, story: Path) -> Path:
    """A configuration on a text that takes no time to read."""
    path = tmp_path / "small.yaml"
    path.write_text(CONFIG.replace("data: {", f"data: {{source: {story}, "))
    return path


@pytest.fixture
def given(tmp_path: Path) -> Path:
    return write_allocation(by_hand(), tmp_path / "given.json")


@contextmanager
def resident(folder: Path) -> Iterator[Callable[[str], dict[str, torch.Tensor]]]:
    """What gives the masks of a metric as the workers of a run made them."""
    config = validated({"kind": "metric", **yaml.safe_load((folder / "config.yaml").read_text())})
    worker = build(config.context().to_json())
    evaluator = worker.evaluator(worker.handle("prepare", {})["name"])

    def masks(metric: str) -> dict[str, torch.Tensor]:
        return {site.name: keep for site, keep in evaluator.masks(load_metric(metric))}

    yield masks


def test_the_winner_is_masked_as_prune_masks_it(
    run: Run, tiny: Path, small: Path, story: Path, given: Path, place: Path
) -> None:
    """Bit for bit, by the command that the search prints at its end."""
    search = ("search", "metric", tiny, "--config", small, "--executor", "inline", "--seed", 1)
    done = run(*search, "--allocation", given)
    assert done.code == 0, done.err
    folder = Path(done.out.strip())
    budget = by_hand().sparsity
    assert f"{100 * budget:.4g}% sparsity, allocated by hand" in " ".join(done.err.split())
    result = json.loads((folder / "result.json").read_text())
    assert result["allocation"] == {"allocator": "hand", "sparsity": budget, "sites": by_hand().by_name()}
    assert float(result["target"]) == pytest.approx(budget, rel=1e-5)
    assert read_allocation(folder / "export" / "allocation.json") == by_hand()
    note = kind_of("metric").finished_note(result, [])
    assert "allocated by hand" in note
    assert str(given) in run("show", folder).err + (folder / "config.yaml").read_text()

    (command,) = [line for line in done.err.splitlines() if line.startswith("prune ")]
    words = shlex.split(command.removeprefix("prune").strip())[1:]
    calibration = ["--calibration", str(story), "--calibration-sequences", "4", "--calibration-window", "32"]
    assert words[-8:] == [*calibration, "--seed", "1"]
    pruned = run(*[word if word != "DIR" else place / "pruned" for word in words], "--json")
    assert pruned.code == 0, pruned.err
    assert pruned.json["removed"] == by_hand().removed
    weights = load_file(place / "pruned" / "model.safetensors")
    with resident(folder) as masks:
        expected = masks(result["best"]["expression"])
    assert {name: layer["sparsity"] for name, layer in zip(expected, pruned.json["layers"], strict=True)} == {
        site.name: site.removed / site.weights for site in by_hand().sites
    }
    for name, keep in expected.items():
        assert torch.equal(weights[f"{name}.weight"] != 0, keep), name


def test_a_run_may_be_named_and_leaves_its_own(tiny: Path, small: Path, allocated: Path) -> None:
    found = evoprune.search_metric(
        str(tiny), config=small, executor="inline", quiet=True, evaluations=3, allocation=allocated, minutes=5
    )
    file = allocated / "export" / "allocation.json"
    assert found.config["target"]["allocation"] == str(file)
    assert found.config["target"]["sparsity"] == 0.6
    assert read_allocation(found.path / "export" / "allocation.json") == read_allocation(file)
    # Which the next may start from in its turn.
    again = evoprune.search_metric(
        str(tiny), config=small, executor="inline", quiet=True, evaluations=3, allocation="latest", sparsity=0.6
    )
    assert again.config["target"]["allocation"] == str(found.path / "export" / "allocation.json")
    assert (again.path / "history.jsonl").read_bytes() == (found.path / "history.jsonl").read_bytes()


def test_another_allocation_does_not_go_on(tiny: Path, small: Path, given: Path, tmp_path: Path) -> None:
    config = evoprune.configuration.metric_config(
        {"model": str(tiny), "allocation": str(given), "evaluations": 3}, files=[small]
    )
    resources = Resources(executor="inline")
    started = start_search(config, resources, run_dir=tmp_path / "run")
    (started.path / "result.json").unlink()
    document = json.loads(given.read_text())
    first, second = (document["sites"][at] for at in (0, 7))
    assert first["shape"] == second["shape"]
    first["sparsity"], second["sparsity"] = 0.25, 0.75  # as many weights as before
    given.write_text(json.dumps(document))
    with pytest.raises(InvalidInput, match=r"allocation that candidates are masked at changed since.*--fork"):
        resume_search(RunDirectory(started.path), resources)


def test_what_does_not_go_with_an_allocation(
    refused: Callable[..., str], tiny: Path, small: Path, given: Path, tmp_path: Path
) -> None:
    def search(*words: object) -> str:
        return refused("search", "metric", tiny, "--config", small, "--executor", "inline", *words)

    budget = f"{by_hand().sparsity:g}"
    assert f"a sparsity of {budget}, not 0.3: give {budget} or none" in search("--allocation", given, "--sparsity", 0.3)
    assert "give --allocation or --pattern, not both" in search("--allocation", given, "--pattern", "2:4")
    assert "leave out --group layer" in search("--allocation", given, "--group", "layer")
    assert "no file" in search("--allocation", tmp_path / "nowhere.json")
    assert "neither a folder nor in" in search("--allocation", "nowhere")
    RunDirectory.create("metric", {}, {}, run_dir=tmp_path / "metrics").close()
    assert "a run that searched allocations is needed" in search("--allocation", tmp_path / "metrics")
    RunDirectory.create("allocation", {}, {}, run_dir=tmp_path / "unfinished").close()
    assert "is not finished: resume it first" in search("--allocation", tmp_path / "unfinished")
    (tmp_path / "levels.txt").write_text("model.layers.0.mlp.up_proj: -2\n")
    assert "EvoPress's text says neither" in search("--allocation", tmp_path / "levels.txt")


def test_an_allocation_of_another_model_is_refused_by_name(
    run: Run, tiny: Path, small: Path, given: Path, tmp_path: Path, place: Path
) -> None:
    """Before anything is computed, and nothing is left of the run."""
    other = write_allocation(by_hand("OPTForCausalLM"), tmp_path / "other.json")
    wider = save_tiny(tmp_path / "wider", intermediate_size=64)
    for model, file, words in (
        (tiny, other, "of another model, OPTForCausalLM and not this LlamaForCausalLM"),
        (wider, given, "model.layers.0.mlp.gate_proj is [64, 32] here and [48, 32] there"),
    ):
        done = run("search", "metric", model, "--config", small, "--executor", "inline", "--allocation", file)
        assert (done.code, done.out) == (2, "")
        assert done.err.splitlines()[-1].startswith("error: ") and words in done.err.splitlines()[-1]
        assert list(place.rglob("run.json")) == []


def test_the_option_is_resolved_for_a_dry_run(run: Run, given: Path) -> None:
    done = run("search", "metric", "--allocation", given, "--dry-run", "--json")
    assert done.json["target"] == {
        "sparsity": by_hand().sparsity, "pattern": None, "group": "row", "allocation": str(given),
        "compressor": "mask",
    }  # fmt: skip
