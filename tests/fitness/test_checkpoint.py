"""A checkpoint is whole, checked and loadable by plain transformers, or it is not there."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evoprune.fitness import checkpoint
from evoprune.fitness.checkpoint import check_out_dir, write_checkpoint
from evoprune.fitness.models import LanguageModel, load_model
from evoprune.metrics.errors import EvopruneError, InvalidInput
from tests.models import FAMILIES, random_windows, save_tiny, tiny_language_model, tiny_model, tiny_tokenizer

HELD_OUT = {"loss": 2.5, "perplexity": 12.18, "kl": None, "stderr": 0.125, "tokens": 900}


def test_numbers_of_windows_of_different_lengths_are_not_one_table(tmp_path: Path) -> None:
    rows = {when: HELD_OUT | {"window": window, "dtype": "float32"} for when, window in (("before", 32), ("after", 64))}
    with pytest.raises(InvalidInput, match="numbers were measured at window 32 and 64: one table holds one"):
        write_checkpoint(tiny_language_model(), tmp_path / "out", recipe={}, report={"recovery": rows})
    assert not (tmp_path / "out").exists()


def prune_half(language_model: LanguageModel) -> dict[str, torch.Tensor]:
    """Zero random weights; the masks by site name."""
    generator = torch.Generator().manual_seed(0)
    masks = {}
    for bound in language_model.sites:
        weight = bound.weight()
        masks[bound.site.name] = torch.rand(weight.shape, generator=generator) < 0.5
        weight.masked_fill_(~masks[bound.site.name], 0)
    return masks


def write(language_model: LanguageModel, out: Path, **report: Any) -> Path:
    return write_checkpoint(language_model, out, recipe={"metric": "mul(abs(W),X_l2)", "sparsity": 0.5}, report=report)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_plain_transformers_loads_the_same_model(family: str, tmp_path: Path) -> None:
    pruned = load_model(str(save_tiny(tmp_path / "dense", family)))
    masks = prune_half(pruned)
    out = write(pruned, tmp_path / "out")
    assert leftovers(tmp_path) == ["dense", "out"]
    plain = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, attn_implementation="sdpa" if family != "gemma2" else "eager"
    )
    windows = random_windows()
    assert torch.equal(plain(windows).logits, pruned.model(windows).logits)
    assert AutoTokenizer.from_pretrained(out)("a b")["input_ids"] == pruned.tokenizer("a b")["input_ids"]
    for bound in load_model(str(out)).sites:
        assert torch.equal(bound.weight() != 0, masks[bound.site.name]), bound.site.name


def test_no_file_but_plain_ones(tmp_path: Path) -> None:
    out = write(tiny_language_model(), tmp_path / "out")
    assert {path.suffix for path in out.iterdir()} == {".json", ".safetensors", ".md"}
    assert "sparsity_config" not in json.loads((out / "config.json").read_text())


def test_half_precision_files_stay_half(tmp_path: Path) -> None:
    tiny_model().half().save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    pruned = load_model(str(tmp_path / "dense"))
    assert pruned.model.dtype == torch.float32
    prune_half(pruned)
    out = write(pruned, tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.float16
    size = (tmp_path / "dense" / "model.safetensors").stat().st_size
    assert (out / "model.safetensors").stat().st_size == size
    windows = random_windows()
    assert torch.equal(load_model(str(out)).model(windows).logits, pruned.model(windows).logits)


def test_weights_that_half_precision_would_change_keep_theirs(tmp_path: Path) -> None:
    tiny_model().half().save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    pruned = load_model(str(tmp_path / "dense"))
    pruned.sites[0].weight()[0, 0] = 1e-20  # would become a zero that no mask asked for
    out = write(pruned, tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.float32
    assert load_model(str(out)).sites[0].weight()[0, 0] == pruned.sites[0].weight()[0, 0]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tied_weights_stay_tied(family: str, tmp_path: Path) -> None:
    pruned = tiny_language_model(family, tie_word_embeddings=True)
    plain = AutoModelForCausalLM.from_pretrained(write(pruned, tmp_path / "out"))
    assert plain.get_input_embeddings().weight is plain.get_output_embeddings().weight


def test_record_and_card(tmp_path: Path) -> None:
    pruned = tiny_language_model()
    prune_half(pruned)
    out = write(pruned, tmp_path / "out", heldout={"dense": HELD_OUT, "pruned": HELD_OUT}, window=128, data="corpus")
    record = json.loads((out / "evoprune.json").read_text())
    assert record["recipe"]["metric"] == "mul(abs(W),X_l2)"
    assert record["report"]["heldout"]["dense"] == HELD_OUT
    assert record["fingerprint"] == pruned.fingerprint
    card = (out / "README.md").read_text()
    removed = sum(int((bound.weight() == 0).sum()) for bound in pruned.sites)
    assert f"{removed:,}" in card
    assert f"{(out / 'model.safetensors').stat().st_size:,} bytes" in card
    assert "| heldout pruned | 12.1800 | 2.5000 | 0.1250 | 900 |" in card
    assert "KL" not in card
    assert "- window: 128" in card
    assert "Zeros alone bring no speed" in card
    assert "AutoModelForCausalLM.from_pretrained" in card
    assert '"metric": "mul(abs(W),X_l2)"' in card


def test_a_card_explains_the_divergence_where_a_row_has_one(tmp_path: Path) -> None:
    rows = {"dense": HELD_OUT, "pruned": HELD_OUT | {"kl": 0.25}}
    card = (write(tiny_language_model(), tmp_path / "out", heldout=rows) / "README.md").read_text()
    assert "| heldout dense | 12.1800 | 2.5000 | 0.1250 | - | 900 |" in card
    assert "| heldout pruned | 12.1800 | 2.5000 | 0.1250 | 0.2500 | 900 |" in card
    assert "KL is from the dense to the pruned model" in card


def test_the_card_names_a_hub_model_and_hides_local_paths(tmp_path: Path) -> None:
    facts = vars(tiny_language_model())
    on_hub = write(LanguageModel(**facts | {"name": "someone/model"}), tmp_path / "a")
    assert "base_model: someone/model" in (on_hub / "README.md").read_text()
    local = write(LanguageModel(**facts | {"name": "/home/me/secret/model"}), tmp_path / "b")
    assert "secret" not in (local / "README.md").read_text() + (local / "evoprune.json").read_text()


def test_an_older_checkpoint_is_replaced(tmp_path: Path) -> None:
    out = write(tiny_language_model(seed=1), tmp_path / "out")
    before = (out / "model.safetensors").read_bytes()
    assert write(tiny_language_model(seed=2), out) == out
    assert (out / "model.safetensors").read_bytes() != before
    assert leftovers(tmp_path) == ["out"]


def test_missing_parents_and_empty_folders_are_fine(tmp_path: Path) -> None:
    assert write(tiny_language_model(), tmp_path / "a" / "b").is_dir()
    (tmp_path / "empty").mkdir()
    assert (write(tiny_language_model(), tmp_path / "empty") / "config.json").is_file()


def test_other_files_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(InvalidInput, match="give a new or empty folder"):
            write(tiny_language_model(), out)
    other = save_tiny(tmp_path / "other")
    with pytest.raises(InvalidInput, match="holds other files"):
        check_out_dir(other)
    (other / "evoprune.json").write_text('{"format": "something else"}')
    with pytest.raises(InvalidInput, match="holds other files"):
        check_out_dir(other)
    ours = write(tiny_language_model(), tmp_path / "ours")
    (ours / "folder").mkdir()
    with pytest.raises(InvalidInput, match="holds other files"):
        check_out_dir(ours)
    assert (tmp_path / "notes.txt").read_text() == "mine"


DISK_ERRORS = [
    OSError(errno.ENOSPC, "No space left on device"),
    PermissionError(errno.EACCES, "Permission denied"),
    Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", DISK_ERRORS, ids=["full", "denied", "full, says a library"])
@pytest.mark.parametrize("place", ["model", "tokenizer", "card", "rename"])
def test_a_disk_that_fails_leaves_nothing(
    place: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned = tiny_language_model()
    out = write(pruned, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fail(*_: Any, **__: Any) -> None:
        raise error

    target: Any
    target, name = {
        "model": (pruned.model, "save_pretrained"),
        "tokenizer": (pruned.tokenizer, "save_pretrained"),
        "card": (checkpoint, "write_atomically"),
        "rename": (Path, "rename"),
    }[place]
    monkeypatch.setattr(target, name, fail)
    with pytest.raises(InvalidInput, match=r"^cannot write .*out: (No space left on device|Permission denied)$"):
        write(pruned, out)
    monkeypatch.undo()
    assert leftovers(tmp_path) == ["out"]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.skipif(os.name != "posix", reason="needs a limit on file sizes")
def test_a_real_write_error(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    pruned = tiny_language_model()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(InvalidInput, match=r"^cannot write .*: File too large$"):
            write(pruned, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert leftovers(tmp_path) == []


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_check_reload", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(tiny_language_model(), tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_a_checkpoint_that_does_not_load_back_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pruned = tiny_language_model()
    save = pruned.model.save_pretrained

    def save_another(folder: Path, state_dict: dict[str, torch.Tensor]) -> None:
        name = f"{pruned.sites[3].site.name}.weight"
        save(folder, state_dict=state_dict | {name: state_dict[name] + 1e-3})

    monkeypatch.setattr(pruned.model, "save_pretrained", save_another)
    with pytest.raises(EvopruneError, match=r"o_proj\.weight differs after saving"):
        write(pruned, tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_silence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(tiny_language_model(), tmp_path / "out")
    assert capfd.readouterr() == ("", "")
