"""Loading: what comes back, what is refused and in which words, and that nothing is printed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from evoprune.fitness import hub
from evoprune.fitness.cache import cache_folder
from evoprune.fitness.models import load_model
from evoprune.metrics.errors import InvalidInput
from tests.models import FAMILIES, random_windows, save_tiny, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A folder that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def refusal(name: str | Path, **options: Any) -> str:
    """The one line that `load_model` refuses with."""
    with pytest.raises(InvalidInput) as caught:
        load_model(str(name), **options)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_loads_silently(family: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_tiny(tmp_path, family)
    capfd.readouterr()
    loaded = load_model(str(tmp_path))
    assert capfd.readouterr() == ("", "")
    windows = random_windows()
    assert torch.equal(loaded.model(windows).logits, tiny_model(family)(windows).logits)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.model.dtype == torch.float32
    assert loaded.context == 64
    assert loaded.name == str(tmp_path)
    assert len(loaded.sites) == len(loaded.blocks()) * len({bound.site.kind for bound in loaded.sites})


def test_windows_beyond_the_positions_are_refused(saved: Path) -> None:
    loaded = load_model(str(saved))
    loaded.check_window(64)
    with pytest.raises(InvalidInput, match="reads at most 64 tokens"):
        loaded.check_window(65)


def test_half_precision_files_compute_in_float32(tmp_path: Path) -> None:
    tiny_model().half().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert (loaded.model.dtype, loaded.stored_dtype) == (torch.float32, torch.float16)
    assert load_model(str(tmp_path), dtype="bfloat16").model.dtype == torch.bfloat16


def test_fingerprint_is_of_the_content(saved: Path, copy: Path) -> None:
    assert hub.fingerprint(saved) == hub.fingerprint(copy)
    tiny_model(seed=1).save_pretrained(copy)
    assert hub.fingerprint(saved) != hub.fingerprint(copy)


def test_sharded_weights(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path, max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    assert len(hub.weight_files(tmp_path)) > 1
    windows = random_windows()
    assert torch.equal(load_model(str(tmp_path)).model(windows).logits, tiny_model()(windows).logits)
    hub.weight_files(tmp_path)[1].unlink()
    assert "is missing" in refusal(tmp_path)


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model = load_model(str(save_tiny(tmp_path, "llama", tie_word_embeddings=True))).model
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c", "", "spaces are odd", "../x", "~/nowhere"])
def test_what_is_neither_folder_nor_hub_id(name: str) -> None:
    assert "neither a folder nor a Hub id" in refusal(name)


def test_a_file(saved: Path) -> None:
    assert "is a file" in refusal(saved / "config.json")


def test_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("Got: ConnectError")

    monkeypatch.setattr(hub, "snapshot_download", unreachable)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    assert "the Hub cannot be reached" in refusal("someone/some-model")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal("someone/some-model")


def test_a_hub_model_is_refused_before_its_weights_are_fetched(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def download(name: str, *, revision: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert (name, revision) == ("someone/some-model", "v2")
        assert not any("bin" in pattern or "pt" in pattern or "py" in pattern for pattern in allow_patterns)
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", download)
    folder = saved
    assert load_model("someone/some-model", revision="v2").name == "someone/some-model"
    assert ["*.safetensors" in patterns for patterns in asked] == [False, True]
    asked.clear()
    folder = save_tiny(tmp_path, "mixtral", num_local_experts=2)
    assert "mixture-of-experts" in refusal("someone/some-model", revision="v2")
    assert ["*.safetensors" in patterns for patterns in asked] == [False]


def test_no_config(tmp_path: Path) -> None:
    assert "has no config.json" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000])
def test_a_damaged_config(copy: Path, text: str) -> None:
    (copy / "config.json").write_text(text)
    assert "config.json is damaged" in refusal(copy)


def test_a_config_with_a_wrong_value(copy: Path) -> None:
    (copy / "config.json").write_text('{"model_type": "llama", "hidden_size": "x"}')
    assert "config.json cannot be read: Validation error for field 'hidden_size'" in refusal(copy)


@pytest.mark.parametrize("family", ["nonesuch", 3, None, ["llama"]])
def test_a_family_unknown_to_transformers(copy: Path, family: object) -> None:
    (copy / "config.json").write_text(json.dumps({"model_type": family}))
    assert "knows no model family" in refusal(copy)


def test_a_model_that_is_no_language_model(copy: Path) -> None:
    (copy / "config.json").write_text(json.dumps({"model_type": "vit"}))
    assert "is no causal language model" in refusal(copy)


@pytest.mark.parametrize("family", ["mixtral", "mamba"])
def test_an_unsupported_family(tmp_path: Path, family: str) -> None:
    changes = {"num_local_experts": 2} if family == "mixtral" else {}
    assert "not supported" in refusal(save_tiny(tmp_path, family, **changes))


def test_pickle_only_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "pickle" in refusal(copy)
    assert "save_pretrained" in refusal(copy)


def test_no_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    assert "has no model.safetensors" in refusal(copy)


@pytest.mark.parametrize("damage", [b"", b"\xff" * 64, None])
def test_corrupt_weights(copy: Path, damage: bytes | None) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100] if damage is None else damage)
    assert "cannot be read" in refusal(copy)


@pytest.mark.parametrize("index", ["", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../model.safetensors"}}'])
def test_a_damaged_index(copy: Path, index: str) -> None:
    (copy / "model.safetensors").rename(copy.parent / "model.safetensors")
    (copy / "model.safetensors.index.json").write_text(index)
    assert "damaged" in refusal(copy) or "is missing" in refusal(copy)


def test_missing_tensors(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert "incomplete: 9 are missing, such as model.layers.2" in refusal(copy)


def test_weights_of_other_shapes(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    assert "do not fit its config.json: model.layers.0.mlp.down_proj.weight has another shape" in refusal(copy)


def test_no_tokenizer(copy: Path) -> None:
    for file in copy.glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer" in refusal(copy)


def test_a_damaged_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{}")
    assert "tokenizer" in refusal(copy)


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    assert "do not belong together" in refusal(save_tiny(tmp_path, "llama", vocab_size=64))


def test_a_quantised_model(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (copy / "config.json").write_text(json.dumps(config))
    assert "quantised" in refusal(copy)


def test_remote_code_is_not_run(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (copy / "config.json").write_text(
        json.dumps({"model_type": "homemade", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}})
    )
    (copy / "code.py").write_text("print('ran')")
    assert "--trust-remote-code" in refusal(copy)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "", "cpu:x"])
def test_devices(saved: Path, device: str) -> None:
    assert "no device" in refusal(saved, device=device)


def test_dtypes(saved: Path) -> None:
    assert "give auto, float32, bfloat16, float16" in refusal(saved, dtype="int8")


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EVOPRUNE_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    monkeypatch.delenv("EVOPRUNE_CACHE")
    assert cache_folder().name == "evoprune"
