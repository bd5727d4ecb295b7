"""Whole policy searches on a tiny random model: from a folder on disk to the exported policy."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import evoprune
from evoprune.configuration import check_names, policy_config
from evoprune.fitness.mask_units import kept_cost
from evoprune.fitness.models import load_model
from evoprune.fitness.policy_file import LearnedPolicy, read_policy
from evoprune.fitness.unit_costs import unit_costs
from evoprune.fitness.unit_criteria import UNIT_CRITERIA, score_units
from evoprune.metrics.allocation import Allocation, SiteSparsity
from evoprune.metrics.allocation_file import write_allocation
from evoprune.metrics.errors import Interrupted, InvalidInput
from evoprune.metrics.shape_file import read_shape
from evoprune.search.config import resolve_as
from evoprune.search.config_policy import PolicySearchConfig
from evoprune.search.learners import LEARNERS
from evoprune.search.policy_search import INITIALISATION
from evoprune.search.rundir import RunDirectory
from evoprune.search.session import resume_search, start_search
from evoprune.search.worker_session import Resources
from tests.models import save_tiny
from tests.search.whole_runs import history, lines_of, result_of, stopping_in, timeless, tiny_options

EVALUATIONS = 48
INLINE = Resources(executor="inline")
UNITS = ["kv-group", "ranked:8"]
# Of the tiny Llama, by hand: see tests/search/test_structure_run.py.
HEAD, GROUP, NEURON, NORM = 2 * 8 * 32, 2 * 8 * 32, 3 * 32, 32
DENSE = 2 * (4 * HEAD + 2 * GROUP + 48 * NEURON + 2 * NORM)


def config(world: Path, **changes: Any) -> PolicySearchConfig:
    options = {
        **tiny_options(world),
        "target.units": UNITS,
        "searcher.windows": 6,
        "searcher.batch": 2,
        "searcher.validation": 3,
        "searcher.validate_every": 2,
        "searcher.samples": 4,
        "evaluations": EVALUATIONS,
        **changes,
    }
    return resolve_as(PolicySearchConfig, overrides={key: value for key, value in options.items() if value is not None})


PATTERN = {
    "target.sparsity": None,
    "target.units": None,
    "target.pattern": "2:4",
    "target.metrics": ["magnitude", "ria", "wanda"],
    "searcher.prior": "wanda",
}


@pytest.fixture(scope="module")
def finished(world: Path) -> RunDirectory:
    return start_search(config(world), INLINE, run_dir=world / "policy")


@pytest.fixture(scope="module")
def patterned(world: Path) -> RunDirectory:
    return start_search(config(world, **PATTERN), INLINE, run_dir=world / "pattern")


def test_the_result_has_what_scripts_rely_on(finished: RunDirectory) -> None:
    result, lines = result_of(finished), lines_of(finished)
    assert result["kind"] == "policy" and finished.state == "finished"
    assert 40 < result["evaluations"] == len(lines) <= EVALUATIONS
    assert result["distinct"] == len({line["mask"] for line in lines})
    assert [row["name"] for row in result["baselines"]] == [INITIALISATION, "flap", "magnitude", "wanda-sp"]
    for entry in (result["dense"], result["best"], *result["baselines"]):
        assert set(entry["heldout"]) == {"loss", "perplexity", "kl", "stderr", "tokens"}
        assert entry["heldout"]["tokens"] == 8 * 31
    assert result["dense"]["heldout"]["kl"] == pytest.approx(0, abs=1e-5)
    shown = evoprune.Run(finished).summary
    assert shown["evaluations"] == result["evaluations"] and shown["best"]["policy"] == result["best"]["policy"]
    shared = json.dumps({name: result[name] for name in ("best", "front", "baselines", "dense")})
    assert "/" not in shared and "seconds" not in shared


def test_nobody_costs_more_than_what_is_left(world: Path, finished: RunDirectory) -> None:
    """Of the winner and the initialisation less than a unit is unused; others are at the winner's cost, to a neuron."""
    result, policy = result_of(finished), read_policy(finished.path / "export" / "policy.json")
    costs = unit_costs(load_model(str(world / "model")), "parameters")
    assert result["dense_cost"] == costs.dense == DENSE
    best = result["best"]
    assert best["cost"] == kept_cost(policy.table, policy.mask, costs) == DENSE - best["removed"]
    cheapest = 8 * NEURON
    assert DENSE // 2 - cheapest - 4 * NORM < best["cost"] <= DENSE // 2
    for row in result["baselines"][1:]:
        assert best["cost"] - NEURON < row["cost"] <= best["cost"]
    for line in lines_of(finished):
        mask = policy.table.unpacked(line["kept"])
        assert int(policy.table.costs[mask].sum()) + policy.table.fixed <= DENSE // 2


def test_the_winner_is_the_best_of_the_finals(finished: RunDirectory) -> None:
    result = result_of(finished)
    finals = [line for line in lines_of(finished) if line["stage"] == "final"]
    assert result["best"]["fitness"] == min(line["loss"] for line in finals)
    assert result["baselines"][0]["fitness"] == finals[-1]["loss"]


def test_what_prune_writes_is_what_the_search_measured(world: Path, finished: RunDirectory) -> None:
    result = result_of(finished)
    pruned = evoprune.prune_policy(str(world / "model"), finished.path / "export" / "policy.json")
    shape = evoprune.prune_shape(str(world / "model"), finished.path / "export" / "shape.json")
    for made in (pruned, shape):
        measured = evoprune.evaluate(
            made.language_model, dense=str(world / "model"), data=str(world / "text.txt"), window=32, tokens=8 * 32
        )
        assert measured.loss == pytest.approx(result["best"]["heldout"]["loss"], abs=1e-5)
        assert measured.kl == pytest.approx(result["best"]["heldout"]["kl"], abs=1e-5)
    kept = [len(block.neurons) for block in read_shape(finished.path / "export" / "shape.json").blocks]
    assert kept == [row[2] for row in result["best"]["shape"]]


def test_ranked_units_hold_the_neurons_that_the_prior_ranks_next_to_each_other(
    world: Path, finished: RunDirectory
) -> None:
    policy = read_policy(finished.path / "export" / "policy.json")
    model = load_model(str(world / "model"))
    criterion = UNIT_CRITERIA["wanda-sp"]
    statistics = evoprune.collect_statistics(
        model, criterion.needs, calibration=str(world / "text.txt"), calibration_sequences=8, calibration_window=32
    )
    for row in policy.table.rows:
        if row.kind == "ranked:8":
            scores = score_units(model, criterion, statistics)[row.block].neurons
            dealt = [scores[list(row.members(index))] for index in range(row.count)]
            assert all(float(above.min()) >= float(below.max()) for above, below in itertools.pairwise(dealt))


@pytest.mark.parametrize("phase", ["searching", "measuring on held-out text"])
def test_a_run_that_was_stopped_has_the_same_history(
    world: Path, finished: RunDirectory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, phase: str
) -> None:
    path = tmp_path / "run"
    for after in (1, 9):
        monkeypatch.setattr("evoprune.search.session.stop_on_signals", stopping_in(path, phase, after))
        with pytest.raises(Interrupted):
            if path.exists():
                resume_search(RunDirectory.open(path), INLINE)
            else:
                start_search(config(world), INLINE, run_dir=path)
        if phase != "searching":
            break
    monkeypatch.undo()
    run = resume_search(RunDirectory.open(path), INLINE)
    assert history(run) == history(finished)
    assert timeless(run.result) == timeless(finished.result)


@pytest.mark.ray
@pytest.mark.slow
def test_any_number_of_workers_has_the_same_history(world: Path, finished: RunDirectory, tmp_path: Path) -> None:
    for workers in (1, 2, 4):
        resources = Resources(executor="ray", workers=workers)
        run = start_search(config(world), resources, run_dir=tmp_path / f"run-{workers}")
        assert history(run) == history(finished)
        assert timeless(run.result) == timeless(finished.result)


@pytest.mark.parametrize("name", sorted(LEARNERS))
def test_every_learner_runs(world: Path, tmp_path: Path, name: str) -> None:
    changes = {"searcher.name": name, "evaluations": 24, "searcher.baselines": []}
    result = result_of(start_search(config(world, **changes), INLINE, run_dir=tmp_path / "run"))
    assert result["best"]["cost"] <= DENSE // 2
    assert result["searcher"] == name and result["steps"] > 0


@pytest.mark.parametrize(
    ("budget", "units"), [("kind", ["query-head", "neurons:16"]), ("block", ["kv-group", "neuron"])]
)
def test_counts_are_met_in_every_kind_or_block(world: Path, tmp_path: Path, budget: str, units: list[str]) -> None:
    changes = {"target.budget": budget, "target.units": units, "evaluations": 24, "searcher.baselines": []}
    run = start_search(config(world, **changes), INLINE, run_dir=tmp_path / "run")
    policy = read_policy(run.path / "export" / "policy.json")
    rows = [
        (row.kind, row.count, int(policy.mask[policy.table.of_row(at)].sum()))
        for at, row in enumerate(policy.table.rows)
    ]
    if budget == "block":
        assert all(2 * kept == count for _, count, kept in rows)
    for kind in {row[0] for row in rows}:
        assert 2 * sum(row[2] for row in rows if row[0] == kind) == sum(row[1] for row in rows if row[0] == kind)
    # Query heads that differ in number between the groups of a block are said by no shape.
    assert (run.path / "export" / "shape.json").exists() == (result_of(run)["best"]["shape"] is not None)


def test_parts_that_may_not_go_keep_their_best_unit(world: Path, tmp_path: Path) -> None:
    changes = {"target.drop": "none", "target.sparsity": 0.6, "evaluations": 24, "searcher.baselines": []}
    run = start_search(config(world, **changes), INLINE, run_dir=tmp_path / "run")
    policy = read_policy(run.path / "export" / "policy.json")
    for line in lines_of(run):
        mask = policy.table.unpacked(line["kept"])
        assert all(mask[policy.table.of_row(at)].any() for at in range(len(policy.table.rows)))


def test_a_pattern_chooses_a_metric_for_every_matrix(world: Path, patterned: RunDirectory) -> None:
    result = result_of(patterned)
    assert [row["name"] for row in result["baselines"]] == [INITIALISATION, "magnitude", "ria", "wanda"]
    rows = {row["name"]: row for row in result["baselines"]}
    assert rows[INITIALISATION]["heldout"] == rows["wanda"]["heldout"]
    chosen = result["best"]["policy"]["metrics"]
    assert len(chosen) == 14 and set(chosen.values()) <= {"magnitude", "ria", "wanda"}
    assert not (patterned.path / "export" / "shape.json").exists()
    pruned = evoprune.prune_policy(str(world / "model"), patterned.path / "export" / "policy.json")
    measured = evoprune.evaluate(
        pruned.language_model, dense=str(world / "model"), data=str(world / "text.txt"), window=32, tokens=8 * 32
    )
    assert measured.loss == pytest.approx(result["best"]["heldout"]["loss"], abs=1e-5)
    for bound in pruned.language_model.sites:
        assert ((bound.weight().reshape(-1, 4) != 0).sum(1) <= 2).all()


def started(world: Path, source: str | Path, tmp_path: Path, **changes: Any) -> LearnedPolicy:
    """A run that hardly moves from where it starts."""
    given = {"seed_from": str(source), "evaluations": 9, "searcher.baselines": [], **changes}
    run = start_search(config(world, **given), INLINE, run_dir=tmp_path / "started")
    return read_policy(run.path / "export" / "policy.json")


def test_a_search_starts_from_a_policy_a_shape_and_an_allocation(
    world: Path, finished: RunDirectory, tmp_path: Path
) -> None:
    before = read_policy(finished.path / "export" / "policy.json")
    assert before.probabilities is not None
    again = started(world, finished.path, tmp_path / "policy")
    assert again.probabilities is not None
    surely = (before.probabilities > 0.9) | (before.probabilities < 0.1)
    assert ((again.probabilities > 0.5) == (before.probabilities > 0.5))[surely].all()

    shape = started(world, finished.path / "export" / "shape.json", tmp_path / "shape")
    assert shape.mask.tolist() == before.mask.tolist()

    model = load_model(str(world / "model"))
    sites = tuple(
        SiteSparsity(
            site.name, (site.out_features, site.in_features), 0.9 if site.block and "mlp" in site.name else 0.4
        )
        for site in (bound.site for bound in model.sites)
    )
    budget = sum(site.removed for site in sites) / sum(site.weights for site in sites)
    file = write_allocation(
        Allocation("LlamaForCausalLM", round(budget, 2), sites, "by hand"), tmp_path / "allocation.json"
    )
    found = started(world, file, tmp_path / "allocation")
    kept = [
        int(found.mask[found.table.of_row(at)].sum())
        for at, row in enumerate(found.table.rows)
        if row.kind == "ranked:8"
    ]
    assert kept[1] <= 1 < 3 <= kept[0]


def test_a_start_of_another_model_or_of_other_units_is_refused(
    world: Path, finished: RunDirectory, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput, match="other units"):
        started(world, finished.path, tmp_path, **{"target.units": ["kv-group", "neurons:4"]})
    save_tiny(tmp_path / "wider", intermediate_size=64)
    changes = {
        "model.name": str(tmp_path / "wider"),
        "seed_from": str(finished.path / "export" / "shape.json"),
    }
    with pytest.raises(InvalidInput, match="of another LlamaForCausalLM"):
        start_search(config(world, **changes), INLINE, run_dir=tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.3, "pattern": "2:4"}, "give --sparsity or --pattern, not both"),
        ({"pattern": "2:4", "units": "kv-group"}, "a pattern is of weights"),
        ({"units": "weights"}, "single weights are learned in a pattern only"),
        ({"units": ""}, "no kind of unit|kind of unit"),
        ({"population": 1}, "1 masks of a step are out of range"),
        ({"evaluations": 3}, "give at least"),
    ],
)
def test_options_that_cannot_be_are_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as refused:
        check_names(policy_config(options))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"searcher.name": "no-such"}, "no learner 'no-such'"),
        ({"searcher.name": "cma", "searcher.samples": "auto"}, "fixed number of masks a step: give --population"),
        ({"searcher.options": {"rte": 1}}, "has no parameter 'rte'"),
        ({"searcher.options": {"estimator": "no-such"}}, "no-such"),
        ({"searcher.baselines": ["no-such"]}, "no unit criterion 'no-such'"),
        ({"searcher.prior": "no-such"}, "no-such"),
        ({"searcher.mapping": "no-such"}, "no mapping 'no-such'"),
        ({"target.units": ["kv-group", "query-head"]}, "overlap in the attention"),
        ({"target.units": ["no-such"]}, "no kind of unit 'no-such'"),
        ({"seed_from": "no-such"}, "no run 'no-such'"),
    ],
)
def test_names_that_do_not_exist_are_refused_before_a_folder_is_made(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as refused:
        check_names(policy_config({}, settings=settings))
    assert "\n" not in str(refused.value)


def test_budgets_that_cannot_be_met_are_refused_in_one_line(world: Path, tmp_path: Path) -> None:
    whole_parts = {"target.units": ["attention", "mlp"], "target.budget": "block", "target.drop": "none"}
    for changes, message in (({"target.sparsity": 0.999}, "at most"), (whole_parts, "cannot go")):
        with pytest.raises(InvalidInput, match=message):
            start_search(config(world, **changes), INLINE, run_dir=tmp_path / message)


def test_where_nothing_can_go_the_model_is_the_dense_one(world: Path, tmp_path: Path) -> None:
    changes = {"target.sparsity": 1e-7, "target.units": ["attention", "mlp"], "searcher.baselines": []}
    run = start_search(config(world, **changes), INLINE, run_dir=tmp_path / "run")
    result = result_of(run)
    assert result["evaluations"] == 2 and result["best"]["removed"] == 0
    assert result["best"]["heldout"] == result["dense"]["heldout"]


def test_the_probabilities_are_those_of_the_last_step(finished: RunDirectory) -> None:
    policy = read_policy(finished.path / "export" / "policy.json")
    notes = [line["policy"] for line in lines_of(finished) if "policy" in line]
    assert policy.probabilities is not None
    assert policy.probabilities == pytest.approx(np.asarray(notes[-1]["units"]), abs=1e-4)
