"""Layouts that are looked up: the same as those written by hand, and of unknown families right or refused."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import evoprune
from evoprune.fitness.adapters import ADAPTERS
from evoprune.fitness.adapters.traced import traced_layout
from evoprune.fitness.card import Cut
from evoprune.fitness.checkpoint import write_checkpoint
from evoprune.fitness.forms import cut_model
from evoprune.fitness.layouts import layout_of
from evoprune.fitness.models import load_model
from evoprune.fitness.surgeon import Surgeon
from evoprune.fitness.unit_check import check_units
from evoprune.fitness.units import BlockUnits, find_units
from evoprune.metrics.errors import InvalidInput
from tests.fitness.test_forms import OTHERS
from tests.fitness.test_surgeon import by_hand, greedy, logits, zeroed
from tests.models import FAMILIES, random_windows, save_tiny, tiny_language_model, tiny_model
from tests.shapes import cases, shape_of

pytest.importorskip("torch_pruning")

# Families that nobody has described, with what a tiny model of them needs beside the common settings.
FOUND: dict[str, dict[str, object]] = {
    "apertus": {},  # neither gate nor LayerNorm names of Llama's, norms of queries and keys
    "arcee": {},
    "cohere": {},  # attention and MLP side by side behind one norm
    "falcon": {"ffn_hidden_size": 48},  # fused, one key head
    "glm": {},  # gate and up fused
    "glm4": {},  # norms before and behind the parts
    "granite": {},
    "nemotron": {},
    "olmo": {},  # norms without parameters
    "stablelm": {},
    "starcoder2": {},
}
# A search of seconds.
SEARCH = """\
data: {source: TEXT, window: 32, heldout_windows: 4, calibration_window: 32, calibration_sequences: 4}
searcher:
  offspring: 4
  windows: 4
  stages: [{windows: 1, survivors: 2}, {windows: 2, survivors: 1}]
  seeds: [flap]
evaluations: 8
"""
# Those that cannot be cut, and the line that says so.
INTERLEAVED = "are not those of all queries, then all keys, then all values"
REFUSED: dict[str, str] = {
    "bloom": rf"transformer.h.0.self_attention.query_key_value {INTERLEAVED}",
    "gpt_neox": rf"gpt_neox.layers.0.attention.query_key_value {INTERLEAVED}",
    "mpt": "without a KV group it does not run",  # a bias for each head comes from outside
    "olmo2": r"self_attn holds q_norm.weight \[32\] beside its matrices",
    "persimmon": rf"model.layers.0.self_attn.query_key_value {INTERLEAVED}",
    "xglm": "without a KV group it does not run",  # reshapes to its hidden size
}
TINY: dict[str, dict[str, object]] = {
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48},
}


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"gpt2"}))
def test_it_finds_what_adapters_say(family: str) -> None:
    adapter = ADAPTERS[family]
    bare = replace(adapter, attention=None, mlp=None, shared_norms=())
    assert traced_layout(tiny_model(family), bare) == adapter


def test_what_the_graph_does_not_know() -> None:
    """GPT-2 has layers of its own, which Torch-Pruning takes for bare parameters."""
    with pytest.raises(InvalidInput, match=r"'gpt2' cannot be cut: .*attn.c_attn is .* a Conv1D that is no nn.Linear"):
        traced_layout(tiny_model("gpt2"), ADAPTERS["gpt2"])


@pytest.mark.parametrize("family", FOUND)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_both_attentions_and_no_memory(family: str, attention: str) -> None:
    """A fused product and one with a softmax, and weights that are not there, show the same."""
    model = tiny_model(family, **FOUND[family])
    model.set_attn_implementation(attention)
    found = layout_of(model)
    assert layout_of(tiny_model(family, **FOUND[family]).to("meta")) == found
    names = [path.rpartition(".")[2] for path in found.attention.inputs]
    assert names in (["q_proj", "k_proj", "v_proj"], ["query_key_value"])
    if len(found.mlp.inputs) == 2:
        assert found.mlp.inputs == ("mlp.gate_proj", "mlp.up_proj")
    assert found.mlp.width == ("ffn_hidden_size" if family == "falcon" else "intermediate_size")


@pytest.mark.parametrize("family", FOUND)
def test_cut_and_zeroed_say_the_same(family: str) -> None:
    changes = FOUND[family]
    language_model = tiny_language_model(family, **changes)
    units = find_units(language_model)
    dense, before = logits(language_model), dict(language_model.model.named_parameters())
    surgeon = Surgeon(language_model, units)
    for name in ("uneven", "first block gone"):
        blocks = cases(units[0].widths)[name]
        expected = zeroed(language_model, units, blocks, **changes)
        surgeon.masked(blocks)
        assert torch.allclose(logits(language_model), expected, rtol=1e-4, atol=1e-4), name
        surgeon.apply(blocks)
        assert torch.allclose(logits(language_model), expected, rtol=1e-4, atol=1e-4), name
    counted = by_hand(tiny_language_model(family, **changes), units, blocks)
    assert sum(parameter.numel() for parameter in language_model.model.parameters()) == counted
    assert greedy(language_model.model, cached=True) == greedy(language_model.model, cached=False)
    surgeon.restore()
    assert torch.equal(logits(language_model), dense)
    assert dict(language_model.model.named_parameters()) == before
    assert not any(parameter.requires_grad for parameter in before.values())


@pytest.mark.parametrize("family", REFUSED)
def test_refused_in_one_line(family: str) -> None:
    language_model = tiny_language_model(family, **TINY.get(family, {}))
    before = {name: (value, value.clone()) for name, value in language_model.model.named_parameters()}
    with pytest.raises(InvalidInput, match=REFUSED[family]) as error:
        find_units(language_model)
    assert "\n" not in str(error.value)
    after = dict(language_model.model.named_parameters())
    assert all(after[name] is value and torch.equal(value, old) for name, (value, old) in before.items())


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    told = r"'olmo' cannot be cut into heads and neurons; supported: .*llama.*pip install 'evoprune\[torch-pruning\]'"
    with pytest.raises(InvalidInput, match=told):
        find_units(tiny_language_model("olmo"))
    assert len(find_units(tiny_language_model("llama"))) == 2


def halved(block: BlockUnits) -> BlockUnits:
    """The same rows as twice as many heads of half the width."""
    own = block.attention
    heads = replace(own, heads=2 * own.heads, groups=2 * own.groups, head_dim=own.head_dim // 2)
    return replace(block, attention=heads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_wrong_units_do_not_pass(dtype: torch.dtype) -> None:
    """Rows of another matrix, or norms of another part: what is right in every number of units but not on the model."""
    language_model = tiny_language_model("starcoder2", num_key_value_heads=4)
    language_model.model.to(dtype)
    right = find_units(language_model)
    check_units(language_model, right)
    for wrong, told in (
        ([halved(block) for block in right], "without a KV group it does not run"),
        ([replace(block, mlp=replace(block.mlp, norms=block.attention.norms)) for block in right], "without the MLPs"),
    ):
        with pytest.raises(InvalidInput, match=told):
            check_units(language_model, wrong)


def written(family: str, form: str, case: str, out: Path) -> tuple[Path, Tensor]:
    """A checkpoint of a tiny model, and the logits of the model that was written."""
    language_model = tiny_language_model(family, **FOUND[family])
    dense = sum(parameter.numel() for parameter in language_model.model.parameters())
    units = find_units(language_model)
    blocks = cases(units[0].widths)[case]
    cut, chosen = cut_model(language_model, blocks, form=form)
    record = Cut(chosen, dense, shape_of(type(language_model.model).__name__, units, blocks))
    folder = write_checkpoint(cut, out / f"{family}-{form}-{case}", recipe={}, report={}, cut=record)
    return folder, logits(cut)


@pytest.mark.parametrize(
    "family", ["cohere", *(pytest.param(name, marks=pytest.mark.slow) for name in FOUND if name != "cohere")]
)
def test_every_form_says_the_same_when_it_is_loaded(family: str, tmp_path: Path) -> None:
    masked = written(family, "masked", "uneven", tmp_path)[1]
    for form, case in (("compact", "uneven"), ("padded", "uneven"), ("plain", "last block gone")):
        folder, expected = written(family, form, case, tmp_path)
        again = load_model(str(folder))
        assert torch.allclose(logits(again), expected, rtol=1e-4, atol=1e-4), form
        assert again.cut == (form == "compact")
        if case == "uneven":
            assert torch.allclose(expected, masked, rtol=1e-4, atol=1e-4), form


@pytest.mark.slow
def test_other_programs_load_the_compact_form(tmp_path: Path) -> None:
    """In a fresh process, by plain transformers and the module beside the weights; caches work there as well."""
    folders = []
    for family in FOUND:
        for case in ("uneven", "no attention first"):
            folder, expected = written(family, "compact", case, tmp_path)
            save_file({"tokens": random_windows(2, 20), "logits": expected.contiguous()}, f"{folder}.expected")
            folders.append(str(folder))
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", OTHERS, *folders],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for folder, facts in json.loads(done.stdout.splitlines()[-1]).items():
        assert facts["difference"] < 1e-4 and facts["cache"], (folder, facts)


@pytest.mark.slow
def test_a_whole_search(tmp_path: Path) -> None:
    """What is found can be cut, and is no larger than asked for."""
    save_tiny(tmp_path / "model", "stablelm")
    story, config = tmp_path / "story.txt", tmp_path / "search.yaml"
    words = random.Random(0).choices(
        "the dog a cat sees hears under over house tree red blue and then".split(), k=40000
    )
    story.write_text("\n\n".join(" ".join(words[at : at + 50]) for at in range(0, len(words), 50)))
    config.write_text(SEARCH.replace("TEXT", str(story)))
    run = evoprune.search_structure(
        str(tmp_path / "model"), sparsity=0.4, config=config, executor="inline", run_dir=tmp_path / "run", quiet=True
    )
    shape = tmp_path / "shape.json"
    run.export(shape)
    cut = evoprune.prune_shape(str(tmp_path / "model"), shape, out=tmp_path / "out", latency=False)
    # Of the matrices and the two norms of each block, biases among them.
    blocks = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48 + 2 * 2 * 32)
    assert cut.parameters <= cut.dense_parameters - 0.4 * blocks
    assert load_model(str(tmp_path / "out")).cut == (cut.form == "compact")
