"""The training recipe of the embedded reference model, and of the second model that the benchmarks use.

    python benchmarks/train_model.py --family llama --out fitness/reference    # the shipped model
    python benchmarks/train_model.py --family gpt2 --steps 1500 --out benchmarks/out/gpt2    # 18 minutes on 2 cores

The text is the ``train`` side of the embedded corpus; loss on side C is watched, never trained on. The learning rate
warms up, stays, and decays over the last quarter. Interrupted runs continue from ``<out>/training.pt``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from evoprune.fitness.corpus import read_side

VOCABULARY = 4096
WINDOW = 256
SEPARATOR = "<|endoftext|>"


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the training side."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(read_side("train"), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SEPARATOR, eos_token=SEPARATOR, model_max_length=2 * WINDOW
    )


def build_model(family: str) -> PreTrainedModel:
    """A fresh model of about three million parameters."""
    if family == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=192,
                intermediate_size=512,
                num_hidden_layers=6,
                num_attention_heads=6,
                num_key_value_heads=3,
                max_position_embeddings=2 * WINDOW,
                tie_word_embeddings=True,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=2 * WINDOW,
            n_embd=192,
            n_layer=6,
            n_head=6,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def encode(tokenizer: PreTrainedTokenizerFast, side: str) -> torch.Tensor:
    """All documents of a side as one int64 stream, each document behind a separator."""
    ids: list[int] = []
    for document in read_side(side):
        ids.append(0)
        ids.extend(tokenizer(document, verbose=False)["input_ids"])
    return torch.tensor(ids)


@torch.no_grad()
def heldout_loss(model: PreTrainedModel, stream: torch.Tensor, windows: int) -> float:
    """Mean negative log-likelihood in nats over the first `windows` windows."""
    model.eval()
    batch = stream[: windows * WINDOW].view(windows, WINDOW)
    losses = [model(chunk, labels=chunk).loss.item() for chunk in batch.split(16)]
    model.train()
    return sum(losses) / len(losses)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up over 100 steps, plateau, linear decay to 2 % over the last quarter."""
    decay_from = steps * 3 // 4
    if step < 100:
        return peak * (step + 1) / 100
    if step < decay_from:
        return peak
    return peak * (1 - 0.98 * (step - decay_from) / (steps - decay_from))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("llama", "gpt2"), default="llama")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--peak", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)

    tokenizer = train_tokenizer()
    tokenizer.save_pretrained(options.out)
    train, heldout = encode(tokenizer, "train"), encode(tokenizer, "C")
    model = build_model(options.family)
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=options.peak,
        betas=(0.9, 0.95),
        fused=True,
    )
    print(
        json.dumps({"parameters": model.num_parameters(), "train_tokens": len(train), "heldout_tokens": len(heldout)})
    )

    first, busy = 0, 0.0
    state_file = options.out / "training.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        first, busy = state["step"], state["seconds"]
    for step in range(first, options.steps):
        began = time.perf_counter()
        rate = learning_rate(step, options.steps, options.peak)
        for group in optimiser.param_groups:
            group["lr"] = rate
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
        starts = torch.randint(len(train) - WINDOW, (options.batch,), generator=generator)
        batch = torch.stack([train[s : s + WINDOW] for s in starts.tolist()])
        loss = model(batch, labels=batch).loss
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        busy += time.perf_counter() - began
        if (step + 1) % 200 == 0 or step + 1 == options.steps:
            print(
                json.dumps(
                    {
                        "step": step + 1,
                        "tokens": (step + 1) * options.batch * WINDOW,
                        "train": round(loss.item(), 4),
                        "heldout": round(heldout_loss(model, heldout, 64), 4),
                        "rate": round(rate, 6),
                        "minutes": round(busy / 60, 1),
                    }
                ),
                flush=True,
            )
            partial = state_file.with_suffix(".part")
            torch.save(
                {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": step + 1, "seconds": busy},
                partial,
            )
            partial.replace(state_file)
    loss = heldout_loss(model, heldout, len(heldout) // WINDOW)
    model.half().save_pretrained(options.out)
    state_file.unlink(missing_ok=True)
    print(
        json.dumps({"heldout": round(loss, 4), "perplexity": round(math.exp(loss), 3), "minutes": round(busy / 60, 1)})
    )


if __name__ == "__main__":
    main()
