"""How long the parts of a model take: seconds of this machine, so no part of what a seed fixes.

Every part is run by itself on what it is given in a forward pass. All parts and the whole model take turns, so that a
machine that is slow for a while is so for all of them, and of the turns the median counts.
Source: layerwise sparsity allocation, section 5.8.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

from evoprune.fitness.adapters import SiteModule
from evoprune.fitness.models import LanguageModel

WARM_UP, TURNS = 3, 20


@torch.no_grad()
def part_latencies(language_model: LanguageModel, parts: Sequence[Sequence[int]], window: int) -> tuple[int, list[int]]:
    """Nanoseconds of a forward pass over one window: of what is in no part, and of every part.

    Args:
        language_model: run as it is, without compiling it.
        parts: places of the sites of each part, all of one block.
        window: tokens.

    Returns:
        The rest (embeddings, norms, head and what else there is; 0 if the parts alone take longer than the whole), and
        the parts in their order. A part whose matrices have a module of their own is that module, with attention and
        activations; where they lie directly in the block it is the sum of its matrices.
    """
    model = language_model.model
    vocabulary = model.get_input_embeddings().get_parameter("weight").shape[0]
    tokens = torch.arange(window, device=language_model.device).remainder(vocabulary)[None]
    whole = partial(model, input_ids=tokens, use_cache=False)
    modules = [_modules(language_model, [language_model.sites[at] for at in places]) for places in parts]
    calls = _recorded(whole, [module for some in modules for module in some])
    runs: list[Callable[[], Any]] = [whole, *(partial(_all, [calls[module] for module in some]) for some in modules)]
    taken: list[list[int]] = [[] for _ in runs]
    for turn in range(WARM_UP + TURNS):
        for run, times in zip(runs, taken, strict=True):
            nanoseconds = _timed(run, language_model.device)
            if turn >= WARM_UP:
                times.append(nanoseconds)
    total, *found = (int(median(times)) for times in taken)
    return max(total - sum(found), 0), found


def _modules(language_model: LanguageModel, bound: Sequence[SiteModule]) -> list[nn.Module]:
    """The module that all of these sites are in, or their own where that is the block itself."""
    paths = [one.site.name.split(".") for one in bound]
    shared = []
    for names in zip(*paths, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    if len(bound) == 1:
        shared = shared[:-1]
    parent = ".".join(shared)
    inside = any(parent.startswith(f"{path}.") for path, _ in language_model.blocks())
    return [language_model.model.get_submodule(parent)] if inside else [one.module for one in bound]


def _recorded(whole: Callable[[], Any], modules: Sequence[nn.Module]) -> dict[nn.Module, Callable[[], Any]]:
    """Each module with what one run of the whole gives it."""
    calls: dict[nn.Module, Callable[[], Any]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(module, partial(module, *args, **kwargs))

    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    try:
        whole()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _all(calls: Sequence[Callable[[], Any]]) -> None:
    for call in calls:
        call()


def _timed(run: Callable[[], Any], device: torch.device) -> int:
    """Nanoseconds until the device has done it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter_ns()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter_ns() - began
