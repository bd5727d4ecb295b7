"""Tiny random models, one per family, and a byte-level tokenizer: built in code, so that no test needs a download."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from evoprune.fitness.adapters import list_sites
from evoprune.fitness.models import LanguageModel

SEPARATOR = "<|endoftext|>"
VOCABULARY = 257  # the separator and every byte
HIDDEN, INNER, LAYERS = 32, 48, 2

_COMMON: dict[str, object] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}

# What each family adds to, or has instead of, the common settings; its own defaults would give a large model.
FAMILIES: dict[str, dict[str, object]] = {
    "llama": _COMMON,
    "mistral": _COMMON | {"sliding_window": None},
    "qwen2": _COMMON,
    "qwen3": _COMMON | {"head_dim": 8},
    "gemma": _COMMON | {"head_dim": 8},
    "gemma2": _COMMON | {"head_dim": 8},
    "gemma3_text": _COMMON | {"head_dim": 8},
    "phi": _COMMON,
    "phi3": _COMMON,
    "opt": {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "word_embed_proj_dim": HIDDEN,
        "ffn_dim": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
    },
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": HIDDEN,
        "n_inner": INNER,
        "n_layer": LAYERS,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
}


def tiny_model(family: str = "llama", *, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random float32 model of two blocks in eval mode; `changes` go to its config."""
    config = AutoConfig.for_model(family, **(FAMILIES.get(family, _COMMON) | changes))
    config.dtype = torch.float32
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        # The usual small initial weights give a nearly uniform distribution, which pruning would hardly move.
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, behind one separator that is both BOS and EOS."""
    vocabulary = {SEPARATOR: 0}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=SEPARATOR, eos_token=SEPARATOR)


def tiny_language_model(family: str = "llama", *, seed: int = 0, **changes: object) -> LanguageModel:
    """`tiny_model` as `load_model` would hand it over, without a folder."""
    model = tiny_model(family, seed=seed, **changes)
    return LanguageModel(
        model=model,
        tokenizer=tiny_tokenizer(),
        sites=tuple(list_sites(model)),
        name=f"tiny-{family}",
        fingerprint=f"tiny-{family}-{seed}-{sorted(changes.items())}",
    )


def save_tiny(folder: Path, family: str = "llama", *, seed: int = 0, **changes: object) -> Path:
    """Save `tiny_model` and its tokenizer to `folder`, which `load_model` can read; returns `folder`."""
    tiny_model(family, seed=seed, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def random_windows(n: int = 4, window: int = 16, *, seed: int = 0) -> torch.Tensor:
    """[n, window] int64 token ids."""
    return torch.randint(1, VOCABULARY, (n, window), generator=torch.Generator().manual_seed(seed))
