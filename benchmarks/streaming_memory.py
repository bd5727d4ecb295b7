"""Peak private memory of pruning a random 77 M-parameter Llama in float32 block by block, over what it was allowed.

Allowed is a quarter of the weights' bytes. Memory that is private to the process (USS) is sampled every 50 ms, and what
the process held after its imports is subtracted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from figure import Figure

BLOCKS = 24
_RUN = """
import json, sys, threading, time
import psutil, torch, transformers
import evoprune.streaming
torch.set_num_threads(1)
model, text, out, limit, compressor = sys.argv[1:]
process, seen, stop = psutil.Process(), [], threading.Event()
def sample():
    while not stop.is_set():
        seen.append((time.perf_counter(), process.memory_full_info().uss))
        time.sleep(0.05)
before = process.memory_full_info().uss
threading.Thread(target=sample, daemon=True).start()
began = time.perf_counter()
evoprune.streaming.prune_streamed(
    model, memory=int(limit), out=out, compressor=compressor, accumulation="path", calibration=text,
    calibration_sequences=4, calibration_window=64,
)
between = time.perf_counter()
found = evoprune.evaluate(out, data=text, window=32, tokens=512, memory=int(limit))
stop.set()
peaks = {
    "pruning": max(size for when, size in seen if when < between) - before,
    "evaluating": max(size for when, size in seen if when >= between) - before,
}
print(json.dumps({**peaks, "seconds": between - began, "loss": found.loss}))
"""


def measure() -> list[Figure]:
    with tempfile.TemporaryDirectory() as scratch:
        model, text = Path(scratch) / "model", Path(scratch) / "text.txt"
        weights = save_model(model)
        text.write_text("".join(f"line {number} holds {number * number % 97} of something\n" for number in range(1500)))
        found = run(model, text, Path(scratch) / "out", weights // 4, "mask")
    return [
        Figure(
            f"peak private memory of {what} block by block / what it was allowed, a quarter of the weights",
            found[what] / (weights // 4),
            1.0,
            True,
            {**found, "weights": weights},
        )
        for what in ("pruning", "evaluating")
    ]


def run(model: Path, text: Path, out: Path, limit: int, compressor: str) -> dict[str, float]:
    """Prune and evaluate in a process of its own; growth in bytes by name, seconds, and the loss."""
    done = subprocess.run(
        [sys.executable, "-c", _RUN, str(model), str(text), str(out), str(limit), compressor],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "EVOPRUNE_CACHE": str(out.parent / "cache")},
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def save_model(folder: Path) -> int:
    """A random Llama of many blocks with the reference model's tokenizer; returns the bytes of its weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from evoprune.fitness.models import load_model

    tokenizer = load_model("reference").tokenizer
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=BLOCKS,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(value.numel() * value.element_size() for value in model.parameters())
