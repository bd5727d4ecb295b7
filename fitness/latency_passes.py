"""Forward passes whose time is taken: prefill, or a token more behind a cache; of a cut model, or of one of its parts.

A cache grows with every pass, so each is given a copy of it, which is made before the time is taken.
Source: layerwise sparsity allocation, section 5.8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from evoprune.fitness.latency import median_times
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.surgeon import Surgeon
from evoprune.fitness.units import BlockUnits
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.shape import BlockShape

SEQUENCE = 2048
"""Tokens of a sequence where nobody says otherwise, if the model reads as many."""

Ready = Callable[[], Callable[[], Any]]
"""Makes ready what a pass takes, and returns the pass."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a forward pass is of.

    Attributes:
        batch: sequences.
        sequence: tokens of each.
        decode: it is of one more token of each, and these are in the cache.
    """

    batch: int = 1
    sequence: int = SEQUENCE
    decode: bool = False

    @classmethod
    def of(cls, language_model: LanguageModel, batch: int, sequence: int | None, *, decode: bool) -> Work:
        """Such a pass of this model; without `sequence` of `SEQUENCE` tokens, or of as many as it reads.

        Raises:
            InvalidInput: the model reads fewer, or batch or sequence is less than 1.
        """
        most = None if language_model.context is None else language_model.context - decode
        if sequence is None:
            sequence = SEQUENCE if most is None else min(SEQUENCE, most)
        if batch < 1 or sequence < 1:
            raise InvalidInput(f"a pass of {batch} sequences of {sequence} tokens: give at least 1 of each")
        if most is not None and sequence > most:
            behind = " before the next" if decode else ""
            raise InvalidInput(
                f"a sequence of {sequence} tokens is too long: model {language_model.name!r} reads at most {most}"
                f"{behind}, so give that or less"
            )
        return cls(batch, sequence, decode)

    @property
    def words(self) -> str:
        """For people."""
        what = "a token behind" if self.decode else "prefill of"
        return f"{what} {self.batch} x {self.sequence:,} tokens"

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values: the arguments of the class."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Call:
    """What a module was given in a forward pass; of its cache a copy from before it."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def on(self, module: nn.Module, cache: Cache | None = None) -> Callable[[], Any]:
        """The same of this module, with a copy of its cache, or of another one in the place of that."""
        source = self.cache if cache is None else cache
        return self.onto(module, deepcopy(source))

    def onto(self, module: nn.Module, cache: Cache | None) -> Callable[[], Any]:
        """The same of this module, with this very cache, which grows, in the place of its own."""

        def given(value: Any) -> Any:
            return cache if isinstance(value, Cache) else value

        return partial(module, *map(given, self.args), **{name: given(value) for name, value in self.kwargs.items()})

    @property
    def cache(self) -> Cache | None:
        """That it was given."""
        return next((value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Cache)), None)


@torch.no_grad()
def whole_pass(language_model: LanguageModel, work: Work) -> Ready:
    """A pass of the whole model as it is now; a cache is filled at once."""
    model = language_model.model
    if not work.decode:
        return lambda: partial(model, input_ids=_tokens(language_model, work), use_cache=False)
    cache = model(input_ids=_tokens(language_model, work), use_cache=True).past_key_values
    following = _tokens(language_model, work)[:, -1:]
    return lambda: partial(model, input_ids=following, past_key_values=deepcopy(cache), use_cache=True)


@torch.no_grad()
def recorded(language_model: LanguageModel, modules: Sequence[nn.Module], work: Work) -> dict[nn.Module, list[Call]]:
    """What modules of the model are given in such a pass; before it, for decoding, what they are given in prefill."""
    calls: dict[nn.Module, list[Call]] = {module: [] for module in modules}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        copied = (deepcopy(value) if isinstance(value, Cache) else value for value in args)
        named = {name: deepcopy(value) if isinstance(value, Cache) else value for name, value in kwargs.items()}
        calls[module].append(Call(tuple(copied), named))

    with _noted(modules, note):
        whole_pass(language_model, work)()()
    return calls


@torch.no_grad()
def shape_latencies(
    language_model: LanguageModel,
    units: Sequence[BlockUnits],
    shapes: Sequence[Sequence[BlockShape]],
    work: Work,
    *,
    seconds: float = math.inf,
) -> list[int]:
    """Nanoseconds of a pass, end to end, of the model cut to each of these shapes; they take turns.

    Args:
        language_model: dense, and dense again at the end.
        units: of all its blocks.
        shapes: what every block keeps; its weights stay as they are, for times do not depend on them.
        work: what the pass is of.
        seconds: see `median_times`.

    Raises:
        InvalidInput: a shape that the model cannot have.
    """
    surgeon = Surgeon(language_model, units)
    try:
        passes = shape_passes(surgeon, language_model, shapes, work)
        return median_times(passes, language_model.device, seconds=seconds)
    finally:
        surgeon.restore()


def shape_passes(
    surgeon: Surgeon, language_model: LanguageModel, shapes: Sequence[Sequence[BlockShape]], work: Work
) -> list[Ready]:
    """A pass of the model cut to each of these shapes, which is done before every time it is taken."""

    def ready(shape: Sequence[BlockShape], once: Ready) -> Callable[[], Any]:
        surgeon.apply(shape)
        # The pages of the new weights are touched before the time is taken.
        once()()
        return once()

    passes: list[Ready] = []
    for shape in shapes:
        surgeon.apply(shape)
        passes.append(partial(ready, shape, whole_pass(language_model, work)))
    return passes


def _tokens(language_model: LanguageModel, work: Work) -> Tensor:
    """[batch, sequence] int64, whatever they are."""
    vocabulary = language_model.model.get_input_embeddings().get_parameter("weight").shape[0]
    tokens = torch.arange(work.sequence, device=language_model.device).remainder(vocabulary)
    return tokens.expand(work.batch, -1)


@contextmanager
def _noted(
    modules: Sequence[nn.Module], note: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]
) -> Iterator[None]:
    """Inside, `note` hears what these modules are given."""
    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
