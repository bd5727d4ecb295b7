"""Statistics against independent truth: plain autograd, stored activations, numpy, Wanda's own update."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from evoprune.fitness.models import LanguageModel
from evoprune.fitness.statistics import PassSettings, Statistics, collect_statistics, statistics_for
from evoprune.fitness.statistics_import import import_gradients
from evoprune.fitness.statistics_merge import merge
from evoprune.fitness.statistics_store import new_folder
from evoprune.metrics.errors import EvopruneError, InvalidInput, UnknownName
from evoprune.metrics.terminals import STATISTICS
from tests.models import random_windows, tiny_language_model

FAMILIES = ("llama", "gpt2", "opt", "phi")  # grouped queries, transposed Conv1D, biases and dropout, parallel blocks
# Norms by modality are of models that read images.
ALL = STATISTICS - {"X_v", "X_l"} | {"H"}
GRADIENTS = ("G_l2", "G_l1", "G_mean", "G_reg")


def activations(language_model: LanguageModel, windows: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Site -> its inputs and outputs, each [sequences, window, features] float64, one forward pass a sequence."""
    heard: dict[str, list[tuple[Tensor, Tensor]]] = {bound.site.name: [] for bound in language_model.sites}
    handles = [
        bound.module.register_forward_hook(
            lambda module, args, output, name=bound.site.name: heard[name].append((args[0], output))
        )
        for bound in language_model.sites
    ]
    for ids in windows:
        language_model.model(input_ids=ids[None], use_cache=False)
    for handle in handles:
        handle.remove()
    shape = tuple(windows.shape)
    return {
        name: tuple(torch.cat([pair[side].reshape(1, shape[1], -1) for pair in pairs]).double() for side in (0, 1))
        for name, pairs in heard.items()
    }


def loss_gradients(language_model: LanguageModel, windows: Tensor) -> dict[str, Tensor]:
    """Site -> [sequences, out, in]: plain autograd of the model's own loss, one sequence at a time."""
    return _gradients(
        language_model, windows, lambda ids: language_model.model(input_ids=ids, labels=ids, use_cache=False).loss
    )


def regional_gradients(language_model: LanguageModel, windows: Tensor) -> dict[str, Tensor]:
    """The same for the norm of each block's output, its inputs held fixed."""
    found: dict[str, Tensor] = {}
    for index, (name, block) in enumerate(language_model.blocks()):

        def output_norm(ids: Tensor, index: int = index, block: torch.nn.Module = block) -> Tensor:
            outputs: list[Tensor] = []
            cut = block.register_forward_pre_hook(lambda module, args: (args[0].detach(), *args[1:]))
            hear = block.register_forward_hook(
                lambda module, args, output: outputs.append(output if isinstance(output, Tensor) else output[0])
            )
            language_model.model(input_ids=ids, use_cache=False)
            cut.remove()
            hear.remove()
            return outputs[0].square().sum().sqrt()

        inside = [bound for bound in language_model.sites if bound.site.name.startswith(f"{name}.")]
        found |= _gradients(language_model, windows, output_norm, inside)
    return found


def _gradients(
    language_model: LanguageModel, windows: Tensor, loss: Callable[[Tensor], Tensor], sites: list | None = None
) -> dict[str, Tensor]:
    bounds = language_model.sites if sites is None else sites
    weights = [bound.module.weight.requires_grad_(True) for bound in bounds]
    per_sequence = [torch.autograd.grad(loss(ids[None]), weights) for ids in windows]
    for weight in weights:
        weight.requires_grad_(False)
    return {
        bound.site.name: torch.stack([grads[i].T if bound.transposed else grads[i] for grads in per_sequence])
        for i, bound in enumerate(bounds)
    }


@pytest.fixture(scope="module", params=FAMILIES)
def collected(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """(model, windows, every statistic of them)."""
    language_model, windows = tiny_language_model(request.param), random_windows(5, 12)
    folder = tmp_path_factory.mktemp("statistics") / "set"
    # Batches of 2 leave a last batch of 1.
    settings = PassSettings(forward_batch=2, gradient_batch=2)
    return language_model, windows, collect_statistics(language_model, windows, ALL, folder=folder, settings=settings)


def test_input_and_output_statistics_equal_those_of_stored_activations(collected) -> None:
    language_model, windows, statistics = collected
    for site, (x, y) in activations(language_model, windows).items():
        found = statistics.site_statistics(site, ALL)
        truth = {
            "X_ss": x.square().sum((0, 1)) / len(x),
            "X_l2": (x.square().sum((0, 1)) / len(x)).sqrt(),
            "X_gate_l2": (x.square().sum((0, 1)) / len(x)).sqrt(),
            "X_l1": x.abs().mean((0, 1)),
            "X_mean": x.mean((0, 1)),
            "X_var": x.var((0, 1), unbiased=False),
            "X_max": x.abs().amax((0, 1)),
        }
        for name, value in truth.items():
            torch.testing.assert_close(found[name], value.float()[None], rtol=2e-5, atol=1e-6, msg=f"{site} {name}")
        y_ss = (y.square().sum((0, 1)) / len(y)).float()[:, None]
        torch.testing.assert_close(found["Y_ss"], y_ss, rtol=2e-5, atol=1e-6)
        torch.testing.assert_close(found["Y_l2"], y_ss.sqrt(), rtol=2e-5, atol=1e-6)


def test_gram_and_inverse_diagonals_equal_numpy(collected) -> None:
    language_model, windows, statistics = collected
    for site, (x, _) in activations(language_model, windows).items():
        rows = x.flatten(0, 1).numpy()
        np.testing.assert_allclose(
            statistics.tensor(site, "H").numpy(), rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5
        )
        hessian = 2 * rows.T @ rows / len(x)
        inverse = np.linalg.inv(hessian + 0.01 * np.diag(hessian).mean() * np.eye(len(hessian)))
        np.testing.assert_allclose(statistics.tensor(site, "Hinv")[0], np.diag(inverse), rtol=1e-3)
        upper = np.linalg.cholesky(inverse).T
        np.testing.assert_allclose(statistics.tensor(site, "Hchol2")[0], np.diag(upper) ** 2, rtol=1e-3)


def test_gradients_equal_plain_autograd(collected) -> None:
    language_model, windows, statistics = collected
    for site, g in loss_gradients(language_model, windows).items():
        found = statistics.site_statistics(site, GRADIENTS)
        bound = 2.0**-24 * g.abs().max()  # entries far below the largest are stored in absolute precision
        torch.testing.assert_close(found["G_l2"], g.square().sum(0).sqrt(), rtol=1e-3, atol=bound.item())
        torch.testing.assert_close(found["G_l1"], g.abs().sum(0), rtol=1e-3, atol=bound.item())
        torch.testing.assert_close(found["G_mean"], g.mean(0), rtol=1e-3, atol=20 * bound.item())
    for site, g in regional_gradients(language_model, windows).items():
        truth = g.square().mean(0).sqrt()
        torch.testing.assert_close(
            statistics.tensor(site, "G_reg"), truth, rtol=1e-3, atol=(2.0**-24 * truth.max()).item()
        )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("batch", "checkpointing"), [(1, False), (3, False), (3, True)])
def test_streamed_gradients_equal_autograd_before_they_are_rounded(
    family: str, batch: int, checkpointing: bool
) -> None:
    from evoprune.fitness.statistics_gradient import GradientSums, gradient_pass

    language_model, windows = tiny_language_model(family), random_windows(4, 10)
    sums = GradientSums(language_model.sites, frozenset({"G_l2"}))
    blocks = [block for _, block in language_model.blocks()]
    model, device = language_model.model, language_model.device
    gradient_pass(model, sums, windows, batch, device, 1.0, blocks, checkpointing, lambda done: None)
    found = sums.results(len(windows))
    for site, g in loss_gradients(language_model, windows).items():
        truth = g.square().sum(0).sqrt()
        torch.testing.assert_close(found[site]["G_l2"], truth, rtol=1e-5, atol=(1e-6 * truth.max()).item())
    assert all("forward" not in block.__dict__ and not block._forward_hooks for block in blocks)
    assert all(p.grad is None and not p.requires_grad for p in language_model.model.parameters())


def test_half_precision_with_loss_scaling_has_no_zeros_where_float32_has_none(tmp_path: Path) -> None:
    windows = random_windows(3, 12)
    truth = {}
    for dtype in (torch.float32, torch.float16):
        language_model = tiny_language_model()
        # A nearly flat output: gradients as tiny as in large models. Unscaled, half of them would be lost.
        language_model.model.lm_head.weight.mul_(1e-3)
        language_model.model.model.norm.weight.mul_(1e-3)
        language_model.model.to(dtype)
        statistics = collect_statistics(language_model, windows, ["G_l2"], folder=tmp_path / str(dtype))
        truth[dtype] = {site: statistics.tensor(site, "G_l2") for site in statistics.sites}
        fractions = statistics.manifest["zero_fractions"]
        assert len(fractions) == len(statistics.sites)
        assert max(fractions.values()) < (0.01 if dtype == torch.float16 else 1e-9)
    assert statistics.manifest["loss_scale"] == 1024
    for site, full in truth[torch.float32].items():
        half = truth[torch.float16][site]
        assert ((half - full).norm() / full.norm()).item() < 0.05


def test_dead_gradients_are_counted_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    language_model = tiny_language_model()
    dead = language_model.sites[0]
    language_model.model.model.layers[0].self_attn.o_proj.weight.zero_()  # nothing of q, k and v reaches the loss
    with caplog.at_level(logging.WARNING):
        statistics = collect_statistics(language_model, random_windows(2, 8), ["G_l2"], folder=tmp_path / "set")
    assert statistics.manifest["zero_fractions"][f"{dead.site.name}::G_l2"] == 1
    assert "zeros" in caplog.text
    assert not statistics.tensor(dead.site.name, "G_l2").any()


def test_statistics_that_are_dead_along_rows_are_named(tmp_path: Path) -> None:
    language_model, windows = tiny_language_model(), random_windows(2, 8)
    names = ["X_l2", "X_l1", "X_max", "Y_l2", "G_l2", "Hinv"]
    assert collect_statistics(language_model, windows, names, folder=tmp_path / "live").dead() == frozenset()
    rows = sum(bound.site.out_features for bound in language_model.sites)
    up = language_model.model.get_submodule("model.layers.1.mlp.up_proj")
    down = language_model.model.get_submodule("model.layers.1.mlp.down_proj")
    # Neurons that nothing reads: gradients of their rows in up_proj and gate_proj are zero.
    for dead, expected in ((2, frozenset()), (3, frozenset({"G_l2"}))):
        assert (2 * dead >= 0.01 * rows) == bool(expected)
        down.weight[:, :dead] = 0
        found = collect_statistics(language_model, windows, names, folder=tmp_path / str(dead))
        assert found.dead() == expected
    # Outputs that are zero, and with them one input of down_proj each; no row of the input statistics is all zero.
    up.weight[:8] = 0
    found = collect_statistics(language_model, windows, names, folder=tmp_path / "outputs")
    assert {"Y_ss", "Y_l2"} <= found.dead() and not found.dead() & {"X_ss", "X_l2", "X_max", "Hinv"}
    # An input that is zero altogether, which all rows of its matrix see.
    up.weight.zero_()
    found = collect_statistics(language_model, windows, names, folder=tmp_path / "inputs")
    assert {"X_ss", "X_l2", "X_gate_l2", "X_l1", "X_max"} <= found.dead() and "Hinv" not in found.dead()
    assert Statistics.open(found.folder).dead() == found.dead()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wanda_mode_repeats_the_reference_update_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    language_model, windows = tiny_language_model(), random_windows(5, 12)
    language_model.model.to(dtype)
    scaler_row: dict[str, Tensor] = {}
    seen: dict[str, int] = {}

    def add_batch(name: str, inp: Tensor) -> None:  # what WrappedGPT.add_batch of Wanda does, spelt out
        columns = inp.shape[-1]
        row = scaler_row.setdefault(name, torch.zeros(columns))
        row *= seen.get(name, 0) / (seen.get(name, 0) + 1)
        seen[name] = seen.get(name, 0) + 1
        row += torch.norm(inp.reshape(-1, columns).t().type(torch.float32), p=2, dim=1) ** 2 / seen[name]

    handles = [
        bound.module.register_forward_hook(lambda module, args, _, name=bound.site.name: add_batch(name, args[0]))
        for bound in language_model.sites
    ]
    for ids in windows:
        language_model.model(input_ids=ids[None], use_cache=False)
    for handle in handles:
        handle.remove()
    statistics = collect_statistics(
        language_model, windows, ["X_l2", "X_l1"], folder=tmp_path / "set", settings=PassSettings(mode="wanda_fp32")
    )
    for site, row in scaler_row.items():
        assert torch.equal(statistics.tensor(site, "X_ss"), row[None])
        assert torch.equal(statistics.tensor(site, "X_l2"), row.sqrt()[None])


def test_merging_two_shards_equals_one_pass(tmp_path: Path) -> None:
    language_model, windows = tiny_language_model(), random_windows(5, 12)
    # Unequal shares and an offset, so that the means of the shards differ.
    parts = [
        collect_statistics(language_model, part, ALL, folder=tmp_path / name)
        for name, part in (("first", windows[:2]), ("second", windows[2:]))
    ]
    whole = collect_statistics(language_model, windows, ALL, folder=tmp_path / "whole")
    merged = merge(*parts, tmp_path / "merged")
    assert (merged.sequences, merged.tokens, merged.names) == (5, 60, whole.names)
    for site in whole.sites:
        for name in sorted(ALL):
            truth = whole.tensor(site, name)
            tolerance = {"rtol": 3e-3, "atol": 2e-3 * truth.abs().max().item()} if name in GRADIENTS else {}
            if name in ("Hinv", "Hchol2"):
                tolerance = {"rtol": 1e-3, "atol": 0.0}
            torch.testing.assert_close(merged.tensor(site, name), truth, **tolerance, msg=f"{site} {name}")
    with pytest.raises(InvalidInput, match="same text"):
        merge(parts[0], parts[0], tmp_path / "twice")
    other = collect_statistics(tiny_language_model(seed=1), windows, ["X_ss"], folder=tmp_path / "other")
    with pytest.raises(InvalidInput, match="differ in fingerprint"):
        merge(parts[0], other, tmp_path / "mixed")


def test_one_input_is_collected_once(tmp_path: Path) -> None:
    language_model = tiny_language_model()
    statistics = collect_statistics(language_model, random_windows(), ["X_ss"], folder=tmp_path / "set")
    led = {
        site["name"].rpartition(".")[2]: site["input_of"].rpartition(".")[2] for site in statistics.manifest["sites"]
    }
    assert led == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "q_proj"),
        "o_proj": "o_proj",
        **dict.fromkeys(("gate_proj", "up_proj"), "gate_proj"),
        "down_proj": "down_proj",
    }


def test_groups_of_blocks_give_the_same_bits_as_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from evoprune.fitness import statistics_passes

    language_model, windows = tiny_language_model(), random_windows()
    whole = collect_statistics(language_model, windows, ALL, folder=tmp_path / "whole")
    monkeypatch.setattr(statistics_passes, "SUM_BYTES", 1)
    monkeypatch.setattr(statistics_passes, "_weight_bytes", lambda _: 1)
    calls: list[tuple[int, int]] = []
    split = collect_statistics(
        language_model,
        windows,
        ALL,
        folder=tmp_path / "split",
        settings=PassSettings(checkpointing=False),
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls[-1] == (24, 24)  # 4 sequences, forward, backward and regional passes, 2 blocks each
    files = sorted(path.name for path in whole.folder.glob("*.safetensors"))
    assert files == ["block-0000.safetensors", "block-0001.safetensors"]
    for name in files:
        assert (whole.folder / name).read_bytes() == (split.folder / name).read_bytes()


def test_progress_is_of_all_sequences_whatever_a_batch_has(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    collect_statistics(
        tiny_language_model(),
        random_windows(),
        {"X_l2"},
        folder=tmp_path / "statistics",
        settings=PassSettings(forward_batch=1),
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_second_request_is_a_hit(tmp_path: Path) -> None:
    language_model, windows = tiny_language_model(), random_windows()
    calls: list[tuple[int, int]] = []

    def request(names: list[str], **options: object) -> Statistics:
        return statistics_for(
            language_model, windows, names, cache=tmp_path, progress=lambda *at: calls.append(at), **options
        )

    first = request(["W", "X_l2", "G_l2", "sparsity"])
    assert calls and first.names == {"X_ss", "X_l2", "X_gate_l2", "G_l2"}
    calls.clear()
    assert request(["X_ss"]).folder == first.folder and not calls
    assert request(["Y_l2"]).folder != first.folder and calls
    calls.clear()
    wanda = request(["X_ss"], settings=PassSettings(mode="wanda_fp32"))
    assert wanda.folder != first.folder and calls
    assert len(list((tmp_path / "statistics").iterdir())) == 3  # nothing half-written stays behind
    calls.clear()
    alone = statistics_for(language_model, windows, ["W", "depth"], cache=tmp_path / "other")  # a metric of weights
    assert not alone.names and not calls


def test_equal_inputs_give_equal_files(tmp_path: Path) -> None:
    language_model, windows = tiny_language_model(), random_windows()
    for name in ("one", "two"):
        collect_statistics(language_model, windows, ["X_l2", "G_l2"], folder=tmp_path / name)
    assert {p.name for p in (tmp_path / "one").iterdir()} == {p.name for p in (tmp_path / "two").iterdir()}
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_of_two_processes_that_write_one_set_the_first_stays(tmp_path: Path) -> None:
    target = tmp_path / "set"
    with new_folder(target) as slow:
        (slow / "manifest.json").write_text("slow")
        with new_folder(target) as fast:
            (fast / "manifest.json").write_text("fast")
    assert (target / "manifest.json").read_text() == "fast"
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_an_interrupted_pass_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    language_model = tiny_language_model()
    with pytest.raises(KeyboardInterrupt):
        statistics_for(language_model, random_windows(), ["X_l2", "G_l2"], cache=tmp_path, progress=stop)
    assert not list((tmp_path / "statistics").iterdir())
    assert not any(bound.module._forward_hooks for bound in language_model.sites)


def test_tensors_are_private(tmp_path: Path) -> None:
    language_model = tiny_language_model()
    statistics = collect_statistics(language_model, random_windows(), ALL, folder=tmp_path / "set")
    site = statistics.sites[0]
    before = statistics.site_statistics(site, ALL)
    for name in ALL:
        statistics.tensor(site, name).fill_(7)
    again = Statistics.open(statistics.folder, verify=True)
    for name in ALL:
        assert torch.equal(statistics.tensor(site, name), before[name])
        assert torch.equal(again.tensor(site, name), before[name])


def test_what_does_not_belong_is_refused(tmp_path: Path) -> None:
    language_model, windows = tiny_language_model(), random_windows()
    statistics = collect_statistics(language_model, windows, ["X_l2"], folder=tmp_path / "set")
    folder = statistics.folder
    assert Statistics.open(folder, fingerprint=language_model.fingerprint).sites == statistics.sites
    refused: list[tuple[str, Callable[[], object]]] = [
        ("fingerprint", lambda: Statistics.open(folder, fingerprint="another model")),
        ("no readable statistics", lambda: Statistics.open(tmp_path / "nowhere")),
        ("hold no 'G_l2'", lambda: statistics.tensor(statistics.sites[0], "G_l2")),
        ("no statistics of 'elsewhere'", lambda: statistics.tensor("elsewhere", "X_l2")),
        ("not empty", lambda: collect_statistics(language_model, windows, ["X_l2"], folder=folder)),
        ("int64", lambda: statistics_for(language_model, windows[:, :1], ["X_l2"], cache=tmp_path)),
        ("int64", lambda: statistics_for(language_model, windows.float(), ["X_l2"], cache=tmp_path)),
    ]
    for message, attempt in refused:
        with pytest.raises(InvalidInput, match=message) as caught:
            attempt()
        assert "\n" not in str(caught.value)
    with pytest.raises(UnknownName, match="did you mean 'X_var'"):
        statistics_for(language_model, windows, ["X_vr"], cache=tmp_path)


def test_a_changed_set_is_refused(tmp_path: Path) -> None:
    language_model, windows = tiny_language_model(), random_windows()
    statistics = statistics_for(language_model, windows, ["X_l2", "G_l2"], cache=tmp_path)
    manifest = statistics.folder / "manifest.json"
    text, block = manifest.read_text(), statistics.folder / "block-0001.safetensors"
    manifest.write_text(json.dumps(json.loads(text) | {"definitions": 0}))
    with pytest.raises(InvalidInput, match="collect them again"):
        Statistics.open(statistics.folder)
    manifest.write_text(text)
    content = bytearray(block.read_bytes())
    content[-1] ^= 1
    block.write_bytes(content)
    Statistics.open(statistics.folder)  # a worker trusts what the driver has verified
    for attempt in (
        lambda: Statistics.open(statistics.folder, verify=True),
        lambda: statistics_for(language_model, windows, ["X_l2"], cache=tmp_path),
    ):
        with pytest.raises(InvalidInput, match="delete"):
            attempt()
    block.write_bytes(content[:-8])
    with pytest.raises(InvalidInput, match="delete"):
        Statistics.open(statistics.folder)


def test_gradients_that_overflow_are_an_error(tmp_path: Path) -> None:
    language_model = tiny_language_model()
    language_model.model.lm_head.weight.fill_(torch.inf)
    with pytest.raises(EvopruneError, match="not finite"):
        collect_statistics(language_model, random_windows(), ["G_l2"], folder=tmp_path / "set")
    assert not list(tmp_path.iterdir())


def test_published_gradient_files_are_imported(tmp_path: Path) -> None:
    language_model = tiny_language_model()
    truth = {bound.site.name: torch.rand(bound.weight().shape) for bound in language_model.sites}
    published = {
        f"{bound.site.kind}_layer_{bound.site.block}": (100 * truth[bound.site.name]).half()
        for bound in language_model.sites
    }
    path = tmp_path / "gradients_aggregrate_norm_l2_model.pth"
    torch.save(published, path)
    statistics = import_gradients(path, language_model, tmp_path / "set")
    for site, gradient in truth.items():
        torch.testing.assert_close(statistics.tensor(site, "G_l2"), gradient, rtol=2e-3, atol=1e-5)
    published.popitem()
    torch.save(published, path)
    with pytest.raises(InvalidInput, match="not of 'tiny-llama'"):
        import_gradients(path, language_model, tmp_path / "incomplete")
    torch.save({"self_attn.q_proj_layer_0": Path("an object")}, path)
    with pytest.raises(InvalidInput, match="no file of gradient tensors"):
        import_gradients(path, language_model, tmp_path / "object")
    assert not (tmp_path / "incomplete").exists() and not (tmp_path / "object").exists()
