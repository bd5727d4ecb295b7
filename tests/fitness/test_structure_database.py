"""The structure database against least squares on inputs that hooks of the test have seen, in every family and mode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evoprune.fitness import structure_build
from evoprune.fitness.adapters import SiteModule
from evoprune.fitness.block_hooks import hidden_output
from evoprune.fitness.block_walk import BlockWalk
from evoprune.fitness.gram import damped
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.parcels import parcel_folder
from evoprune.fitness.path_refit import path_refits
from evoprune.fitness.samples import Samples, Sequences
from evoprune.fitness.structure_build import build_structure_block, build_structure_database
from evoprune.fitness.structure_database import StructureDatabase
from evoprune.fitness.units import BlockUnits, find_units
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.shape import BlockShape
from tests.models import FAMILIES, random_windows, tiny_language_model

WINDOWS = random_windows(6, 24)
THREE = {"llama": {"num_hidden_layers": 3}, "gpt2": {"n_layer": 3}}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("EVOPRUNE_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"


def inputs_of(language_model: LanguageModel, bound: SiteModule, windows: Tensor = WINDOWS) -> Tensor:
    """[tokens, in] float64, what a matrix reads in one pass over all windows."""
    heard: list[Tensor] = []
    handle = bound.module.register_forward_pre_hook(lambda module, args: heard.append(args[0].flatten(0, -2).double()))
    with torch.no_grad():
        language_model.model(input_ids=windows)
    handle.remove()
    return torch.cat(heard)


def solved(bound: SiteModule, inputs: Tensor, columns: Sequence[int]) -> tuple[Tensor, float]:
    """The best weight on these columns and its relative output error, with the damping that is usual."""
    gram = damped(inputs.T @ inputs / len(inputs))
    root, weight = torch.linalg.cholesky(gram).T, bound.weight().double()
    found = torch.linalg.lstsq(root[:, list(columns)], root @ weight.T).solution.T
    change = weight.clone()
    change[:, list(columns)] -= found
    return found, ((root @ change.T).square().sum() / (root @ weight.T).square().sum()).item()


def close(found: Tensor, expected: Tensor) -> bool:
    return bool(((found.double() - expected).norm() / expected.norm()).item() < 1e-3)


def weights(language_model: LanguageModel) -> list[Tensor]:
    return [parameter.clone() for parameter in language_model.model.parameters()]


def fill_biases(*models: torch.nn.Module) -> None:
    """Let biases matter, which are zeros at first."""
    for model in models:
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.constant_(parameter, 0.3)


def halved(database: StructureDatabase, block: BlockUnits) -> BlockShape:
    """Half of the KV groups, all of their heads, and a third of the neurons."""
    widths = block.widths
    heads = database.kept_heads(block.block, widths.groups // 2, widths.heads_per_group)
    return BlockShape(*heads, database.kept_neurons(block.block, widths.neurons // 3))


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_blocks_are_least_squares_on_what_they_read(family: str) -> None:
    language_model = tiny_language_model(family)
    before = weights(language_model)
    units = find_units(language_model)
    database = build_structure_database(language_model, units, WINDOWS, mode="dense")
    assert all(map(torch.equal, before, weights(language_model)))
    for block in units:
        widths, at = block.widths, block.block
        read = {part: inputs_of(language_model, getattr(block, part).output) for part in ("attention", "mlp")}
        for width in (1, 16, widths.neurons):
            kept = database.kept_neurons(at, width)
            weight, error = solved(block.mlp.output, read["mlp"], kept)
            assert close(database.output(at, "mlp", BlockShape((), (), kept)), weight)
            assert database.errors(at, "mlp")[width].item() == pytest.approx(error, abs=1e-5)
        table = database.errors(at, "attention")
        assert table.shape == (widths.groups + 1, widths.heads_per_group + 1)
        assert bool((table[0] == 1).all() and (table[:, 0] == 1).all())
        for groups in range(1, widths.groups + 1):
            for each in range(1, widths.heads_per_group + 1):
                shape = BlockShape(*database.kept_heads(at, groups, each), ())
                shape.check(at, widths)
                assert (len(shape.groups), shape.heads_per_group) == (groups, each)
                columns = block.attention.columns(shape.heads)
                weight, error = solved(block.attention.output, read["attention"], columns)
                assert close(database.output(at, "attention", shape), weight)
                assert table[groups, each].item() == pytest.approx(error, abs=1e-5)
        # What the order would not keep is solved for as well.
        shape = BlockShape((1,), tuple(range(widths.heads_per_group, widths.heads_per_group + 1)), (0, 5, 40))
        for part, columns in (("attention", block.attention.columns(shape.heads)), ("mlp", [0, 5, 40])):
            expected, _ = solved(getattr(block, part).output, read[part], columns)
            assert close(database.output(at, part, shape), expected)


def test_several_texts_weigh_by_their_tokens() -> None:
    language_model = tiny_language_model()
    units = find_units(language_model)
    other = random_windows(3, 40, seed=5)
    padded = {"input_ids": other.clone(), "attention_mask": torch.ones_like(other)}
    padded["attention_mask"][:, 33:] = 0
    samples = Samples([padded], language_model.model.config)
    mixed = build_structure_database(language_model, units, [WINDOWS, samples], mode="dense")
    block = units[1]
    read = torch.cat([inputs_of(language_model, block.mlp.output, text) for text in (WINDOWS, other[:, :33])])
    kept = mixed.kept_neurons(1, 20)
    assert close(mixed.output(1, "mlp", BlockShape((), (), kept)), solved(block.mlp.output, read, kept)[0])
    # However the windows of one text are cut into batches.
    one = build_structure_database(language_model, units, WINDOWS, mode="dense")
    two: Sequence[Sequences] = [WINDOWS[:1], WINDOWS[1:]]
    cut = build_structure_database(language_model, units, two, mode="dense")
    assert cut.name != one.name
    assert torch.allclose(cut.errors(1, "mlp"), one.errors(1, "mlp"), atol=1e-5)


def test_of_a_whole_part_the_refit_is_the_dense_weight() -> None:
    language_model = tiny_language_model()
    units = find_units(language_model)
    shapes = [block.widths.whole for block in units]
    for block, found in zip(units, path_refits(language_model, units, WINDOWS, shapes), strict=True):
        assert torch.equal(found["attention"], block.attention.output.weight())
        assert torch.equal(found["mlp"], block.mlp.output.weight())
    with pytest.raises(InvalidInput, match="1 shapes do not fit a model of 2 blocks"):
        path_refits(language_model, units, WINDOWS, shapes[:1])


def test_blocks_built_by_themselves_are_those_of_the_whole(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    language_model = tiny_language_model(num_hidden_layers=3)
    units = find_units(language_model)
    names = [build_structure_block(language_model, units, WINDOWS, block) for block in (2, 0, 1)]
    walked: list[int] = []
    run = BlockWalk.run
    monkeypatch.setattr(BlockWalk, "run", lambda *given, **more: walked.append(1) or run(*given, **more))
    database = build_structure_database(language_model, units, WINDOWS, mode="dense")
    assert not walked
    assert database.manifest["blocks"] == [names[1], names[2], names[0]]
    monkeypatch.setenv("EVOPRUNE_CACHE", str(cache / "elsewhere"))
    assert build_structure_database(language_model, units, WINDOWS, mode="dense").name == database.name


def reference(language_model: LanguageModel, means: list[tuple[SiteModule, list[list[int]]]]) -> None:
    """Give each matrix the mean over sets of columns, by their sizes, of the best on them; the later in turn."""
    for bound, kept in means:
        inputs = inputs_of(language_model, bound)
        mean = torch.zeros_like(bound.weight(), dtype=torch.float64)
        for columns in kept:
            mean[:, columns] += solved(bound, inputs, columns)[0] * len(columns) / sum(map(len, kept))
        with torch.no_grad():
            bound.weight().copy_(mean)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_the_expectation_is_the_mean_over_widths(family: str) -> None:
    language_model, changed = tiny_language_model(family), tiny_language_model(family)
    units = find_units(language_model)
    before = weights(language_model)
    database = build_structure_database(language_model, units, WINDOWS)
    assert all(map(torch.equal, before, weights(language_model)))
    first, widths = units[0], units[0].widths
    # Four groups of one head, or two of two: eighths of them are 1, 2, (3, 4), and where each has two, one of all.
    counts = [(groups, widths.heads_per_group) for groups in range(1, widths.groups + 1)]
    counts += [(widths.groups, 1)] * (widths.heads_per_group == 2)
    heads = [first.attention.columns(database.kept_heads(0, *count)[1]) for count in counts]
    neurons = [list(database.kept_neurons(0, width)) for width in range(6, 49, 6)]
    there = find_units(changed)
    reference(changed, [(there[0].attention.output, heads), (there[0].mlp.output, neurons)])
    shape = halved(database, units[1])
    # The attention of the second block reads what the first one gives, and its MLP what that attention does.
    read = inputs_of(changed, there[1].attention.output)
    columns = units[1].attention.columns(shape.heads)
    expected, _ = solved(units[1].attention.output, read, columns)
    assert close(database.output(1, "attention", shape), expected)
    dense = build_structure_database(language_model, units, WINDOWS, mode="dense")
    assert not torch.allclose(dense.errors(1, "attention"), database.errors(1, "attention"), atol=1e-4)
    second = [there[1].attention.columns(database.kept_heads(1, *count)[1]) for count in counts]
    reference(changed, [(there[1].attention.output, second)])
    read = inputs_of(changed, there[1].mlp.output)
    expected, _ = solved(units[1].mlp.output, read, shape.neurons)
    assert close(database.output(1, "mlp", shape), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("drop", [False, True])
def test_a_path_is_the_model_cut_so_far(family: str, drop: bool) -> None:
    language_model, cut = (tiny_language_model(family, **THREE[family]) for _ in range(2))
    fill_biases(language_model.model, cut.model)
    units, there = find_units(language_model), find_units(cut)
    dense = build_structure_database(language_model, units, WINDOWS, mode="dense")
    shapes = [halved(dense, block) for block in units]
    if drop:
        shapes[0] = BlockShape((), (), shapes[0].neurons)
        shapes[1] = BlockShape(shapes[1].groups, shapes[1].heads, ())
    database = build_structure_database(language_model, units, WINDOWS, mode="path", path=shapes, correction=0)
    before = weights(language_model)
    refits = path_refits(language_model, units, WINDOWS, shapes, correction=0)
    assert all(map(torch.equal, before, weights(language_model)))
    for block, shape in zip(there, shapes, strict=True):
        for part, bound, columns in (
            ("attention", block.attention.output, block.attention.columns(shape.heads)),
            ("mlp", block.mlp.output, list(shape.neurons)),
        ):
            weight = torch.zeros_like(bound.weight(), dtype=torch.float64)
            if columns:
                read = inputs_of(cut, bound)
                weight[:, columns] = solved(bound, read, columns)[0]
                found = database.output(block.block, part, shape)
                assert close(found, weight[:, columns])
                assert close(refits[block.block][part], weight[:, columns])
            elif (bias := bound.bias()) is not None:
                bias.zero_()
            bound.weight().copy_(weight)
    # Blocks before the first change of the path are those of before.
    other = [*shapes[:2], BlockShape((), (), ())]
    again = build_structure_database(language_model, units, WINDOWS, mode="path", path=other, correction=0)
    assert again.manifest["blocks"][:2] == database.manifest["blocks"][:2]


def streams(language_model: LanguageModel, block: BlockUnits) -> tuple[Tensor, Tensor]:
    """[tokens, hidden] float64 each: the hidden states behind the attention of a block, and behind the block."""
    heard: list[Tensor] = []
    at = language_model.model.get_submodule(block.name)
    handles = [
        at.register_forward_pre_hook(
            lambda module, args, named: heard.append(args[0] if args else named["hidden_states"]), with_kwargs=True
        ),
        block.attention.output.module.register_forward_hook(lambda module, args, output: heard.append(output)),
        at.register_forward_hook(lambda module, args, output: heard.append(hidden_output(output))),
    ]
    with torch.no_grad():
        language_model.model(input_ids=WINDOWS)
    for handle in handles:
        handle.remove()
    before, attention, behind = (states.flatten(0, -2).double() for states in heard)
    return before + attention, behind


def towards(bound: SiteModule, inputs: Tensor, columns: Sequence[int], missing: Tensor) -> Tensor:
    """The best weight on these columns where an output should be what it is and `missing`, [tokens, out], beside."""
    gram, weight = inputs.T @ inputs / len(inputs), bound.weight().double()
    pull = (damped(gram) - gram).diagonal().sqrt().diag()
    rows = torch.cat([inputs / len(inputs) ** 0.5, pull])
    wanted = torch.cat([(inputs @ weight.T + missing) / len(inputs) ** 0.5, pull @ weight.T])
    return torch.linalg.lstsq(rows[:, list(columns)], wanted).solution.T


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
@pytest.mark.parametrize("drop", [False, True])
def test_a_path_makes_up_for_what_was_cut(family: str, drop: bool) -> None:
    language_model, cut, dense = (tiny_language_model(family, **THREE.get(family, {})) for _ in range(3))
    fill_biases(language_model.model, cut.model, dense.model)
    units, there = find_units(language_model), find_units(cut)
    orders = build_structure_database(language_model, units, WINDOWS, mode="dense")
    shapes = [halved(orders, block) for block in units]
    if drop:
        shapes[0] = BlockShape((), (), shapes[0].neurons)
        shapes[1] = BlockShape(shapes[1].groups, shapes[1].heads, units[1].widths.whole.neurons)
    before = weights(language_model)
    database = build_structure_database(language_model, units, WINDOWS, mode="path", path=shapes, correction=0.4)
    refits = path_refits(language_model, units, WINDOWS, shapes, correction=0.4)
    assert all(map(torch.equal, before, weights(language_model)))
    for block, shape, known in zip(there, shapes, find_units(dense), strict=True):
        for part, bound, columns, number in (
            ("attention", block.attention.output, block.attention.columns(shape.heads), 0),
            ("mlp", block.mlp.output, list(shape.neurons), 1),
        ):
            weight = torch.zeros_like(bound.weight(), dtype=torch.float64)
            if len(columns) == bound.site.in_features:
                assert torch.equal(refits[block.block][part], bound.weight())
                continue
            if columns:
                missing = streams(dense, known)[number] - streams(cut, block)[number]
                weight[:, columns] = towards(bound, inputs_of(cut, bound), columns, 0.4 * missing)
                assert close(refits[block.block][part], weight[:, columns])
                assert close(database.output(block.block, part, shape), weight[:, columns])
            elif (bias := bound.bias()) is not None:
                bias.zero_()
            bound.weight().copy_(weight)


def test_padding_makes_up_for_nothing() -> None:
    language_model = tiny_language_model()
    units = find_units(language_model)
    shapes = [block.widths.first(1, 1, 16) for block in units]
    padded = {"input_ids": torch.cat([WINDOWS, WINDOWS], dim=1), "attention_mask": torch.ones(6, 48, dtype=torch.long)}
    padded["attention_mask"][:, 24:] = 0
    texts: list[Sequence[Sequences]] = [
        [Samples([padded], language_model.model.config)], [WINDOWS[:2], WINDOWS[2:]], [WINDOWS]
    ]  # fmt: skip
    *others, expected = (path_refits(language_model, units, text, shapes) for text in texts)
    for found in others:
        for block, known in zip(found, expected, strict=True):
            assert all(close(block[part], known[part].double()) for part in known)


def test_outputs_that_are_normalised_before_they_are_added_make_up_for_nothing() -> None:
    language_model = tiny_language_model("gemma2")
    units = find_units(language_model)
    shapes = [block.widths.first(1, 1, 16) for block in units]
    with_it, without = (path_refits(language_model, units, WINDOWS, shapes, share) for share in (1.0, 0.0))
    for found, expected in zip(with_it, without, strict=True):
        assert all(torch.equal(found[part], expected[part]) for part in ("attention", "mlp"))


@pytest.mark.parametrize("mode", ["dense", "expectation"])
def test_a_build_that_was_stopped_goes_on(mode: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    language_model = tiny_language_model(num_hidden_layers=3)
    units = find_units(language_model)
    before = weights(language_model)
    built: list[str] = []
    made = structure_build.mlp_tensors

    def stopping(part: Any, *sums: Any) -> Any:
        built.append(part.output.site.name)
        if len(built) == 2:
            raise KeyboardInterrupt
        return made(part, *sums)

    monkeypatch.setattr(structure_build, "mlp_tensors", stopping)
    with pytest.raises(KeyboardInterrupt):
        build_structure_database(language_model, units, WINDOWS, mode=mode)
    assert all(map(torch.equal, before, weights(language_model)))
    told: list[tuple[int, int]] = []
    progress = lambda *at: told.append(at)  # noqa: E731
    database = build_structure_database(language_model, units, WINDOWS, mode=mode, progress=progress)
    names = [block.mlp.output.site.name for block in units]
    assert built == [names[0], names[1], *names[1:]]
    assert told == [(2, 3), (3, 3), (3, 3)]
    assert all(map(torch.equal, before, weights(language_model)))
    monkeypatch.setenv("EVOPRUNE_CACHE", str(cache / "elsewhere"))
    assert build_structure_database(language_model, units, WINDOWS, mode=mode).name == database.name


def test_what_does_not_belong_together_is_refused(cache: Path) -> None:
    language_model = tiny_language_model()
    units = find_units(language_model)
    shapes = [block.widths.whole for block in units]
    for told, more in {
        "no accumulation mode 'exact'; there are dense, expectation, path": {"mode": "exact"},
        "go with the accumulation mode 'path', which needs them": {"mode": "path"},
        "'path', which needs them, and no other": {"mode": "dense", "path": shapes},
        "1 shapes do not fit a model of 2 blocks": {"mode": "path", "path": shapes[:1]},
        "block 1 keeps neurons": {"mode": "path", "path": [shapes[0], BlockShape((), (), (48,))]},
    }.items():
        with pytest.raises(InvalidInput, match=told):
            build_structure_database(language_model, units, WINDOWS, **more)
    database = build_structure_database(language_model, units, WINDOWS, mode="dense")
    assert StructureDatabase.open(database.name, language_model, units) == database
    other = tiny_language_model(seed=4)
    with pytest.raises(InvalidInput, match=r"structure database structure-.* is of fingerprint 'tiny-llama-0"):
        StructureDatabase.open(database.name, other, find_units(other))
    (parcel_folder(database.manifest["blocks"][1]) / "mlp.safetensors").unlink()
    with pytest.raises(InvalidInput, match="missing or damaged"):
        database.kept_neurons(1, 3)


def test_inputs_that_cannot_be_used_are_named() -> None:
    language_model = tiny_language_model()
    units = find_units(language_model)
    units[0].mlp.inputs[0].weight().fill_(float("inf"))
    with pytest.raises(
        InvalidInput, match=r"cannot refit model.layers.0.mlp.down_proj on some of its columns: .* calibrate"
    ):
        build_structure_database(language_model, units, WINDOWS, mode="dense")


def test_half_precision_and_full_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    language_model = tiny_language_model()
    language_model.model.to(torch.bfloat16)
    units = find_units(language_model)
    before = weights(language_model)
    database = build_structure_database(language_model, units, WINDOWS)
    assert all(map(torch.equal, before, weights(language_model)))
    assert database.output(1, "mlp", units[1].widths.whole).dtype == torch.float32
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 1 << 20}))
    with pytest.raises(InvalidInput, match=r"factors of 2 blocks take 0.0 GiB, and .* delete what") as refusal:
        build_structure_database(language_model, units, WINDOWS, mode="dense")
    assert "\n" not in str(refusal.value)
