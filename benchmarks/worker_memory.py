"""(d) Peak private memory of a worker on a random 200 M-parameter Llama in float32, over the weights' bytes.

The worker loads the model, collects gradient statistics and evaluates a candidate that reads them; memory that is
private to its process (USS) is sampled every 20 ms, and what the process held before loading is subtracted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from figure import Figure

_WORKER = """
import json, os, sys, threading, time
import psutil, torch, transformers
from evoprune.fitness.context import EvaluationContext
from evoprune.fitness.worker import MetricWorker

process, peak, stop = psutil.Process(), [0], threading.Event()
def sample():
    while not stop.is_set():
        peak[0] = max(peak[0], process.memory_full_info().uss)
        time.sleep(0.02)
before = process.memory_full_info().uss
threading.Thread(target=sample, daemon=True).start()
context = EvaluationContext(
    model=sys.argv[1], data="corpus", window=128, rungs=(2,), heldout_windows=2, calibration_sequences=4,
    calibration_window=128, statistics=("X_l2", "G_l2"), threads=2,
)
worker = MetricWorker(context)
weights = sum(p.numel() * p.element_size() for p in worker.language_model.model.parameters())
prepared = worker.handle("prepare", {})["name"]
criterion = {"expression": ["mul", ["abs", "W"], ["mul", "X_l2", ["powc", "G_l2", {"e": 0.5}]]]}
worker.handle("evaluate", {"prepared": prepared, "criterion": criterion, "thresholds": [], "max_tied": None})
stop.set()
print(json.dumps({"before": before, "peak": peak[0], "weights": weights}))
"""


def measure() -> Figure:
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        _save_model(model)
        done = subprocess.run(
            [sys.executable, "-c", _WORKER, str(model)],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "EVOPRUNE_CACHE": str(Path(scratch) / "cache")},
        )
    measured = json.loads(done.stdout.splitlines()[-1])
    ratio = (measured["peak"] - measured["before"]) / measured["weights"]
    return Figure(
        "(d) peak private memory of a worker / bytes of its weights, 200 M parameters", ratio, 2.5, True, measured
    )


def _save_model(folder: Path) -> None:
    """A random Llama of about 200 M parameters with the reference model's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from evoprune.fitness.models import load_model

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    load_model("reference").tokenizer.save_pretrained(folder)
