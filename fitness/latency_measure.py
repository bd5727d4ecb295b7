"""Measuring tables of latencies.

Every part is cut and run by itself on what it is given in a pass of the dense model, with the norms that go with it;
the rest is the model without any part, run as a whole. All of them take turns, so that a machine that is slow for a
while is so for all, and of the turns the median counts.
Source: Kurtic et al. 2023 (ZipLM, arXiv:2302.04089); layerwise sparsity allocation, sections 3.1 and 5.8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from evoprune.fitness.cache import cache_folder, disk_errors
from evoprune.fitness.dropped import DroppedAttention, DroppedMlp
from evoprune.fitness.latency import doing_nothing, median_times, zero_outputs
from evoprune.fitness.latency_passes import Call, Ready, Work, recorded, shape_passes
from evoprune.fitness.latency_table import LatencyTable, place_of, read_table, write_table
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.surgeon import Surgeon
from evoprune.fitness.unit_costs import CostTable, UnitCosts
from evoprune.fitness.units import BlockUnits
from evoprune.metrics.files import content_hash
from evoprune.metrics.shape import BlockShape


def latency_table(
    language_model: LanguageModel, units: Sequence[BlockUnits], neurons: Sequence[Sequence[int]], work: Work
) -> LatencyTable:
    """The table of this model on this machine: from the cache, or measured and put there.

    Args:
        language_model, units, neurons, work: see `measure_table`.

    Raises:
        InvalidInput: see `measure_table`; or the cache's disk is full or read-only.
    """
    place = place_of(language_model, work)
    path = cache_folder() / "latency" / f"{content_hash([place, [list(widths) for widths in neurons]])[:32]}.json"
    if path.exists():
        return read_table(path)
    table = measure_table(language_model, units, neurons, work)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_table(table, path)
    return table


def measure_table(
    language_model: LanguageModel, units: Sequence[BlockUnits], neurons: Sequence[Sequence[int]], work: Work
) -> LatencyTable:
    """Measure the parts of a model; arguments and errors as of `measure_beside`."""
    return measure_beside(language_model, units, neurons, work, [])[0]


@torch.no_grad()
def measure_beside(
    language_model: LanguageModel,
    units: Sequence[BlockUnits],
    neurons: Sequence[Sequence[int]],
    work: Work,
    shapes: Sequence[Sequence[BlockShape]],
) -> tuple[LatencyTable, list[int]]:
    """Measure the parts of a model, and whole shapes of it in the same turns; blocks that are alike are measured once.

    Beside the model there are copies of the parts at all widths in memory: about 16 MLPs for 32 numbers of neurons.

    Args:
        language_model: dense, and dense again at the end.
        units: of all its blocks.
        neurons: for each block the numbers of neurons to measure, without that of the dense MLP; attentions are
            measured at all numbers of KV groups and of query heads in each.
        work: what the pass is of.
        shapes: what every block keeps, and none of them drops a part.

    Returns:
        The table, and nanoseconds of each shape end to end.

    Raises:
        InvalidInput: a block cannot keep so many neurons.
    """
    alike: dict[Any, list[int]] = {}
    for at, block in enumerate(units):
        alike.setdefault((*_kind(language_model.model, block), *neurons[at]), []).append(at)
    first = {places[0]: places for places in alike.values()}
    paths = {at: _paths(units[at]) for at in first}
    modules = {path: language_model.model.get_submodule(path) for some in paths.values() for path in some}
    calls = recorded(language_model, list(modules.values()), work)
    given = {path: calls[module] for path, module in modules.items()}
    surgeon = Surgeon(language_model, units)
    runs: dict[tuple[int, str, tuple[int, ...]], Ready] = {}
    whole = [block.widths.whole for block in units]
    try:
        for at in first:
            block, widths = units[at], units[at].widths
            for groups in range(1, widths.groups + 1):
                for each in range(1, widths.heads_per_group + 1):
                    surgeon.apply([*whole[:at], widths.first(groups, each, widths.neurons), *whole[at + 1 :]])
                    runs[at, "attention", (groups, each)] = _attention(language_model.model, block, given)
            for width in sorted({*neurons[at], widths.neurons}):
                kept = widths.first(widths.groups, widths.heads_per_group, width)
                surgeon.apply([*whole[:at], kept, *whole[at + 1 :]])
                runs[at, "mlp", (width,)] = _mlp(language_model.model, block, given)
            runs[at, "norms", ()] = _in_turn([(modules[path], given[path]) for path in block.norms])
        wholes = shape_passes(surgeon, language_model, [*shapes, [BlockShape((), (), ())] * len(units)], work)
        bare = wholes.pop()
        with doing_nothing(zero_outputs(lambda: bare()(), _dropped(language_model.model))):
            rest, *found = median_times([bare, *runs.values(), *wholes], language_model.device)
    finally:
        surgeon.restore()
    times = dict(zip(runs, found, strict=False))

    def table(at: int, part: str) -> CostTable:
        return CostTable(tuple((kept, cost) for (here, of, kept), cost in times.items() if (here, of) == (at, part)))

    attentions, mlps = ({at: table(at, part) for at in first} for part in ("attention", "mlp"))
    kinds = {at: representative for representative, places in first.items() for at in places}
    # Norms that attention and MLP share stay as long as one of them does, which is nearly always.
    rest += sum(times[kinds[at], "norms", ()] for at in range(len(units)) if units[at].norms)
    order = range(len(units))
    costs = UnitCosts(
        "latency",
        rest,
        tuple(block.widths for block in units),
        tuple(attentions[kinds[at]] for at in order),
        tuple(mlps[kinds[at]] for at in order),
    )
    return LatencyTable(place_of(language_model, work), costs), found[len(runs) :]


def _kind(model: nn.Module, block: BlockUnits) -> tuple[Any, ...]:
    """What makes blocks take the same time."""
    attention = model.get_submodule(block.attention.name)
    sizes = (block.attention.head_dim, block.attention.output.site.out_features)
    return type(attention), getattr(attention, "sliding_window", None), block.widths, sizes


def _paths(block: BlockUnits) -> list[str]:
    """Modules of a block whose time is taken."""
    return [
        block.attention.name,
        *_norms_of(block, "attention"),
        *_norms_of(block, "mlp"),
        *block.norms,
        *_inside(block),
    ]


def _norms_of(block: BlockUnits, part: str) -> list[str]:
    """Norms that go with a part and lie outside it."""
    units = block.attention if part == "attention" else block.mlp
    return [path for path in units.norms if units.name == block.name or not path.startswith(f"{units.name}.")]


def _inside(block: BlockUnits) -> list[str]:
    """The MLP, or its matrices where these lie in the block itself."""
    mlp = block.mlp
    return [mlp.name] if mlp.name != block.name else [bound.site.name for bound in (*mlp.inputs, mlp.output)]


def _attention(model: nn.Module, block: BlockUnits, given: Mapping[str, list[Call]]) -> Ready:
    """The attention as it is now, with its norms."""
    name = block.attention.name
    module, calls = deepcopy(model.get_submodule(name)), given[name]
    norms = [(model.get_submodule(path), given[path]) for path in _norms_of(block, "attention")]
    cache = deepcopy(calls[0].cache)
    if cache is not None:
        # Prefill leaves the keys and values of the heads that stay.
        calls[0].onto(module, cache)()
    return _in_turn([*norms, (module, calls)], cache)


def _mlp(model: nn.Module, block: BlockUnits, given: Mapping[str, list[Call]]) -> Ready:
    """The MLP as it is now, with its norms."""
    norms = [(model.get_submodule(path), given[path]) for path in _norms_of(block, "mlp")]
    paths = _inside(block)
    modules = [deepcopy(model.get_submodule(path)) for path in paths]
    if len(paths) == 1:
        return _in_turn([*norms, (modules[0], given[paths[0]])])
    # Between matrices that lie in the block there is no module to run, so the activation counts as nothing.
    read, write = modules
    inner = given[paths[0]][-1].on(read)()
    return _in_turn([*norms, (read, given[paths[0]]), (write, [Call((inner,), {})])])


def _in_turn(modules: Sequence[tuple[nn.Module, list[Call]]], cache: Cache | None = None) -> Ready:
    """The last pass of each module, one after the other."""

    def ready() -> Callable[[], Any]:
        first, timed = ([calls[-1].on(module, cache) for module, calls in modules] for _ in range(2))
        # As in a whole model, where the last block has just run the same code.
        for run in first:
            run()
        return lambda: [run() for run in timed]

    return ready


def _dropped(model: nn.Module) -> list[nn.Module]:
    """What stands where parts were dropped: it fills caches and makes zeros, which is no work of the rest."""
    return [module for module in model.modules() if isinstance(module, (DroppedAttention, DroppedMlp))]
