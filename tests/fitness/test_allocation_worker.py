"""Jobs about levels, whatever came before them, against masking by hand and running the whole model."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from evoprune.fitness.allocation_worker import AllocationWorker, build
from evoprune.fitness.allocators import configured
from evoprune.fitness.candidate_worker import WORTHWHILE
from evoprune.fitness.compressors import COMPRESSORS, Goal, compress
from evoprune.fitness.context import EvaluationContext
from evoprune.fitness.level_evaluator import LevelEvaluator
from evoprune.fitness.levels import site_ranks
from evoprune.fitness.models import LanguageModel, load_model
from evoprune.fitness.prepare import Prepared
from evoprune.fitness.teacher import WindowLosses, linear_head, window_losses
from evoprune.metrics.errors import InvalidCandidate, InvalidInput
from evoprune.metrics.files import derived_seed
from tests.models import save_tiny

BLOCKS = 3
WINDOWS = 12
GRID = (64, 128, 154, 192, 255)
ALLOCATORS = ("atp", "block-influence", "owl", "shortened-llama", "uniform")


@dataclass
class Tried:
    """A worker, and a second model that is masked by hand and run in full."""

    worker: AllocationWorker
    plain: LanguageModel
    named: dict[str, Any]

    @property
    def prepared(self) -> Prepared:
        return Prepared.open(self.named["prepared"])

    def random_levels(self, draw: random.Random) -> list[int]:
        return [draw.randrange(256) for _ in self.plain.sites]

    def mask_by_hand(self, levels: Sequence[int]) -> None:
        """Bring the second model to `levels`: of each row, the lowest |W| * norm go, the lower column first."""
        statistics = self.prepared.statistics()
        for bound, dense, level in zip(self.plain.sites, self.dense, levels, strict=True):
            norms = statistics.site_statistics(bound.site.name, ["X_l2"])["X_l2"]
            order = (dense.abs() * norms).argsort(dim=1, stable=True)
            doomed = order[:, : level * bound.site.in_features // 256]
            bound.weight().copy_(dense.scatter(1, doomed, 0.0))

    def __post_init__(self) -> None:
        self.dense = [bound.weight().clone() for bound in self.plain.sites]
        self.head = linear_head(self.plain.model, torch.arange(8)[None])

    @torch.no_grad()
    def by_hand(self, levels: Sequence[int], side: str, first: int = 0, last: int | None = None) -> WindowLosses:
        self.mask_by_hand(levels)
        windows, teacher = self.prepared.text(side)
        part = slice(first, last)
        return window_losses(self.plain.model, self.head, windows[part], teacher[part])

    def levels(self, levels: Sequence[int], parent: Sequence[int], first: int, last: int) -> dict[str, Any]:
        payload = {**self.named, "levels": list(levels), "parent": list(parent), "first": first, "last": last}
        return self.worker.handle("levels", payload)

    def check(self, levels: Sequence[int], parent: Sequence[int], first: int = 0, last: int = WINDOWS) -> None:
        """The answer is that of the plain way, to the bit."""
        found, expected = self.levels(levels, parent, first, last), self.by_hand(levels, "search", first, last)
        assert expected.kl is not None
        assert found["kl"] == expected.kl.mean().item()
        assert found["nll"] == expected.nll.mean().item()
        n = last - first
        mean = sum(expected.kl.tolist()) / n
        spread = sum((value - mean) ** 2 for value in expected.kl.tolist())
        assert found["stderr"] == pytest.approx((spread / max(n - 1, 1) / n) ** 0.5, abs=1e-12)

    def check_heldout(self, levels: Sequence[int] | None) -> dict[str, Any]:
        found = self.worker.handle("heldout", {**self.named, "levels": None if levels is None else list(levels)})
        expected = self.by_hand(levels or [0] * len(self.dense), "heldout")
        assert expected.kl is not None
        assert (found["kl"], found["nll"]) == (expected.kl.tolist(), expected.nll.tolist())
        return found

    def allocate(self, allocator: str, target: float = 0.5) -> list[float]:
        named = {name: self.named[name] for name in ("prepared", "criterion")}
        return self.worker.handle("allocate", {**named, "allocator": allocator, "target": target, "repaired": True})[
            "sparsities"
        ]

    def is_dense(self) -> bool:
        sites = zip(self.worker.language_model.sites, self.dense, strict=True)
        return all(torch.equal(bound.weight(), dense) for bound, dense in sites)


class TriedStored(Tried):
    """The same where levels are stored: by hand each is compressed for itself."""

    def random_levels(self, draw: random.Random) -> list[int]:
        return [draw.choice((0, *GRID, 256)) for _ in self.plain.sites]

    def mask_by_hand(self, levels: Sequence[int]) -> None:
        statistics = self.prepared.statistics()
        for bound, dense, level in zip(self.plain.sites, self.dense, levels, strict=True):
            goal = Goal(bound.site.out_features * (level * bound.site.in_features // 256))
            given = statistics.site_statistics(bound.site.name, ["H"])
            bound.weight().copy_(compress("sparsegpt", dense, goal, given).weight)


def make(
    folder: Path, family: str, criterion: dict[str, Any], compressor: str = "mask", grid: Sequence[int] = ()
) -> Tried:
    model = save_tiny(folder / "model", family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": BLOCKS})
    text = folder / "text.txt"
    text.write_text("\n".join(f"line {at}: {at * at % 97} apples, {at % 13} pears." for at in range(3000)))
    context = EvaluationContext(
        model=str(model),
        device="cpu",
        data=str(text),
        window=16,
        rungs=(2, WINDOWS),
        heldout_windows=6,
        calibration=str(text),
        calibration_sequences=4,
        calibration_window=16,
        statistics=tuple(
            sorted({"X_l2", *COMPRESSORS[compressor].needs}.union(*(configured(name).needs for name in ALLOCATORS)))
        ),
        sparsity=0.5,
    )
    worker = build(context.to_json())
    making = {
        "prepared": worker.handle("prepare", {})["name"],
        "criterion": criterion,
        "compressor": compressor,
        "grid": list(grid),
    }
    named = {**making, **worker.handle("database", making)}
    return (TriedStored if grid else Tried)(worker, load_model(str(model), device="cpu"), named)


@pytest.fixture(scope="module", params=["gpt2", "llama", "opt", "qwen3"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tried]:
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as changed:
        changed.setenv("EVOPRUNE_CACHE", str(folder / "cache"))
        yield make(folder, request.param, {"name": "wanda"})


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tried]:
    folder = tmp_path_factory.mktemp("stored")
    with pytest.MonkeyPatch.context() as changed:
        changed.setenv("EVOPRUNE_CACHE", str(folder / "cache"))
        yield make(folder, "llama", {"name": "wanda"}, "sparsegpt", GRID)


@pytest.fixture
def llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tried:
    monkeypatch.setenv("EVOPRUNE_CACHE", str(tmp_path / "cache"))
    return make(tmp_path, "llama", {"name": "wanda"})


def test_a_life_of_a_worker(family: Tried) -> None:
    """Children of changing parents on changing windows, with other jobs in between; the order has no say in it."""
    draw = random.Random(0)
    n = len(family.dense)
    for round_ in range(3):
        parent = family.random_levels(draw)
        for first, last in ((0, 2), (3, 9)):
            family.check(parent, parent, first, last)
            for at in (n - 1, 0, draw.randrange(n)):  # from the second on beside the adopted parent
                child = list(parent)
                child[at] = (child[at] + draw.randrange(1, 256)) % 256
                family.check(child, parent, first, last)
            if round_ == 0:
                family.check_heldout(parent)
            elif round_ == 1:
                family.allocate("atp")
            else:
                family.check(family.random_levels(draw), family.random_levels(draw), 0, WINDOWS)
            family.check(child, parent, first, last)


def test_a_life_of_a_worker_with_stored_levels(stored: Tried) -> None:
    draw = random.Random(2)
    for first, last in ((0, 2), (3, 9)):
        parent = stored.random_levels(draw)
        stored.check(parent, parent, first, last)
        for at in (len(parent) - 1, 0, 9):
            child = list(parent)
            child[at] = draw.choice([level for level in (0, *GRID, 256) if level != parent[at]])
            stored.check(child, parent, first, last)
        stored.check_heldout(child)
        stored.allocate("owl")
    with pytest.raises(InvalidInput, match=r"level 97 of .* is not stored; 0, 64, 128, 154, 192, 255 and 256 are"):
        stored.levels([97, *parent[1:]], parent, 0, 2)


def test_held_out_text(family: Tried) -> None:
    draw = random.Random(1)
    levels = family.random_levels(draw)
    found = family.check_heldout(levels)
    assert found["tokens"] == 6 * 15
    dense = family.check_heldout(None)
    assert max(map(abs, dense["kl"])) < 1e-5
    assert family.is_dense()
    assert family.check_heldout(levels) == found
    # The divergence once more, with nothing of ours in it.
    windows, _ = family.prepared.text("heldout")
    logs = []
    for wanted in ([0] * len(levels), levels):
        family.mask_by_hand(wanted)
        with torch.no_grad():
            logs.append(family.plain.model(input_ids=windows).logits[:, :-1].double().log_softmax(-1))
    divergence = (logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean(1)
    assert found["kl"] == pytest.approx(divergence.tolist(), abs=1e-5)
    likelihood = logs[1].gather(-1, windows[:, 1:, None]).squeeze(-1).mean(1)
    assert found["nll"] == pytest.approx((-likelihood).tolist(), abs=1e-5)


def test_allocators_find_a_dense_model_and_leave_one(family: Tried) -> None:
    draw = random.Random(2)
    for name in ALLOCATORS:
        fresh = family.allocate(name)
        assert family.is_dense()
        family.levels(family.random_levels(draw), family.random_levels(draw), 0, 2)
        assert not family.is_dense()
        assert family.allocate(name) == fresh
        assert family.is_dense()
        weights = [dense.numel() for dense in family.dense]
        removed = sum(
            dense.shape[0] * int(share * dense.shape[1]) for dense, share in zip(family.dense, fresh, strict=True)
        )
        assert abs(removed - sum(weights) // 2) <= max(dense.shape[0] for dense in family.dense)


def test_the_model_is_prepared_dense_whatever_it_did_before(llama: Tried) -> None:
    draw = random.Random(3)
    llama.levels(llama.random_levels(draw), llama.random_levels(draw), 0, 2)
    assert llama.worker.handle("prepare", {})["name"] == llama.named["prepared"]
    assert llama.is_dense()
    other = {**llama.named, "criterion": {"name": "magnitude"}}
    other |= llama.worker.handle("database", other)
    assert other["database"] != llama.named["database"]
    levels = llama.random_levels(draw)
    payload = {"levels": levels, "parent": levels, "first": 0, "last": 2}
    by_magnitude = llama.worker.handle("levels", {**other, **payload})
    llama.check(levels, levels, 0, 2)
    assert llama.worker.handle("levels", {**other, **payload}) == by_magnitude
    assert by_magnitude["kl"] != llama.levels(levels, levels, 0, 2)["kl"]


def test_states_of_text_that_is_over_make_room(llama: Tried) -> None:
    parent = llama.random_levels(random.Random(4))
    prefix = llama.worker.evaluator(llama.named).prefix
    sizes = []
    for first in (0, 4, 8):
        for level in range(WORTHWHILE):
            llama.check([level, *parent[1:]], parent, first, first + 4)
        sizes.append(prefix.bytes)
    assert sizes[0] > 0
    assert len(set(sizes)) == 1


def test_what_has_no_fitness_says_so(llama: Tried) -> None:
    parent = llama.random_levels(random.Random(5))
    llama.check(parent, parent, 0, 2)
    norm = llama.worker.language_model.model.model.norm.weight
    kept = norm.clone()
    with torch.no_grad():
        norm.fill_(float("nan"))
        for _ in range(3):  # the parent, adopted on second sight, has none either
            with pytest.raises(InvalidCandidate, match="NONFINITE"):
                llama.levels(parent, parent, 0, 4)
        norm.copy_(kept)
    llama.check(parent, parent, 0, 4)
    with pytest.raises(InvalidInput, match="no job of kind"):
        llama.worker.handle("evaluate", {})
    with pytest.raises(InvalidInput, match="no whole number from 0 to 256"):
        llama.levels([257, *parent[1:]], parent, 0, 4)


def test_a_metric_without_scores_is_refused(llama: Tried, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evoprune.fitness.allocation_worker.criterion_from", lambda value: NoScores())
    with pytest.raises(InvalidInput, match="cannot rank the model's weights: NONFINITE"):
        llama.worker.handle("database", {**llama.named, "criterion": {"name": "no-scores"}})


class NoScores:
    """A criterion whose scores are not numbers."""

    needs: frozenset[str] = frozenset()

    def score(self, site: Any, inputs: Any) -> torch.Tensor:
        return torch.full_like(inputs["W"], float("nan"))


def test_levels_by_random_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A criterion that is no expression."""
    monkeypatch.setenv("EVOPRUNE_CACHE", str(tmp_path / "cache"))
    tried = make(tmp_path, "llama", {"name": "random"})
    levels = tried.random_levels(random.Random(6))
    found = tried.levels(levels, levels, 0, 4)
    for bound, level in zip(tried.worker.language_model.sites, levels, strict=True):
        generator = torch.Generator().manual_seed(derived_seed(0, f"random criterion {bound.site.name}"))
        scores = torch.rand(bound.weight().shape, generator=generator)
        count = level * bound.site.in_features // 256
        doomed = scores.argsort(dim=1, stable=True)[:, :count]
        assert bound.weight().gather(1, doomed).abs().sum() == 0
        assert int((bound.weight() == 0).sum()) == count * bound.site.out_features
    assert found["kl"] > 0


def test_a_parents_pass_is_paid_for_where_it_saves_more(llama: Tried, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes with the parent's own question; else with the first candidate, if the last such text had many."""
    adopted: list[tuple[int, int]] = []
    adopt = LevelEvaluator.adopt

    def counted(self: LevelEvaluator, levels: Mapping[str, int], first: int, last: int) -> WindowLosses:
        adopted.append((first, last))
        return adopt(self, levels, first, last)

    monkeypatch.setattr(LevelEvaluator, "adopt", counted)
    parent = llama.random_levels(random.Random(6))
    children = [[level, *parent[1:]] for level in range(WORTHWHILE)]

    def ask(first: int, *asked: list[int]) -> int:
        """How often the parent was adopted while these were asked about, on three windows from `first`."""
        before = len(adopted)
        for levels in asked:
            llama.check(levels, parent, first, first + 3)
        return len(adopted) - before

    assert ask(0, *children) == 1  # nothing is known of texts of this length
    assert ask(1, *children[:3]) == 1  # the last had many
    assert ask(2, *children) == 0  # the last had three
    assert ask(0, children[0]) == 1
    assert ask(1, parent, *children[:3]) == 1
    assert ask(2, children[0], parent, *children) == 1  # when the parent's turn comes


def test_levels_are_built_once_for_all_sparsities(llama: Tried, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the metric reads the sparsity that the search aims at."""
    scored: list[float] = []
    plain = site_ranks

    def counted(*arguments: Any) -> Any:
        scored.append(arguments[-1])
        return plain(*arguments)

    monkeypatch.setattr("evoprune.fitness.levels.site_ranks", counted)
    other = AllocationWorker(replace(llama.worker.context, sparsity=0.7))
    sites = len(llama.dense)
    for criterion, wanted in (({"name": "wanda"}, 0), ({"expression": ["mul", ["abs", "W"], "sparsity"]}, sites)):
        named = []
        for worker in (llama.worker, other):
            making = {"criterion": criterion, "compressor": "mask", "grid": []}
            making["prepared"] = worker.handle("prepare", {})["name"]
            named.append({**making, **worker.handle("database", making)})
        first, second = named
        assert first["prepared"] != second["prepared"]
        assert (first["database"] == second["database"]) == (wanted == 0)
        assert scored.count(0.5) == scored.count(0.7) == wanted
        measured = {"levels": [179] * sites, "parent": [0] * sites, "first": 0, "last": WINDOWS}
        answers = [w.handle("levels", {**n, **measured}) for w, n in zip((llama.worker, other), named, strict=True)]
        assert answers[0] == answers[1]
