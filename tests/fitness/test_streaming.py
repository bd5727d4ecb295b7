"""A block at a time against the whole model: the same weights, losses and errors, bit for bit, in every family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from evoprune.fitness.checkpoint import write_checkpoint
from evoprune.fitness.evaluation import evaluate_language_model
from evoprune.fitness.models import load_model
from evoprune.fitness.pruning import PrunedLayer, needed_statistics, prune_model
from evoprune.fitness.replay import replayed
from evoprune.fitness.statistics import collect_statistics
from evoprune.fitness.streamed import Streamed, open_streamed
from evoprune.fitness.streamed_checkpoint import StreamedCheckpoint
from evoprune.fitness.streaming import (
    Accumulation,
    check_memory,
    evaluate_blocks,
    memory_bytes,
    prune_blocks,
    pruning_bytes,
)
from evoprune.metrics.criterion import CRITERIA, Metric
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.records import MaskRule
from tests.models import FAMILIES, random_windows, save_tiny

WINDOWS = random_windows(8, 24)
WANDA = CRITERIA["wanda"]
RULE = MaskRule(0.5)


class Stopped(Exception):
    pass


def pruned(
    streamed: Streamed,
    out: Path,
    *,
    compressor: str = "mask",
    accumulation: Accumulation = "path",
    stop: int | None = None,
    identity: str = "one",
) -> StreamedCheckpoint:
    def progress(done: int, total: int) -> None:
        if done == stop:
            raise Stopped

    checkpoint = StreamedCheckpoint(streamed, out, {"what": identity}, streamed.dtype)
    options = {"compressor": compressor, "accumulation": accumulation}
    prune_blocks(streamed, checkpoint, WANDA, RULE, WINDOWS, progress=progress, **options)  # type: ignore[arg-type]
    checkpoint.finish(recipe={}, report={}, sparsity={})
    return checkpoint


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All that the files of a checkpoint hold."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def same(folder: Path, other: Path) -> bool:
    found, expected = weights(folder), weights(other)
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "llama", num_hidden_layers=3)


def test_replay_a_block_at_a_time(family: Path, tmp_path: Path) -> None:
    whole = load_model(str(family))
    layers = replayed(whole, WANDA, RULE, WINDOWS)
    write_checkpoint(whole, tmp_path / "whole", recipe={}, report={})
    streamed = open_streamed(str(family))
    assert pruned(streamed, tmp_path / "streamed").layers == layers
    assert same(tmp_path / "streamed", tmp_path / "whole")
    for name in ("config.json", "generation_config.json", "tokenizer.json", "evoprune.json"):
        beside = [tmp_path / folder / name for folder in ("streamed", "whole")]
        assert [path.exists() for path in beside] in ([True, True], [False, False])
        assert not beside[0].exists() or beside[0].read_bytes() == beside[1].read_bytes(), name
    # Nothing of the model is left behind.
    names = [name for block in range(streamed.n_blocks) for name in streamed.block(block)]
    assert all(streamed.model.get_parameter(name).is_meta for name in names)
    assert [path.name for path in tmp_path.iterdir()].count(".streamed.streaming") == 0


def test_loss_a_block_at_a_time(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVOPRUNE_CACHE", str(tmp_path))
    whole, other = load_model(str(family)), load_model(str(family))
    prune_model(other, CRITERIA["magnitude"], RULE)
    write_checkpoint(other, tmp_path / "half", recipe={}, report={})
    expected = evaluate_language_model(other.model, WINDOWS, dense=whole.model)
    found, zeros = evaluate_blocks(open_streamed(str(tmp_path / "half")), WINDOWS, dense=open_streamed(str(family)))
    assert (found, zeros) == (expected, 0.5)
    assert not list(tmp_path.glob(".states-*"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("compressor", ["mask", "sparsegpt"])
def test_dense_statistics_a_block_at_a_time(compressor: str, dtype: str, llama: Path, tmp_path: Path) -> None:
    whole = load_model(str(llama), dtype=dtype)
    names = needed_statistics(WANDA, compressor)
    statistics = collect_statistics(whole, WINDOWS, names, folder=tmp_path / "statistics")
    layers = prune_model(whole, WANDA, RULE, statistics=statistics, compressor=compressor)
    streamed = open_streamed(str(llama), dtype=dtype)
    checkpoint = pruned(streamed, tmp_path / "out", compressor=compressor, accumulation="dense")
    assert checkpoint.layers == layers
    found = weights(tmp_path / "out")
    assert all(torch.equal(found[name], value) for name, value in whole.model.named_parameters())


def test_files_of_a_bare_body_and_in_shards(llama: Path, tmp_path: Path) -> None:
    """As some checkpoints on the Hub are: no prefix, several files, a tensor that no one reads."""
    shards = [{"model.rotary_emb.unread": torch.zeros(2)}, {}, {}]
    for number, (name, value) in enumerate(weights(llama).items()):
        shards[number % 3][name.removeprefix("model.")] = value
    for path in llama.iterdir():
        if path.suffix == ".json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    places = {}
    for number, shard in enumerate(shards):
        save_file(shard, tmp_path / f"part-{number}.safetensors", metadata={"format": "pt"})
        places |= dict.fromkeys(shard, f"part-{number}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    streamed, whole = open_streamed(str(tmp_path)), load_model(str(llama))
    with streamed.resident(streamed.block(1)):
        for name in streamed.block(1):
            assert torch.equal(streamed.model.get_parameter(name), whole.model.get_parameter(name))


def test_an_interrupted_run_goes_on(llama: Path, tmp_path: Path) -> None:
    streamed, out = open_streamed(str(llama)), tmp_path / "out"
    pruned(streamed, tmp_path / "once", compressor="refit")
    with pytest.raises(Stopped):
        pruned(streamed, out, compressor="refit", stop=2)
    assert not out.exists()
    shard = tmp_path / ".out.streaming" / "model-00001-of-00006.safetensors"
    written = shard.stat().st_mtime_ns
    again = StreamedCheckpoint(streamed, out, {"what": "one"}, streamed.dtype)
    assert (again.done, again.discarded, len(again.layers)) == (2, False, 14)
    with pytest.raises(Stopped):
        pruned(streamed, out, compressor="refit", stop=2)
    assert shard.stat().st_mtime_ns == written
    checkpoint = pruned(open_streamed(str(llama)), out, compressor="refit")
    assert checkpoint.layers == pruned(streamed, tmp_path / "once", compressor="refit").layers
    assert same(out, tmp_path / "once")
    assert not (tmp_path / ".out.streaming").exists()


def test_another_command_begins_anew(llama: Path, tmp_path: Path) -> None:
    streamed, out = open_streamed(str(llama)), tmp_path / "out"
    with pytest.raises(Stopped):
        pruned(streamed, out, stop=1)
    checkpoint = pruned(streamed, out, compressor="refit", identity="other")
    assert checkpoint.discarded
    pruned(streamed, tmp_path / "once", compressor="refit")
    assert same(out, tmp_path / "once")


def test_what_needs_the_whole_model_is_refused(llama: Path, tmp_path: Path) -> None:
    streamed = open_streamed(str(llama))
    checkpoint = StreamedCheckpoint(streamed, tmp_path / "out", {}, streamed.dtype)
    gradient = Metric.from_text("mul(abs(W),G_l2)")
    with pytest.raises(InvalidInput, match="G_l2 is a gradient"):
        prune_blocks(streamed, checkpoint, gradient, RULE, WINDOWS)
    with pytest.raises(InvalidInput, match="group global"):
        prune_blocks(streamed, checkpoint, WANDA, MaskRule(0.5, None, "global"), WINDOWS)
    with pytest.raises(InvalidInput, match="leave out --memory"):
        prune_blocks(streamed, checkpoint, WANDA, RULE, WINDOWS, compressor="scap")


def test_weights_that_do_not_belong(llama: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "gemma")
    content = weights(folder)
    save_file(content | {"lm_head.weight": content["model.embed_tokens.weight"] + 1}, folder / "model.safetensors")
    with pytest.raises(InvalidInput, match=r"say lm_head\.weight apart from model\.embed_tokens\.weight"):
        open_streamed(str(folder))
    content.pop("model.layers.1.mlp.up_proj.weight")
    save_file(content, folder / "model.safetensors")
    with pytest.raises(InvalidInput, match=r"there is no model\.layers\.1\.mlp\.up_proj\.weight"):
        open_streamed(str(folder))


@pytest.mark.parametrize(
    ("words", "size"),
    [("2GiB", 2 << 30), ("500MB", 500 * 10**6), ("1.5 gib", 3 << 29), ("64mib", 64 << 20), ("1000000", 10**6)],
)
def test_sizes(words: str, size: int) -> None:
    assert memory_bytes(words) == size


@pytest.mark.parametrize("words", ["", "much", "-1GB", "3 apples", "0", "nan", "1e999"])
def test_no_sizes(words: str) -> None:
    with pytest.raises(InvalidInput, match="is no size: give one such as 2GiB"):
        memory_bytes(words)


def test_too_little_memory_says_how_much_is_enough(llama: Path) -> None:
    needed = pruning_bytes(open_streamed(str(llama)), WINDOWS, {"X_l2"}, "mask", "path")
    with pytest.raises(InvalidInput, match=r"1 MiB are too little to stream this: give --memory (\d+)MiB") as refused:
        check_memory(1 << 20, needed)
    enough = memory_bytes(str(refused.value).split()[-3])
    check_memory(enough, needed)
    assert enough - needed < 1 << 20


def test_the_errors_are_those_of_a_layer(llama: Path, tmp_path: Path) -> None:
    """What comes back from a file is what went in."""
    streamed = open_streamed(str(llama))
    with pytest.raises(Stopped):
        pruned(streamed, tmp_path / "out", stop=1)
    (first, *_) = StreamedCheckpoint(streamed, tmp_path / "out", {"what": "one"}, streamed.dtype).layers
    assert isinstance(first, PrunedLayer) and first.shape == (32, 32) and first.removed == 512
