"""What every function on a model begins with: loading it, choosing windows of text, collecting statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from evoprune.fitness.amia import TokenChoice
from evoprune.fitness.examples import read_side
from evoprune.fitness.models import LanguageModel, load_model
from evoprune.fitness.samples import Samples, Sequences
from evoprune.fitness.statistics import PassSettings, Statistics, statistics_for
from evoprune.metrics.errors import InvalidInput
from evoprune.search.config_metric import DEFAULT_STATISTICS
from evoprune.search.config_sections import DataConfig

Progress = Callable[[str, int, int], None]
"""Told what runs, how much of it is done and how much there is."""

# The same text as in a search, so that numbers can be compared.
TEXT = DataConfig()
HELD_OUT_TOKENS = (TEXT.heldout_windows or 256) * TEXT.window

ALL_TOKENS, AMIA = "all", "amia"


def held_out_windows(
    language_model: LanguageModel, source: str, window: int | None = None, tokens: int | None = None
) -> Sequences:
    """Windows of text C.

    Args:
        window: as of `default_window`.
        tokens: how many of text; None takes as many as a search's report reads, or all there are.

    Raises:
        InvalidInput: fewer tokens than a window has; see also `read_side`.
    """
    width = default_window(language_model, window)
    count = None if tokens is None else tokens // width
    if count == 0:
        raise InvalidInput(f"{tokens} tokens do not fill one window of {width}: give more tokens or a shorter window")
    windows = read_side(language_model, source, "C", window=width, count=count)
    return windows[: max(HELD_OUT_TOKENS // width, 1)] if tokens is None else windows


def silent(what: str, done: int, total: int) -> None:
    """Shows nothing."""


def collect_statistics(
    model: str | LanguageModel = "reference",
    names: Iterable[str] = DEFAULT_STATISTICS,
    *,
    calibration: str = "corpus",
    calibration_sequences: int = TEXT.calibration_sequences,
    calibration_window: int | None = None,
    tokens: str | TokenChoice = ALL_TOKENS,
    seed: int = 0,
    progress: Progress = silent,
    **loading: Any,
) -> Statistics:
    """The statistics that metrics read, collected on text A and kept in the cache for the next time.

    Args:
        model: `reference`, a folder, a Hub id, or a loaded model.
        names: statistics such as ``X_l2`` or ``G_l2``; ``H`` is the full Gram matrix of a layer's inputs.
        calibration: `corpus`, a file, a folder, or a data set; its side A is read. For a model that reads images also
            a ``.jsonl`` of ``{"image": path, "text": ...}`` or a folder of images with texts, as in
            `evoprune.fitness.examples`.
        calibration_sequences: windows of text, or examples at most.
        calibration_window: tokens in each; None takes 256, or the model's context if that is shorter.
        tokens: ``all``, or ``amia`` for the few tokens of each sequence that attention chooses (TAMP), which
            statistics of layer inputs and outputs are then of; a `TokenChoice` says how.
        seed: draws the windows.
        progress: told how far it is, in sequences over all passes; not called if the cache has them.
        loading: further arguments of `load_model`, where `model` is a name.

    Returns:
        A set with `tensor(site name, statistic)`, and the `folder` where it is.

    Raises:
        InvalidInput: no such model, text or statistic, or too little text.
    """
    settings = PassSettings(tokens=token_choice(tokens))
    language_model = loaded(model, loading)
    window = default_window(language_model, calibration_window)
    windows = calibration_windows(language_model, calibration, calibration_sequences, window, seed)
    wanted = sorted(names)
    shown = f"{windows.sequences} examples" if isinstance(windows, Samples) else f"{len(windows)} × {window} tokens"
    what = f"{', '.join(wanted)} on {shown}"
    provenance = {"source": calibration, "side": "A", "seed": seed}
    return statistics_for(
        language_model,
        windows,
        wanted,
        settings=settings,
        provenance=provenance,
        progress=lambda done, total: progress(f"collecting {what}", done, total),
    )


def calibration_windows(
    language_model: LanguageModel, calibration: str, sequences: int, window: int | None, seed: int
) -> Sequences:
    """Text A, or images with texts; arguments as in `collect_statistics`."""
    width = default_window(language_model, window)
    return read_side(language_model, calibration, "A", window=width, count=sequences, seed=seed)


def token_choice(tokens: str | TokenChoice) -> TokenChoice | None:
    """How tokens are chosen, from ``all`` or ``amia``; None is all of them.

    Raises:
        InvalidInput: it is neither.
    """
    if isinstance(tokens, TokenChoice):
        return tokens
    if tokens not in (ALL_TOKENS, AMIA):
        raise InvalidInput(f"no choice of tokens {tokens[:80]!r}; there are {ALL_TOKENS} and {AMIA}")
    return TokenChoice() if tokens == AMIA else None


def loaded(model: str | LanguageModel, loading: dict[str, Any], progress: Progress = silent) -> LanguageModel:
    """A loaded model as it is, one given by name loaded with these arguments of `load_model`."""
    if isinstance(model, LanguageModel):
        return model
    progress(f"loading {model}", 0, 1)
    language_model = load_model(model, **loading)
    progress(f"loading {model}", 1, 1)
    return language_model


def default_window(language_model: LanguageModel, window: int | None) -> int:
    """The window that was asked for, or the default that the model can read."""
    if window is not None:
        language_model.check_window(window)
        return window
    return min(TEXT.window, language_model.context or TEXT.window)
