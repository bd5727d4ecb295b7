"""Which workers compute alike: the numerics class of one, and a canary whose bits it must reproduce.

Sums of floats depend on the processor, the libraries and the threads, and an evolved search depends on every bit. So
a search holds its workers to one class; the canary catches what the class does not name.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import transformers

from evoprune.fitness.models import LanguageModel
from evoprune.fitness.teacher import linear_head, window_losses
from evoprune.metrics.mask import mask
from evoprune.metrics.records import MaskRule

WINDOWS, TOKENS = 2, 64


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Inside, torch computes with so many threads on a CPU; None changes nothing."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def numerics(language_model: LanguageModel) -> dict[str, Any]:
    """What a worker reports of itself.

    Returns:
        ``class`` (name by name), ``processor``, ``loss`` (of the canary) and ``bits`` (a hash of all of the canary's
        values). Processors of other names may compute alike, but not as fast.
    """
    losses = _canary(language_model)
    return {
        "class": numerics_class(language_model),
        "processor": processor_name(),
        "loss": losses.mean().item(),
        "bits": sha256(losses.numpy().tobytes()).hexdigest()[:16],
    }


def numerics_class(language_model: LanguageModel) -> dict[str, Any]:
    """What decides how this model computes here, name by name, as JSON values."""
    device = language_model.device
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else torch.backends.cpu.get_cpu_capability()
    return {
        "device": f"{device.type} {name}" if on_gpu else f"cpu {platform.machine()} {name}",
        "dtype": str(language_model.model.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        "transformers": transformers.__version__,
        "threads": None if on_gpu else torch.get_num_threads(),
        "attention": str(getattr(language_model.model.config, "_attn_implementation", None)),
        "tf32": torch.get_float32_matmul_precision() if on_gpu else None,
        "model": language_model.fingerprint[:16],
    }


def processor_name() -> str:
    """The name of the processor, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


@torch.no_grad()
def _canary(language_model: LanguageModel) -> torch.Tensor:
    """[4] float64 losses on fixed tokens: of the model, and of it with half of its last block cut by magnitude."""
    model = language_model.model
    width = min(TOKENS, language_model.context or TOKENS)
    vocabulary = model.get_input_embeddings().get_parameter("weight").shape[0]
    windows = (torch.arange(WINDOWS * width) * 7919 + 13).remainder(vocabulary).view(WINDOWS, width)
    head = linear_head(model, windows)
    dense = window_losses(model, head, windows, None).nll
    last = [bound for bound in language_model.sites if bound.site.block == language_model.sites[-1].site.block]
    kept = [bound.weight().clone() for bound in last]
    try:
        for bound in last:
            keep = mask(bound.weight().float().abs(), MaskRule(0.5, None, "row"))
            bound.weight().masked_fill_(~keep.to(bound.weight().device), 0)
        pruned = window_losses(model, head, windows, None).nll
    finally:
        for bound, weight in zip(last, kept, strict=True):
            bound.weight().copy_(weight)
    return torch.cat([dense, pruned]).double().cpu()
