"""How long the parts of a model take: seconds of this machine, so no part of what a seed fixes.

Every part is run by itself on what it is given in a forward pass. All parts and the whole model take turns, so that a
machine that is slow for a while is so for all of them, and of the turns the median counts.
Source: layerwise sparsity allocation, section 5.8; what is chosen is measured end to end, section 3.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

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
    whole = _whole(language_model, window)
    modules = [_modules(language_model, places) for places in parts]
    calls = _recorded(whole, [module for some in modules for module in some])
    runs: list[Callable[[], Any]] = [whole, *(partial(_all, [calls[module] for module in some]) for some in modules)]
    total, *found = median_times([_readily(run) for run in runs], language_model.device)
    return max(total - sum(found), 0), found


@torch.no_grad()
def whole_latencies(language_model: LanguageModel, absent: Sequence[Sequence[Sequence[int]]], window: int) -> list[int]:
    """Nanoseconds of a forward pass over one window, end to end, where some parts do nothing.

    Args:
        language_model: run as it is otherwise, without compiling it.
        absent: for each measurement the parts that do nothing, each as the places of its sites.
        window: tokens.

    A part that does nothing gives zeros at once; norms before it still run.
    """
    whole = _whole(language_model, window)
    gone = [[module for places in parts for module in _modules(language_model, places)] for parts in absent]
    nothing = zero_outputs(whole, [module for some in gone for module in some])

    def run(some: Sequence[nn.Module]) -> None:
        with doing_nothing({module: nothing[module] for module in some}):
            whole()

    return median_times([_readily(partial(run, some)) for some in gone], language_model.device)


def _whole(language_model: LanguageModel, window: int) -> Callable[[], Any]:
    """What runs the whole model on a window of tokens."""
    model = language_model.model
    vocabulary = model.get_input_embeddings().get_parameter("weight").shape[0]
    tokens = torch.arange(window, device=language_model.device).remainder(vocabulary)[None]
    return partial(model, input_ids=tokens, use_cache=False)


def median_times(
    ready: Sequence[Callable[[], Callable[[], Any]]], device: torch.device, *, seconds: float = math.inf
) -> list[int]:
    """Nanoseconds of each, over turns that all take.

    Args:
        ready: each makes ready what it takes, in its own time, and returns what is timed.
        device: where it runs.
        seconds: after which no other turn begins; two are taken, and the first of those warms up.
    """
    taken: list[list[int]] = [[] for _ in ready]
    began = time.perf_counter()
    for turn in range(WARM_UP + TURNS):
        if turn > 1 and time.perf_counter() - began > seconds:
            break
        for make_ready, times in zip(ready, taken, strict=True):
            times.append(_timed(make_ready(), device))
    taken = [times[min(WARM_UP, len(times) - 1) :] for times in taken]
    return [int(median(times)) for times in taken]


def _readily(run: Callable[[], Any]) -> Callable[[], Callable[[], Any]]:
    """What needs nothing made ready."""
    return lambda: run


def zero_outputs(whole: Callable[[], Any], modules: Sequence[nn.Module]) -> dict[nn.Module, Any]:
    """For each module zeros in the place of what one run of the whole makes it give; they take no memory."""
    found: dict[nn.Module, Any] = {}

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        zeros = first.new_zeros(()).expand(first.shape)
        found[module] = (zeros, *(None for _ in output[1:])) if isinstance(output, tuple) else zeros

    handles = [module.register_forward_hook(note) for module in set(modules)]
    try:
        whole()
    finally:
        for handle in handles:
            handle.remove()
    return found


@contextmanager
def doing_nothing(outputs: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Inside, these modules give what is said at once."""

    def give(output: Any, *args: Any, **kwargs: Any) -> Any:
        return output

    for module, output in outputs.items():
        module.forward = partial(give, output)
    try:
        yield
    finally:
        for module in outputs:
            del module.forward


def _modules(language_model: LanguageModel, places: Sequence[int]) -> list[nn.Module]:
    """The module that all sites at these places are in, or their own where that is the block itself."""
    bound = [language_model.sites[at] for at in places]
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
    """Nanoseconds until the device has done it; of the only thread of a CPU, those that it was at work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    # What else the machine does would take turns with long runs and not with short ones, whose sum would be too small.
    clock = time.thread_time_ns if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter_ns
    began = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - began
