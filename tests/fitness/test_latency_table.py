"""Tables of latencies: what is timed is what the model does, budgets never fall, and no table serves elsewhere."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
import torch

from evoprune.fitness import latency
from evoprune.fitness.latency_measure import latency_table, measure_table
from evoprune.fitness.latency_passes import Work, recorded, shape_latencies, whole_pass
from evoprune.fitness.latency_table import (
    LatencyTable,
    isotonic,
    place_of,
    read_table,
    write_table,
)
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.surgeon import Surgeon
from evoprune.fitness.unit_costs import CostTable
from evoprune.fitness.units import find_units
from evoprune.metrics.errors import InvalidInput
from tests.models import FAMILIES, INNER, tiny_language_model

WORKS = (Work(2, 12), Work(2, 12, decode=True))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "TURNS", 3)
    monkeypatch.setattr(latency, "WARM_UP", 1)


@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_of_every_family_is_measured(family: str, work: Work) -> None:
    language_model = tiny_language_model(family)
    before = {name: value.clone() for name, value in language_model.model.state_dict().items()}
    units = find_units(language_model)
    table = measure_table(language_model, units, [[8, 24]] * 2, work)
    costs = table.costs
    assert costs.widths == tuple(block.widths for block in units) and costs.rest > 0
    for block, attention, mlp in zip(units, costs.attention, costs.mlp, strict=True):
        assert isinstance(attention, CostTable) and isinstance(mlp, CostTable)
        counts = itertools.product(range(1, block.widths.groups + 1), range(1, block.widths.heads_per_group + 1))
        assert [kept for kept, _ in attention.entries] == list(counts)
        assert [kept for kept, _ in mlp.entries] == [(8,), (24,), (INNER,)]
        assert min(cost for part in (attention, mlp) for _, cost in part.entries) > 0
    after = language_model.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in language_model.model.modules())
    assert LatencyTable.from_json(json.loads(json.dumps(table.to_json()))) == table


@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "phi3"])
@torch.no_grad()
def test_what_is_timed_is_what_the_model_does(family: str, work: Work) -> None:
    """An attention by itself gives what it gives in the pass, and the next time again, whatever became of the cache."""
    language_model = tiny_language_model(family)
    attention = language_model.model.get_submodule(find_units(language_model)[1].attention.name)
    heard: list[torch.Tensor] = []
    hook = attention.register_forward_hook(lambda module, args, output: heard.append(output[0]))
    call = recorded(language_model, [attention], work)[attention][-1]
    hook.remove()
    assert heard[-1].shape[:2] == (work.batch, 1 if work.decode else work.sequence)
    for _ in range(2):
        assert torch.equal(call.on(attention)()[0], heard[-1])


@pytest.mark.parametrize("work", WORKS)
@torch.no_grad()
def test_shapes_end_to_end_run_as_they_are_cut(work: Work) -> None:
    """Their logits are those of the model cut by hand, turn by turn, and the model is whole again."""
    language_model = tiny_language_model()
    units = find_units(language_model)
    shapes = [[block.widths.whole for block in units], [block.widths.first(1, 2, 7) for block in units]]
    heard: list[torch.Tensor] = []
    hook = language_model.model.register_forward_hook(lambda module, args, output: heard.append(output.logits))
    found = shape_latencies(language_model, units, shapes, work)
    hook.remove()
    assert len(found) == 2 and min(found) > 0
    expected = []
    surgeon = Surgeon(language_model, units)
    for shape in shapes:
        surgeon.apply(shape)
        expected.append(whole_pass(language_model, work)()().logits)
    surgeon.restore()
    assert torch.equal(heard[-1], expected[1]) and torch.equal(heard[-3], expected[0])
    assert torch.equal(whole_pass(language_model, work)()().logits, expected[0])


def test_what_has_more_to_do_takes_longer_and_sums_are_about_the_whole() -> None:
    """Within a wide margin: other work on the machine comes and goes."""
    torch.set_num_threads(1)
    language_model = tiny_language_model(hidden_size=128, intermediate_size=2048)
    units = find_units(language_model)
    work = Work(1, 64)
    costs = measure_table(language_model, units, [[256]] * 2, work).costs
    assert costs.mlp[0].at(2048) > 2 * costs.mlp[0].at(256)
    (whole,) = shape_latencies(language_model, units, [[block.widths.whole for block in units]], work)
    assert 1 / 2 < (costs.rest + costs.dense) / whole < 2


def test_budgets_are_the_nearest_that_never_fall() -> None:
    """Against all tables of small numbers: none that never falls is nearer, but for the half that rounding takes."""
    rng = random.Random(0)
    keys = [(groups, heads) for groups in (1, 2) for heads in (1, 2, 3)]
    rising = [
        costs
        for costs in itertools.product(range(6), repeat=len(keys))
        if all(
            costs[a] <= costs[b]
            for a, b in itertools.product(range(len(keys)), repeat=2)
            if keys[a][0] <= keys[b][0] and keys[a][1] <= keys[b][1]
        )
    ]
    for _ in range(50):
        costs = [rng.randrange(6) for _ in keys]
        found = [cost for _, cost in isotonic(CostTable(tuple(zip(keys, costs, strict=True)))).entries]

        def furthest(other: tuple[int, ...], costs: list[int] = costs) -> int:
            return max(abs(a - b) for a, b in zip(other, costs, strict=True))

        assert tuple(found) in rising
        assert furthest(tuple(found)) == min(map(furthest, rising))
        if tuple(costs) in rising:
            assert found == costs


def small_table(language_model: LanguageModel, work: Work = WORKS[0]) -> LatencyTable:
    return measure_table(language_model, find_units(language_model), [[8]] * 2, work)


def test_a_table_of_elsewhere_is_refused() -> None:
    language_model = tiny_language_model()
    table = small_table(language_model)
    table.check(place_of(language_model, WORKS[0]))
    with pytest.raises(InvalidInput, match="measured elsewhere: its pass is"):
        table.check(place_of(language_model, WORKS[1]))
    for name, other in (("processor", "Z80"), ("device", "cuda Another"), ("torch", "1.0"), ("threads", 64)):
        with pytest.raises(InvalidInput, match=f"measured elsewhere: its {name} is {other!r}, and here it is "):
            LatencyTable({**table.place, name: other}, table.costs).check(place_of(language_model, WORKS[0]))


def test_the_cache_has_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVOPRUNE_CACHE", str(tmp_path))
    language_model = tiny_language_model()
    units = find_units(language_model)
    first = latency_table(language_model, units, [[8]] * 2, WORKS[0])
    assert latency_table(language_model, units, [[8]] * 2, WORKS[0]) == first
    assert latency_table(language_model, units, [[8, 16]] * 2, WORKS[0]) != first
    assert len(list((tmp_path / "latency").iterdir())) == 2


def test_files(tmp_path: Path) -> None:
    table = small_table(tiny_language_model())
    write_table(table, tmp_path / "latency.json")
    assert read_table(tmp_path / "latency.json") == table and table.work == WORKS[0]
    (tmp_path / "other.json").write_text('{"format": "evoprune-shape/1"}')
    (tmp_path / "torn.json").write_text((tmp_path / "latency.json").read_text()[:200])
    counted = table.to_json() | {"costs": table.costs.to_json() | {"quantity": "flops"}}
    (tmp_path / "counted.json").write_text(json.dumps(counted))
    for name, message in (("other", "'evoprune-shape/1' is not known"), ("torn", ""), ("counted", "no latencies")):
        with pytest.raises(InvalidInput, match=f"is no table of latencies: .*{message}"):
            read_table(tmp_path / f"{name}.json")


def test_what_a_model_cannot_read() -> None:
    language_model = tiny_language_model()  # of 64 positions
    assert Work.of(language_model, 1, None, decode=False).sequence == 64
    assert Work.of(language_model, 1, None, decode=True).sequence == 63
    with pytest.raises(InvalidInput, match="65 tokens is too long: model 'tiny-llama' reads at most 64"):
        Work.of(language_model, 1, 65, decode=False)
    with pytest.raises(InvalidInput, match="at most 63 before the next"):
        Work.of(language_model, 1, 64, decode=True)
    with pytest.raises(InvalidInput, match="at least 1 of each"):
        Work.of(language_model, 0, 8, decode=False)
