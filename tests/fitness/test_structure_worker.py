"""Jobs about shapes, whatever came before them, against a model refitted and masked by hand and run in full."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evoprune.fitness import structure_evaluator
from evoprune.fitness.context import EvaluationContext
from evoprune.fitness.gram import damped
from evoprune.fitness.models import LanguageModel, load_model
from evoprune.fitness.part_merges import spelled_block
from evoprune.fitness.prepare import Prepared, calibration_windows
from evoprune.fitness.structure_database import StructureDatabase
from evoprune.fitness.structure_weights import RefitRecipe, with_merges
from evoprune.fitness.structure_worker import StructureWorker, build
from evoprune.fitness.teacher import WindowLosses, linear_head, window_losses
from evoprune.fitness.unit_costs import UnitCosts, kept_by
from evoprune.fitness.units import PARTS, find_units
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.shape import BlockShape
from evoprune.metrics.shape import Shape as WrittenShape
from evoprune.shapes import prune_shape
from tests.models import save_tiny

BLOCKS = 3
WINDOWS = 12
Shape = list[tuple[int, int, int]]


@dataclass
class Tried:
    """A worker, and a second model whose outputs are solved for by hand, which is masked and run in full."""

    worker: StructureWorker
    plain: LanguageModel
    named: dict[str, Any]

    def __post_init__(self) -> None:
        self.units = find_units(self.plain)
        self.outputs = [[block.attention.output, block.mlp.output] for block in self.units]
        self.dense = [[bound.weight().clone() for bound in outputs] for outputs in self.outputs]
        self.biases = [[bound.bias() for bound in outputs] for outputs in self.outputs]
        self.biases = [[None if bias is None else bias.clone() for bias in biases] for biases in self.biases]
        self.head = linear_head(self.plain.model, torch.arange(8)[None])
        self.database = StructureDatabase.open(self.named["database"], self.plain, self.units)
        self.inputs = [[self._inputs(block, part) for part in (0, 1)] for block in range(BLOCKS)]

    @property
    def whole(self) -> Shape:
        return [(block.widths.groups, block.widths.heads_per_group, block.widths.neurons) for block in self.units]

    def _inputs(self, block: int, part: int) -> Tensor:
        """[tokens, in] float64, what an output matrix of the dense model reads."""
        heard: list[Tensor] = []
        hook = self.outputs[block][part].module.register_forward_pre_hook(
            lambda module, args: heard.append(args[0].flatten(0, -2).double())
        )
        with torch.no_grad():
            self.plain.model(input_ids=calibration_windows(self.plain, self.worker.context))
        hook.remove()
        return torch.cat(heard)

    def random_shape(self, draw: random.Random, *, like: Shape | None = None) -> Shape:
        """Any shape; beside `like`, one that differs in one block or two."""
        found = list(self.whole if like is None else like)
        for block in range(BLOCKS) if like is None else draw.sample(range(BLOCKS), draw.choice([1, 2])):
            groups, each, neurons = self.whole[block]
            kept = draw.randint(0, groups)
            found[block] = (
                kept,
                draw.randint(1, each) if kept else 0,
                draw.choice([0, neurons, draw.randint(1, neurons)]),
            )
        return found

    def units_of(self, shape: Shape) -> list[BlockShape]:
        return [
            BlockShape(*self.database.kept_heads(block, groups, each), self.database.kept_neurons(block, neurons))
            for block, (groups, each, neurons) in enumerate(shape)
        ]

    def refit(self, shape: Shape) -> None:
        """Least squares on what stays, zeros elsewhere; nothing of a part that is dropped, its bias included."""
        for block, kept in enumerate(self.units_of(shape)):
            columns = [self.units[block].attention.columns(kept.heads), list(kept.neurons)]
            for part, staying in enumerate(columns):
                weight = self.dense[block][part].double()
                found = torch.zeros_like(weight)
                if len(staying) == weight.shape[1]:
                    found = weight
                elif staying:
                    inputs = self.inputs[block][part]
                    gram = damped(inputs.T @ inputs / len(inputs))
                    found[:, staying] = torch.linalg.solve(gram[staying][:, staying], gram[staying] @ weight.T).T
                self.write(block, part, found, dropped=not staying)

    def write(self, block: int, part: int, weight: Tensor, *, dropped: bool) -> None:
        bound = self.outputs[block][part]
        bound.weight().copy_(weight)
        if (bias := bound.bias()) is not None:
            bias.copy_(torch.zeros_like(bias) if dropped else self.biases[block][part])

    @torch.no_grad()
    def by_hand(self, shape: Shape, side: str, first: int = 0, last: int | None = None) -> WindowLosses:
        self.refit(shape)
        return self.run(side, first, last)

    def run(self, side: str, first: int = 0, last: int | None = None) -> WindowLosses:
        windows, teacher = Prepared.open(self.named["prepared"]).text(side)
        part = slice(first, last)
        return window_losses(self.plain.model, self.head, windows[part], teacher[part])

    def ask(self, shape: Shape, parent: Shape, first: int, last: int) -> dict[str, Any]:
        spelled = {"shape": [list(kept) for kept in shape], "parent": [list(kept) for kept in parent]}
        return self.worker.handle("shape", {**self.named, **spelled, "first": first, "last": last})

    def check(self, shape: Shape, parent: Shape, first: int = 0, last: int = WINDOWS) -> dict[str, Any]:
        """The answer is that of the plain way, to rounding: what is cut is not computed, and sums are others."""
        found, expected = self.ask(shape, parent, first, last), self.by_hand(shape, "search", first, last)
        assert expected.kl is not None
        assert found["kl"] == pytest.approx(expected.kl.mean().item(), rel=1e-4, abs=1e-6)
        assert found["nll"] == pytest.approx(expected.nll.mean().item(), rel=1e-5)
        spread = expected.kl.std().item() / (last - first) ** 0.5
        assert found["stderr"] == pytest.approx(spread, rel=1e-3, abs=1e-6)
        return found


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def tried(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tried]:
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVOPRUNE_CACHE", str(folder / "cache"))
        yield make(folder, family)


def make(folder: Path, family: str) -> Tried:
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
        calibration_sequences=24,
        calibration_window=16,
        statistics=("X_l2", "X_var", "X_mean"),
        sparsity=0.5,
    )
    worker = build(context.to_json())
    named = {"prepared": worker.handle("prepare", {})["name"], "accumulation": "dense"}
    database = worker.handle("database", {"accumulation": "dense"})["database"]
    return Tried(worker, load_model(str(model), device="cpu"), {**named, "database": database})


def test_generations_of_candidates_are_those_of_the_plain_way(tried: Tried, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parents whose pass is remembered, later stages, and so little room that solved outputs are forgotten again."""
    monkeypatch.setattr(structure_evaluator, "MAX_SOLVED_BYTES", 20_000)
    draw = random.Random(3)
    parent = tried.random_shape(draw)
    for first in (0, 4):
        tried.check(parent, parent, first, first + 2)
        children = [tried.random_shape(draw, like=parent) for _ in range(8)]
        for child in children:
            tried.check(child, parent, first, first + 2)
        for child in (parent, *children[:3]):
            tried.check(child, parent, first + 2, first + 6)
        parent = children[0]


def test_the_same_question_has_the_same_answer_to_the_bit(tried: Tried) -> None:
    """Whether the parent's pass is remembered or not, and whatever was solved for and cut in between."""
    draw = random.Random(4)
    parent, other = tried.random_shape(draw), tried.random_shape(draw)
    child = tried.random_shape(draw, like=parent)
    alone = tried.ask(child, parent, 0, 4)
    tried.ask(other, other, 0, 4)
    for _ in range(10):
        tried.ask(tried.random_shape(draw, like=other), other, 0, 4)
    tried.worker.handle("heldout", {**tried.named, "shape": None})
    tried.ask(parent, parent, 0, 4)
    assert tried.ask(child, parent, 0, 4) == alone
    fresh = build(tried.worker.context.to_json())
    spelled = {"shape": [list(kept) for kept in child], "parent": [list(kept) for kept in parent]}
    assert fresh.handle("shape", {**tried.named, **spelled, "first": 0, "last": 4}) == alone


# What every block keeps, and whether its attention and its MLP are merged into one before.
MERGES = {
    "a whole block into a cut one": (
        [(1, 1, 30), (0, 0, 0), (2, 1, 48)],
        [(False, False), (True, True), (False, False)],
    ),
    "two attentions into a whole one": (
        [(2, 2, 48), (0, 0, 20), (0, 0, 0)],
        [(False, False), (True, False), (True, False)],
    ),
    "an MLP into the second": ([(0, 0, 12), (1, 2, 48), (2, 2, 0)], [(False, False), (False, False), (False, True)]),
}


def merging_shape(case: str, tried: Tried) -> tuple[Shape, list[tuple[bool, bool]], Shape]:
    """One of `MERGES` for this model: what is kept, what is merged, and both as candidates say it."""
    kept, merging = MERGES[case]
    most = tried.whole[0]
    shape = [(groups * most[0] // 2, min(heads, most[1]), neurons) for groups, heads, neurons in kept]
    spelled = [spelled_block(block, merged) for block, merged in zip(shape, merging, strict=True)]
    return shape, merging, [(groups, heads, neurons) for groups, heads, neurons in spelled]


@pytest.mark.parametrize("case", MERGES)
def test_merged_parts_are_those_of_the_plain_way(case: str, tried: Tried) -> None:
    """In the search, before and after other candidates, and in the model that `prune --shape` writes."""
    shape, merging, spelled = merging_shape(case, tried)
    draw = random.Random(7)
    parent = tried.random_shape(draw)
    tried.ask(parent, parent, 0, 4)
    asked = [tried.ask(spelled, other, 0, 4) for other in (parent, shape, spelled)]
    assert asked[0] == asked[1] == asked[2] != tried.ask(shape, spelled, 0, 4)
    with merged_by_hand(tried, shape, merging) as recipe:
        expected = tried.by_hand(shape, "search", 0, 4)
    assert expected.kl is not None
    assert asked[0]["kl"] == pytest.approx(expected.kl.mean().item(), rel=1e-4)
    written = prune_shape(tried.plain, recipe).language_model.model
    evaluator = tried.worker.evaluator(tried.named)
    evaluator.apply(spelled)
    windows = Prepared.open(tried.named["prepared"]).text("search")[0][:2]
    with torch.no_grad():
        assert torch.allclose(written(windows).logits, evaluator.language_model.model(windows).logits, atol=1e-5)
    tried.check(parent, parent, 0, 4)


@pytest.mark.parametrize("trainable", ["outputs", "all"])
def test_training_begins_with_what_is_merged_and_leaves_it(trainable: str, tried: Tried) -> None:
    shape, merging, spelled = merging_shape("two attentions into a whole one", tried)
    asked = {**tried.named, "shape": spelled, "selection": asked_after("training-aware")}
    training = {**asked["selection"]["training"], "trainable": trainable}
    still = {**asked, "selection": {**asked["selection"], "training": {**training, "learning_rate": 1e-12}}}
    learning = {**asked, "selection": {**asked["selection"], "training": training}}
    with merged_by_hand(tried, shape, merging):
        expected = tried.by_hand(shape, "search", 0, WINDOWS)
    assert expected.kl is not None
    before = tried.ask(spelled, shape, 0, WINDOWS)
    assert tried.worker.handle("recovered", still)["kl"] == pytest.approx(expected.kl.tolist(), rel=1e-3)
    first = tried.worker.handle("recovered", learning)
    assert first["recovered"] < 0.99 * before["kl"]
    assert tried.ask(spelled, shape, 0, WINDOWS) == before
    assert tried.worker.handle("recovered", learning) == first
    with pytest.raises(InvalidInput, match="what is merged has no path refit"):
        tried.worker.handle("recovered", {**asked, "selection": asked_after("path-refit")})


@contextmanager
def merged_by_hand(tried: Tried, shape: Shape, merging: Sequence[tuple[bool, bool]]) -> Iterator[WrittenShape]:
    """Inside, the second model's matrices, and what its outputs are solved from, are merged; what a file would say."""
    tried.refit(tried.whole)
    changed = [(bound.weight(), bound.bias()) for bound in tried.plain.sites]
    before = [[None if value is None else value.clone() for value in pair] for pair in changed]
    originals = {bound.site.name: pair for bound, pair in zip(tried.plain.sites, before, strict=True)}
    dense, biases = [list(row) for row in tried.dense], [list(row) for row in tried.biases]
    context = tried.worker.context
    recipe = RefitRecipe("database", "dense", str(context.calibration), 24, 16, context.seed, torch.get_num_threads())
    widths = tuple(block.widths for block in tried.units)
    weights = with_merges(recipe.to_json(), merging)
    name = type(tried.plain.model).__name__
    written = WrittenShape(name, tried.plain.fingerprint, tuple(tried.units_of(shape)), widths, weights, {})
    for place in (0, 1):
        into = -1
        for block in range(BLOCKS):
            if shape[block][0 if place == 0 else 2]:
                into = block
            if not merging[block][place]:
                continue
            ours, theirs = (
                [*part.inputs, part.output]
                for part in ((tried.units[at].attention, tried.units[at].mlp)[place] for at in (into, block))
            )
            for one, other in zip(ours, theirs, strict=True):
                start, source = originals[one.site.name], originals[other.site.name]
                one.weight().add_(source[0] - start[0])
                if one.bias() is not None:
                    one.bias().add_(source[1] - start[1])
            tried.dense[into][place] = ours[-1].weight().clone()
            if ours[-1].bias() is not None:
                tried.biases[into][place] = ours[-1].bias().clone()
    yield written
    for pair, values in zip(changed, before, strict=True):
        for live, value in zip(pair, values, strict=True):
            if live is not None:
                live.copy_(value)
    tried.dense, tried.biases = dense, biases


def test_heldout_losses_and_the_dense_model(tried: Tried) -> None:
    draw = random.Random(5)
    for shape in (tried.whole, tried.random_shape(draw), tried.random_shape(draw)):
        found = tried.worker.handle("heldout", {**tried.named, "shape": [list(kept) for kept in shape]})
        expected = tried.by_hand(shape, "heldout")
        assert found["nll"] == pytest.approx(expected.nll.tolist(), rel=1e-5)
        assert found["tokens"] == 6 * 15
    dense = tried.worker.handle("heldout", {**tried.named, "shape": None})
    assert dense["nll"] == pytest.approx(tried.by_hand(tried.whole, "heldout").nll.tolist(), rel=1e-6)


def asked_after(method: str, loss: str = "kl") -> dict[str, Any]:
    """What a job is told of a recovery."""
    training = {"tokens": 320, "batch_tokens": 64, "trainable": "outputs", "loss": loss, "learning_rate": 1e-3}
    return {"method": method, **({"training": training} if method == "training-aware" else {"correction": 0.0})}


@torch.no_grad()
def refit_along_the_path(tried: Tried, shape: Shape) -> None:
    """Least squares on what the model, cut so far, gives each output, one after the other."""
    tried.refit(tried.whole)
    for block, kept in enumerate(tried.units_of(shape)):
        columns = [tried.units[block].attention.columns(kept.heads), list(kept.neurons)]
        for part, staying in enumerate(columns):
            weight = tried.dense[block][part].double()
            if len(staying) == weight.shape[1]:
                continue
            found, inputs = torch.zeros_like(weight), tried._inputs(block, part)
            gram = damped(inputs.T @ inputs / len(inputs))
            found[:, staying] = torch.linalg.solve(gram[staying][:, staying], gram[staying] @ weight.T).T
            tried.write(block, part, found, dropped=not staying)


def test_a_path_refit_is_least_squares_on_what_the_candidate_itself_gives(tried: Tried) -> None:
    draw = random.Random(7)
    for shape in (tried.random_shape(draw), tried.whole):
        asked = {**tried.named, "shape": [list(kept) for kept in shape], "selection": asked_after("path-refit")}
        found, held_out = tried.worker.handle("recovered", asked), tried.worker.handle("heldout", asked)
        refit_along_the_path(tried, shape)
        expected = tried.run("search")
        assert expected.kl is not None
        assert found["kl"] == pytest.approx(expected.kl.tolist(), rel=2e-3, abs=1e-6)
        assert found["recovered"] == pytest.approx(sum(found["kl"]) / WINDOWS)
        assert held_out["nll"] == pytest.approx(tried.run("heldout").nll.tolist(), rel=1e-4)


@pytest.mark.parametrize("method", ["path-refit", "training-aware"])
def test_recoveries_have_the_same_answer_to_the_bit_and_leave_nothing(method: str, tried: Tried) -> None:
    """Whatever was asked before, on this worker or another; and candidates are then what they were."""
    draw = random.Random(8)
    parent, shape = tried.random_shape(draw), tried.random_shape(draw)
    asked = {**tried.named, "shape": [list(kept) for kept in shape], "selection": asked_after(method)}
    before = tried.ask(shape, parent, 0, 4)
    first = tried.worker.handle("recovered", asked)
    assert len(first["kl"]) == WINDOWS
    assert tried.ask(shape, parent, 0, 4) == before
    other = {**asked, "shape": [list(kept) for kept in parent], "selection": asked_after("training-aware", "ce")}
    tried.worker.handle("recovered", other)
    tried.ask(parent, parent, 0, 4)
    assert tried.worker.handle("recovered", asked) == first
    assert build(tried.worker.context.to_json()).handle("recovered", asked) == first
    tried.check(shape, parent)
    dense = tried.worker.handle("heldout", {**tried.named, "shape": None})
    assert max(dense["kl"]) < 1e-5


def test_training_makes_up_for_some_of_what_is_lost(tried: Tried) -> None:
    shape = [(groups, each, neurons // 2) for groups, each, neurons in tried.whole]
    asked: dict[str, Any] = {**tried.named, "shape": shape, "selection": asked_after("training-aware")}
    assert tried.worker.handle("recovered", asked)["recovered"] < 0.95 * tried.ask(shape, shape, 0, WINDOWS)["kl"]
    # Windows are whole, and of the calibration's side of the text.
    assert tried.worker.handle("training", {**asked_after("training-aware")["training"], "tokens": 33}) == {
        "tokens": 48
    }
    with pytest.raises(InvalidInput, match="text too short: side A of"):
        tried.worker.handle("training", {**asked_after("training-aware")["training"], "tokens": 10**9})


def test_units_are_those_of_the_database(tried: Tried) -> None:
    shape = tried.random_shape(random.Random(6))
    found = tried.worker.handle("units", {**tried.named, "shape": [list(kept) for kept in shape]})["blocks"]
    assert [BlockShape(*map(tuple, block)) for block in found] == tried.units_of(shape)
    assert [kept_by(block) for block in tried.units_of(shape)] == [tuple(kept) for kept in shape]


def test_errors_are_those_of_least_squares(tried: Tried) -> None:
    found = tried.worker.handle("errors", {"database": tried.named["database"]})["errors"]
    assert len(found) == BLOCKS * len(PARTS)
    groups, each, neurons = tried.whole[1]
    shape = [*tried.whole]
    shape[1] = (max(groups // 2, 1), each, neurons // 3)
    tried.refit(shape)
    for part, table in enumerate((found[2], found[3])):
        inputs, dense = tried.inputs[1][part], tried.dense[1][part].double()
        gram = damped(inputs.T @ inputs / len(inputs))
        change = dense - tried.outputs[1][part].weight().double()
        error = torch.trace(change @ gram @ change.T) / torch.trace(dense @ gram @ dense.T)
        entry = table[shape[1][0]][each] if part == 0 else table[neurons // 3]
        assert entry == pytest.approx(error.item(), abs=1e-5)


@pytest.mark.parametrize("criterion", ["flap", "wanda-sp"])
def test_criteria_as_published_leave_the_weights_as_they_are(criterion: str, tried: Tried) -> None:
    """What they keep costs the budget; FLAP adds to the bias what the others gave on average."""
    costs = UnitCosts.from_json(tried.worker.handle("costs", {"quantity": "parameters", "batch": 1, "sequence": 1}))
    asked = {**tried.named, "criterion": criterion, "costs": costs.to_json(), "fraction": 0.4, "spread": None}
    kept = tried.worker.handle("choose", asked)["kept"]
    least = costs.mlp[0].at(2) - costs.mlp[0].at(1)
    assert 0.6 * costs.dense - least < costs.of([tuple(block) for block in kept]) <= 0.6 * costs.dense
    found = tried.worker.handle("heldout", asked)
    assert found["kept"] == kept
    chosen = tried.worker._chosen(asked)
    for block, shape in enumerate(chosen):
        columns = [tried.units[block].attention.columns(shape.heads), list(shape.neurons)]
        for part, staying in enumerate(columns):
            masked = torch.zeros_like(tried.dense[block][part])
            masked[:, staying] = tried.dense[block][part][:, staying]
            tried.write(block, part, masked, dropped=not staying)
    hooks = [] if criterion == "wanda-sp" else list(added(tried, chosen))
    with torch.no_grad():
        expected = tried.run("heldout")
    for hook in hooks:
        hook.remove()
    assert found["nll"] == pytest.approx(expected.nll.tolist(), rel=1e-4)
    # And the worker is none the worse for it.
    tried.check(tried.whole, tried.whole, 0, 2)


def added(tried: Tried, shape: Sequence[BlockShape]) -> Iterator[Any]:
    """Hooks that give outputs what the dropped columns gave on average, of parts that stay."""
    statistics = Prepared.open(tried.named["prepared"]).statistics()
    for block, kept in enumerate(shape):
        columns = [tried.units[block].attention.columns(kept.heads), list(kept.neurons)]
        for part, staying in enumerate(columns):
            bound = tried.outputs[block][part]
            mean = statistics.tensor(bound.site.name, "X_mean").reshape(-1).clone()
            mean[staying] = 0
            offset = tried.dense[block][part] @ mean
            if staying:
                yield bound.module.register_forward_hook(lambda module, args, output, offset=offset: output + offset)


def test_what_is_no_shape_is_refused(tried: Tried) -> None:
    for shape, said in (
        ([(1, 1, 1)], "a shape of 1 blocks for a model of 3"),
        ([(9, 9, 9)] * 3, "block 0 cannot keep"),
    ):
        with pytest.raises(InvalidInput, match=said):
            tried.ask(shape, shape, 0, 2)
