"""Every form of a cut model says what the model in memory says, here and in a process that knows no evoprune."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from evoprune.fitness.card import Cut
from evoprune.fitness.checkpoint import write_checkpoint
from evoprune.fitness.forms import cut_model, form_of, running_shapes
from evoprune.fitness.models import load_model
from evoprune.fitness.surgeon import Surgeon
from evoprune.fitness.units import find_units
from evoprune.metrics.errors import InvalidInput, UnknownName
from evoprune.metrics.shape import BlockShape, BlockWidths
from tests.models import FAMILIES, random_windows, save_tiny, tiny_language_model
from tests.multimodal import save_llava
from tests.shapes import FEW, MANY, NONE, cases, shape_of, some

WINDOWS = random_windows(2, 20)
# Every form that a family can have, by case; no family has another way of saying that an attention is gone.
WRITTEN = [
    ("compact", "uneven"),
    ("compact", "attention alone"),
    ("padded", "uneven"),
    ("plain", "last block gone"),
    ("masked", "uneven"),
]

# What somebody else does with the folders: nothing but transformers.
OTHERS = """
import json, sys
from functools import partial
import torch, transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

found = {}
for folder in sys.argv[1:]:
    given, compact = load_file(folder + ".expected"), "-compact-" in folder
    own = {"trust_remote_code": True} if compact else {}
    model = AutoModelForCausalLM.from_pretrained(folder, **own)
    facts = {"class": type(model).__name__}
    if compact and "uneven" in folder:
        model.save_pretrained(folder + ".again")
        model = AutoModelForCausalLM.from_pretrained(folder + ".again", **own)
    facts["difference"] = (model(given["tokens"]).logits - given["logits"]).abs().max().item()
    prompt = given["tokens"][:1, :6]
    texts = [
        model.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=cached, pad_token_id=1).tolist()
        for cached in (True, False)
    ]
    facts["cache"] = texts[0] == texts[1]
    facts["refused"] = []
    stock = getattr(transformers, type(model).__name__.removeprefix("Compact"))
    auto = partial(AutoModelForCausalLM.from_pretrained, trust_remote_code=False)
    for load in (stock.from_pretrained, auto):
        try:
            load(folder)
        except Exception as error:
            facts["refused"].append(type(error).__name__)
    found[folder] = facts
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Written:
    """A checkpoint and what its model said before it was written."""

    folder: Path
    logits: Tensor
    parameters: int


def blocks_of(case: str, widths: BlockWidths) -> Sequence[BlockShape]:
    if case == "attention alone":
        return [BlockShape(NONE, NONE, widths.whole.neurons), widths.whole]
    return cases(widths)[case]


def write(family: str, form: str, blocks: Sequence[BlockShape], out: Path) -> Written:
    language_model = tiny_language_model(family)
    dense = sum(parameter.numel() for parameter in language_model.model.parameters())
    shape = shape_of(type(language_model.model).__name__, find_units(language_model), blocks)
    cut, chosen = cut_model(language_model, blocks, form=form)
    logits = cut.model(input_ids=WINDOWS).logits
    folder = write_checkpoint(cut, out, recipe={}, report={}, cut=Cut(chosen, dense, shape))
    return Written(folder, logits, sum(parameter.numel() for parameter in cut.model.parameters()))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], Written]:
    """By family, form and case."""
    place = tmp_path_factory.mktemp("forms")
    found = {}
    for family in FAMILIES:
        widths = find_units(tiny_language_model(family))[0].widths
        for form, case in WRITTEN:
            out = place / f"{family}-{form}-{case.replace(' ', '_')}"
            found[family, form, case] = write(family, form, blocks_of(case, widths), out)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_again_it_says_the_same(family: str, written: dict[tuple[str, str, str], Written]) -> None:
    masked = written[family, "masked", "uneven"].logits
    for form, case in WRITTEN:
        one = written[family, form, case]
        again = load_model(str(one.folder))
        assert torch.allclose(again.model(input_ids=WINDOWS).logits, one.logits, atol=1e-5), form
        assert sum(parameter.numel() for parameter in again.model.parameters()) == one.parameters
        assert type(again.model).__module__.startswith("transformers.")
        assert again.cut == (form == "compact")
        if case == "uneven":
            assert torch.allclose(one.logits, masked, atol=1e-5), form


def test_other_programs_load_the_same(written: dict[tuple[str, str, str], Written], tmp_path: Path) -> None:
    """In a fresh process, by plain transformers; the compact form by the module beside it, and by nothing else."""
    for one in written.values():
        save_file({"tokens": WINDOWS, "logits": one.logits.contiguous()}, f"{one.folder}.expected")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", OTHERS, *(str(one.folder) for one in written.values())],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for (family, form, case), one in written.items():
        facts = found[str(one.folder)]
        assert facts["difference"] < 1e-5, (family, form, case)
        assert facts["cache"], (family, form, case)
        assert facts["class"].startswith("Compact") == (form == "compact")
        assert len(facts["refused"]) == (2 if form == "compact" else 0), (family, form, case, facts)


def test_what_lies_in_the_folder(written: dict[tuple[str, str, str], Written]) -> None:
    compact = written["llama", "compact", "uneven"]
    names = {path.name for path in compact.folder.iterdir()}
    assert "modeling_evoprune_llama.py" in names
    config = json.loads((compact.folder / "config.json").read_text())
    assert config["per_layer_config"]["0"] == {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": len(FEW),
        "skip": [],
    }
    card = (compact.folder / "README.md").read_text()
    assert f"| parameters | 31,968 | {compact.parameters:,} | {compact.parameters / 31968:.3f} |" in card
    assert "trust_remote_code=True" in card
    for form, case in WRITTEN[2:]:
        one = written["llama", form, case]
        assert not list(one.folder.glob("*.py"))
        assert "trust_remote_code" not in (one.folder / "README.md").read_text()
    assert "Zeros alone bring no speed" in (written["llama", "masked", "uneven"].folder / "README.md").read_text()


def test_no_code_in_the_folder_is_run(tmp_path: Path) -> None:
    widths = find_units(tiny_language_model())[0].widths
    one = write("llama", "compact", cases(widths)["uneven"], tmp_path / "out")
    (one.folder / "modeling_evoprune_llama.py").write_text("raise SystemExit('run')")
    for trust in (False, True):
        assert load_model(str(one.folder), trust_remote_code=trust).cut


@pytest.mark.parametrize(
    ("family", "heads_per_group", "neurons", "form"),
    [("llama", 1, MANY, "plain"), ("qwen3", 1, MANY, "plain"), ("phi3", 1, MANY, "plain"), ("gpt2", 1, MANY, "plain")],
)
def test_one_width_in_all_blocks_is_plain(
    family: str, heads_per_group: int, neurons: Sequence[int], form: str, tmp_path: Path
) -> None:
    """Fewer query heads in each group, or fewer groups, and the width of a head stays."""
    widths = find_units(tiny_language_model(family))[0].widths
    groups = range(widths.groups) if family == "gpt2" else [1]
    blocks = [some(widths, groups, heads_per_group, neurons), some(widths, groups, heads_per_group, neurons)]
    one = write(family, "auto", blocks, tmp_path / "out")
    config = json.loads((one.folder / "config.json").read_text())
    assert "per_layer_config" not in config
    again = load_model(str(one.folder))
    assert torch.allclose(again.model(input_ids=WINDOWS).logits, one.logits, atol=1e-5)
    assert not (again.cut or list(one.folder.glob("*.py")))
    if family != "gpt2":
        assert config["head_dim"] == 8


def test_widths_that_the_class_cannot_have() -> None:
    """GPT-2 divides its hidden size by the heads; Llama wants the heads to divide it: both are padded to more."""
    for family, groups in (("gpt2", (0, 1, 2)), ("llama", (0,))):
        language_model = tiny_language_model(family, **({"num_attention_heads": 8} if family == "llama" else {}))
        widths = find_units(language_model)[0].widths
        shape = some(widths, groups, 3, MANY)
        with pytest.raises(
            InvalidInput, match=r"--form plain cannot hold this shape: .* give compact, padded or masked"
        ):
            cut_model(language_model, [shape, shape], form="plain")
        expected = cut_model(language_model, [shape, shape], form="masked")[0].model(input_ids=WINDOWS).logits
        again = tiny_language_model(family, **({"num_attention_heads": 8} if family == "llama" else {}))
        padded, _ = cut_model(again, [shape, shape], form="padded")
        assert padded.model.config.num_attention_heads == 4
        assert torch.allclose(padded.model(input_ids=WINDOWS).logits, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("uneven", "its blocks differ: some keep 2 query heads in 1 KV groups and 15 neurons, some 2 query heads in 2"),
        ("no mlp", "its blocks differ"),
    ],
)
def test_plain_where_the_shape_does_not_allow_it(case: str, told: str) -> None:
    language_model = tiny_language_model()
    before = dict(language_model.model.named_parameters())
    with pytest.raises(InvalidInput, match=f"--form plain cannot hold this shape: {told}.*; give compact, padded or"):
        cut_model(language_model, cases(find_units(language_model)[0].widths)[case], form="plain")
    assert all(before[name] is value for name, value in language_model.model.named_parameters())


def test_a_block_number_that_scales_attention() -> None:
    """Without the first block the second would get the scale of the first."""
    language_model = tiny_language_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    blocks = cases(find_units(language_model)[0].widths)["first block gone"]
    with pytest.raises(InvalidInput, match="GPT2LMHeadModel cannot have"):
        cut_model(language_model, [blocks[0], find_units(language_model)[1].widths.whole], form="plain")


def test_nothing_stays() -> None:
    nothing = BlockShape(NONE, NONE, NONE)
    for form in ("plain", "padded"):
        with pytest.raises(InvalidInput, match="no block stays"):
            cut_model(tiny_language_model(), [nothing, nothing], form=form)


def test_layers_keep_their_kind_of_attention(tmp_path: Path) -> None:
    """Gemma 2 alternates a sliding window and full attention; without the first block the second is still full."""
    language_model = tiny_language_model("gemma2", sliding_window=4)
    blocks = cases(find_units(language_model)[0].widths)["first block gone"]
    kinds = language_model.model.config.layer_types
    expected = cut_model(tiny_language_model("gemma2", sliding_window=4), blocks, form="masked")[0]
    plain, form = cut_model(language_model, blocks)
    assert (form, plain.model.config.layer_types) == ("plain", kinds[1:])
    out = write_checkpoint(plain, tmp_path / "out", recipe={}, report={})
    logits = load_model(str(out)).model(input_ids=WINDOWS).logits
    assert torch.allclose(logits, expected.model(input_ids=WINDOWS).logits, atol=1e-5)


@pytest.mark.parametrize("form", ["compact", "padded"])
def test_half_precision_and_tied_weights(form: str, tmp_path: Path) -> None:
    dense = save_tiny(tmp_path / "dense", tie_word_embeddings=True)
    language_model = load_model(str(dense), dtype="bfloat16")
    blocks = cases(find_units(language_model)[0].widths)["uneven"]
    out = write_checkpoint(cut_model(language_model, blocks, form=form)[0], tmp_path / "out", recipe={}, report={})
    again = load_model(str(out), dtype="bfloat16").model
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight
    assert torch.equal(again(input_ids=WINDOWS).logits, language_model.model(input_ids=WINDOWS).logits)


def damaged(folder: Path, change: Any) -> str:
    """What is said of a compact folder whose config.json was changed."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidInput) as error:
        load_model(str(folder))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_damaged_compact_folders(tmp_path: Path) -> None:
    widths = find_units(tiny_language_model())[0].widths
    for index, (change, told) in enumerate(
        [
            (lambda config: config.pop("per_layer_config"), "does not name the 2 blocks"),
            (lambda config: config["per_layer_config"].pop("1"), "does not name the 2 blocks"),
            (lambda config: config["per_layer_config"]["0"].pop("intermediate_size"), "does not say"),
            (lambda config: config["per_layer_config"]["0"].update(intermediate_size=1 << 40), "does not say"),
            (lambda config: config["per_layer_config"]["0"].update(intermediate_size=49), "block 0 keeps neurons"),
            (lambda config: config["per_layer_config"]["0"].update(num_key_value_heads=3), "block 0 keeps KV groups"),
            (lambda config: config["per_layer_config"]["0"].update(num_attention_heads=1), "another shape"),
            (lambda config: config["per_layer_config"]["0"].update(intermediate_size=14), "has another shape"),
        ]
    ):
        one = write("llama", "compact", cases(widths)["uneven"], tmp_path / str(index))
        assert told in damaged(one.folder, change), told


def test_no_such_form() -> None:
    with pytest.raises(UnknownName, match="no form 'plane'; did you mean 'plain'"):
        form_of(tiny_language_model(), [], [], "plane")


def test_a_cut_model_is_not_cut_again(tmp_path: Path) -> None:
    widths = find_units(tiny_language_model())[0].widths
    cut = load_model(str(write("llama", "compact", cases(widths)["no mlp"], tmp_path / "out").folder))
    with pytest.raises(InvalidInput, match="is cut already: give the dense model"):
        cut_model(cut, [widths.whole, widths.whole])


def test_a_model_that_reads_images(tmp_path: Path) -> None:
    """Its language model is cut, its tower stays; the compact form knows text only."""
    tokens = random_windows(2, 12)
    folder = save_llava(tmp_path / "llava")
    units = find_units(load_model(str(folder)))
    for form, case in (("padded", "uneven"), ("plain", "last block gone")):
        blocks = cases(units[0].widths)[case]
        expected = cut_model(load_model(str(folder)), blocks, form="masked")[0].model(input_ids=tokens).logits
        cut, _ = cut_model(load_model(str(folder)), blocks, form=form)
        out = write_checkpoint(cut, tmp_path / form, recipe={}, report={})
        assert torch.allclose(load_model(str(out)).model(input_ids=tokens).logits, expected, atol=1e-5), form
    with pytest.raises(InvalidInput, match="has no compact form, since it reads more than text"):
        cut_model(load_model(str(folder)), cases(units[0].widths)["uneven"])


@pytest.mark.parametrize(("form", "case"), [*WRITTEN, ("padded", "last block gone")])
def test_what_runs_is_as_large_as_what_is_written(form: str, case: str) -> None:
    """Whose time is taken before the model is cut has the matrices of the checkpoint."""
    model = tiny_language_model("llama")
    units = find_units(model)
    blocks = blocks_of(case, units[0].widths)
    chosen = form_of(model, units, blocks, form)
    surgeon = Surgeon(model, units)
    surgeon.apply(running_shapes(model, units, blocks, chosen))
    running = sum(parameter.numel() for parameter in model.model.parameters())
    surgeon.restore()
    cut, _ = cut_model(model, blocks, form=form)
    assert running == sum(parameter.numel() for parameter in cut.model.parameters())
