"""Jobs about masks, whatever came before them, against models masked, cut and scored by hand."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evoprune.fitness.context import EvaluationContext
from evoprune.fitness.mask_units import UnitTable, shape_of
from evoprune.fitness.models import LanguageModel, load_model
from evoprune.fitness.policy_worker import PolicyWorker, build
from evoprune.fitness.prepare import Prepared
from evoprune.fitness.pruning import mask_rule, prune_model
from evoprune.fitness.surgeon import Surgeon
from evoprune.fitness.teacher import WindowLosses, linear_head, window_losses
from evoprune.fitness.unit_choice import choose_units
from evoprune.fitness.unit_costs import UnitCosts, kept_by
from evoprune.fitness.unit_criteria import UNIT_CRITERIA, score_units
from evoprune.fitness.units import find_units
from evoprune.metrics.criterion import CRITERIA
from evoprune.metrics.errors import InvalidCandidate, InvalidInput
from tests.models import save_tiny

UNITS = {"kind": "units", "units": ["kv-group", "neurons:20"]}


@dataclass
class Tried:
    """A worker, and a second model of the same weights, which is cut by hand."""

    worker: PolicyWorker
    plain: LanguageModel
    named: dict[str, Any]

    def __post_init__(self) -> None:
        self.units = find_units(self.plain)
        self.surgeon = Surgeon(self.plain, self.units)

    @property
    def prepared(self) -> Prepared:
        return Prepared.open(self.named["prepared"])

    def table(self, masker: dict[str, Any]) -> UnitTable:
        answer = self.worker.handle("units", {**self.named, "masker": masker, "quantity": "parameters"})
        return UnitTable.from_json(json.loads(json.dumps(answer["units"])))

    def mask(self, masker: dict[str, Any], kept: np.ndarray | None, windows: list[int]) -> dict[str, Any]:
        spelled = None if kept is None else self.table(masker).packed(kept)
        payload = {**self.named, "masker": masker, "kept": spelled, "windows": windows}
        return self.worker.handle("mask", payload)

    def losses(self, side: str, windows: list[int] | None = None) -> WindowLosses:
        text, teacher = self.prepared.text(side)
        assert isinstance(text, torch.Tensor)
        chosen = list(range(len(text))) if windows is None else windows
        head = linear_head(self.plain.model, text)
        return window_losses(self.plain.model, head, text[chosen], teacher.take(chosen))


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def tried(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp(request.param)
    save_tiny(folder / "model", request.param)
    (folder / "text.txt").write_text("\n".join(f"line {index}: {index * index % 97} pears." for index in range(900)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVOPRUNE_CACHE", str(folder / "cache"))
        context = EvaluationContext(
            model=str(folder / "model"),
            data=str(folder / "text.txt"),
            calibration=str(folder / "text.txt"),
            window=24,
            calibration_window=24,
            calibration_sequences=4,
            rungs=(6,),
            heldout_windows=3,
            statistics=("X_l2", "X_mean", "X_var", "H"),
        )
        worker = build(json.loads(json.dumps(context.to_json())))
        named = {"prepared": worker.handle("prepare", {})["name"]}
        yield Tried(worker, load_model(str(folder / "model")), named)


def some(table: UnitTable, seed: int = 1) -> np.ndarray:
    mask = np.random.default_rng(seed).random(table.n) < 0.6
    mask[table.of_row(1)] = False
    return mask


def test_a_mask_is_the_cut_model(tried: Tried) -> None:
    table = tried.table(UNITS)
    mask = some(table)
    answer = tried.mask(UNITS, mask, [4, 1, 2])
    blocks = shape_of(table, mask, [block.widths for block in tried.units])
    assert blocks is not None
    tried.surgeon.apply(blocks)
    expected = tried.losses("search", [4, 1, 2])
    tried.surgeon.restore()
    assert expected.kl is not None
    assert answer["kl"] == pytest.approx(expected.kl.tolist(), abs=1e-5)
    assert answer["nll"] == pytest.approx(expected.nll.tolist(), abs=1e-5)


def test_answers_do_not_depend_on_what_came_before(tried: Tried) -> None:
    table = tried.table(UNITS)
    first = tried.mask(UNITS, some(table), [0, 3])
    tried.mask(UNITS, some(table, 2), [1])
    other = {"kind": "units", "units": ["block"]}
    tried.mask(other, np.array([True, False]), [0, 3])
    assert tried.mask(UNITS, some(table), [0, 3]) == first


def test_all_kept_is_the_dense_model_to_the_last_bit(tried: Tried) -> None:
    table = tried.table(UNITS)
    windows = [5, 0, 1, 2, 3]
    answer, expected = tried.mask(UNITS, np.ones(table.n, dtype=bool), windows), tried.losses("search", windows)
    assert expected.kl is not None
    assert answer == {"kl": expected.kl.tolist(), "nll": expected.nll.tolist()}
    assert tried.mask(UNITS, None, windows) == answer


def test_a_loss_that_is_no_number_is_an_invalid_candidate(tried: Tried) -> None:
    table = tried.table(UNITS)
    model = tried.worker.language_model.model
    norm = next(parameter for name, parameter in model.named_parameters() if "norm" in name or "ln_f" in name)
    before = norm.detach().clone()
    norm.data.fill_(torch.nan)
    with pytest.raises(InvalidCandidate, match="NONFINITE"):
        tried.mask(UNITS, some(table), [0])
    norm.data.copy_(before)


@pytest.mark.parametrize("windows", [[], [6], [-1], [0.5]])
def test_windows_that_are_not_there_are_refused(tried: Tried, windows: list[Any]) -> None:
    with pytest.raises(InvalidInput, match="of 6"):
        tried.mask(UNITS, some(tried.table(UNITS)), windows)


def scores(tried: Tried, masker: dict[str, Any], criterion: Any) -> list[float]:
    payload = {**tried.named, "masker": masker, "criterion": criterion}
    found: list[float] = tried.worker.handle("unit-scores", payload)["scores"]
    return found


@pytest.mark.parametrize("criterion", ["wanda-sp", "flap", "magnitude"])
def test_unit_scores_are_those_of_the_criterion(tried: Tried, criterion: str) -> None:
    found = score_units(tried.plain, UNIT_CRITERIA[criterion], tried.prepared.statistics())
    expected = []
    for block in found:
        expected += block.groups.tolist()
        expected += [part.sum().item() for part in block.neurons.split(20)]
    assert scores(tried, UNITS, criterion) == pytest.approx(expected, rel=1e-6)
    heads = scores(tried, {"kind": "units", "units": ["query-head"]}, criterion)
    assert heads == pytest.approx(torch.cat([block.heads for block in found]).tolist(), rel=1e-6)
    blocks = scores(tried, {"kind": "units", "units": ["block"]}, criterion)
    # FLAP standardises its scores, whose sum is then a sum of roundings.
    expected = [(block.groups.double().sum() + block.neurons.double().sum()).item() for block in found]
    assert blocks == pytest.approx(expected, rel=1e-6)


def test_scores_of_weights_are_added_up_over_columns(tried: Tried) -> None:
    """Wanda's over the columns of the output matrices are Wanda-sp's."""
    assert scores(tried, UNITS, {"name": "wanda"}) == pytest.approx(scores(tried, UNITS, "wanda-sp"), rel=1e-5)
    spelled = {"expression": ["mul", ["abs", "W"], "X_l2"]}
    assert scores(tried, UNITS, spelled) == pytest.approx(scores(tried, UNITS, "wanda-sp"), rel=1e-5)


def heldout(tried: Tried, **payload: Any) -> dict[str, Any]:
    return tried.worker.handle("heldout", {**tried.named, **payload})


def test_held_out_losses_of_masks_and_of_the_dense_model(tried: Tried) -> None:
    table = tried.table(UNITS)
    dense = heldout(tried, masker=UNITS, kept=None)
    expected = tried.losses("heldout")
    assert expected.kl is not None
    assert (dense["kl"], dense["nll"]) == (expected.kl.tolist(), expected.nll.tolist())
    assert dense["tokens"] == 3 * 23
    whole = heldout(tried, masker=UNITS, kept=table.packed(np.ones(table.n, dtype=bool)))
    assert whole == dense
    masked = heldout(tried, masker=UNITS, kept=table.packed(some(table)))
    assert sum(masked["kl"]) > sum(dense["kl"])


@pytest.mark.parametrize("criterion", ["wanda-sp", "flap"])
def test_held_out_losses_of_a_criterion_s_own_choice(tried: Tried, criterion: str) -> None:
    costs = tried.worker.handle("costs", {"quantity": "parameters", "batch": 1, "sequence": None})
    given = {"criterion": criterion, "costs": costs, "fraction": 0.3, "spread": "uniform"}
    answer = heldout(tried, **given)
    found = score_units(tried.plain, UNIT_CRITERIA[criterion], tried.prepared.statistics())
    blocks = choose_units(found, UnitCosts.from_json(costs), 0.3)
    assert answer["kept"] == [list(kept_by(block)) for block in blocks]
    assert tried.worker.handle("choose", {**tried.named, **given})["kept"] == answer["kept"]
    if criterion == "wanda-sp":
        tried.surgeon.apply(blocks)
        expected = tried.losses("heldout")
        tried.surgeon.restore()
        assert expected.kl is not None
        assert answer["kl"] == expected.kl.tolist()
    # The model is whole again.
    assert sum(heldout(tried, masker=UNITS, kept=None)["kl"]) < 1e-5


CHOICES = {"kind": "metrics", "pattern": "2:4", "metrics": ["wanda", "magnitude"]}
WEIGHTS = {"kind": "weights", "pattern": "2:4", "metric": "wanda"}


def test_choices_of_metrics_between_other_masks(tried: Tried) -> None:
    """One metric everywhere is what pruning by it gives, whatever was measured before and after."""
    table = tried.table(CHOICES)
    dense = tried.mask(UNITS, None, [0, 1])
    by_metric = [np.tile([metric == 0, metric == 1], table.n // 2) for metric in (0, 1)]
    found = [tried.mask(CHOICES, mask, [0, 1]) for mask in by_metric]
    assert tried.mask(UNITS, None, [0, 1]) == dense
    pruned = load_model(tried.worker.context.model)
    criterion = CRITERIA["magnitude"]
    prune_model(pruned, criterion, mask_rule(criterion, None, "2:4", None))
    text, teacher = tried.prepared.text("search")
    expected = window_losses(pruned.model, linear_head(pruned.model, text), text[:2], teacher[:2])
    assert expected.kl is not None
    assert found[1]["kl"] == pytest.approx(expected.kl.tolist(), rel=1e-6)
    assert found[0]["kl"] != found[1]["kl"]
    assert [tried.mask(CHOICES, mask, [0, 1]) for mask in by_metric] == found


def gradient(tried: Tried, masker: dict[str, Any], values: np.ndarray, windows: list[int], **more: Any) -> Any:
    payload = {**tried.named, "masker": masker, "values": values.tolist(), "windows": windows, **more}
    return tried.worker.handle("gradient", payload)


@pytest.mark.parametrize("objective", ["kl", "nll"])
@pytest.mark.parametrize("masker", [UNITS, CHOICES])
def test_gradients_are_differences_of_losses(tried: Tried, masker: dict[str, Any], objective: str) -> None:
    draw = np.random.default_rng(5)
    table = tried.table(masker)
    values = draw.uniform(0.3, 0.7, table.n)
    windows = [5, 1, 0, 2, 3]
    answer = gradient(tried, masker, values, windows, objective=objective)
    direction = draw.standard_normal(table.n)
    ahead, behind = (
        np.mean(gradient(tried, masker, values + sign * 3e-3 * direction, windows)[objective]) for sign in (1, -1)
    )
    assert (ahead - behind) / 6e-3 == pytest.approx(float(np.dot(answer["gradient"], direction)), rel=3e-2)


@pytest.mark.parametrize("masker", [UNITS, CHOICES, WEIGHTS])
def test_losses_beside_gradients_are_those_of_the_mask(tried: Tried, masker: dict[str, Any]) -> None:
    table = tried.table(masker)
    mask = some(table)
    if table.strata is not None:
        labels, keep = table.strata
        mask = np.arange(table.n) % (table.n // (int(labels[-1]) + 1)) < keep
    answer, expected = gradient(tried, masker, mask.astype(float), [2, 4]), tried.mask(masker, mask, [2, 4])
    for objective in ("kl", "nll"):
        assert answer[objective] == pytest.approx(expected[objective], rel=1e-5, abs=1e-6)
    assert len(answer["gradient"]) == table.n
    assert json.dumps(answer, allow_nan=False)


def test_all_ones_are_the_dense_model_to_the_last_bit(tried: Tried) -> None:
    answer = gradient(tried, UNITS, np.ones(tried.table(UNITS).n), [5, 0, 1, 2, 3])
    expected = tried.mask(UNITS, None, [5, 0, 1, 2, 3])
    assert (answer["kl"], answer["nll"]) == (expected["kl"], expected["nll"])


def test_another_objective_is_refused(tried: Tried) -> None:
    with pytest.raises(InvalidInput, match="latency"):
        gradient(tried, UNITS, np.ones(tried.table(UNITS).n), [0], objective="latency")


@pytest.mark.slow
def test_masks_differ_by_less_on_text_that_they_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Common random numbers: what a window does to every mask is gone from differences on the same windows."""
    monkeypatch.setenv("EVOPRUNE_CACHE", str(tmp_path))
    worker = build(EvaluationContext(window=64, rungs=(32,), heldout_windows=2, calibration_sequences=2).to_json())
    named = {"prepared": worker.handle("prepare", {})["name"], "masker": {"kind": "units", "units": ["neurons:64"]}}
    table = UnitTable.from_json(worker.handle("units", {**named, "quantity": "parameters"})["units"])
    losses = []
    for seed in (1, 2):
        kept = table.packed(np.random.default_rng(seed).random(table.n) < 0.8)
        losses.append(worker.handle("mask", {**named, "kept": kept, "windows": list(range(32))})["nll"])
    shared = np.var(np.subtract(*losses), ddof=1)
    assert shared <= sum(np.var(values, ddof=1) for values in losses) / 2
