"""What every function on a model begins with: loading it, choosing windows of text, collecting statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from evoprune.fitness.models import LanguageModel, load_model
from evoprune.fitness.statistics import Statistics, statistics_for
from evoprune.fitness.text import token_windows
from evoprune.search.config_metric import DEFAULT_STATISTICS
from evoprune.search.config_sections import DataConfig

Progress = Callable[[str, int, int], None]
"""Told what runs, how much of it is done and how much there is."""

# The same text as in a search, so that numbers can be compared.
TEXT = DataConfig()


def silent(what: str, done: int, total: int) -> None:
    """Shows nothing."""


def collect_statistics(
    model: str | LanguageModel = "reference",
    names: Iterable[str] = DEFAULT_STATISTICS,
    *,
    calibration: str = "corpus",
    calibration_sequences: int = TEXT.calibration_sequences,
    calibration_window: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
    **loading: Any,
) -> Statistics:
    """The statistics that metrics read, collected on text A and kept in the cache for the next time.

    Args:
        model: `reference`, a folder, a Hub id, or a loaded model.
        names: statistics such as ``X_l2`` or ``G_l2``; ``H`` is the full Gram matrix of a layer's inputs.
        calibration: `corpus`, a file, a folder, or a data set; its side A is read.
        calibration_sequences: windows of text.
        calibration_window: tokens in each; None takes 256, or the model's context if that is shorter.
        seed: draws the windows.
        progress: told how far it is, in sequences over all passes; not called if the cache has them.
        loading: further arguments of `load_model`, where `model` is a name.

    Returns:
        A set with `tensor(site name, statistic)`, and the `folder` where it is.

    Raises:
        InvalidInput: no such model, text or statistic, or too little text.
    """
    language_model = loaded(model, loading)
    window = default_window(language_model, calibration_window)
    windows = token_windows(
        language_model.tokenizer, calibration, "A", window=window, count=calibration_sequences, seed=seed
    )
    wanted = sorted(names)
    what = f"{', '.join(wanted)} on {len(windows)} × {window} tokens"
    provenance = {"source": calibration, "side": "A", "seed": seed}
    return statistics_for(
        language_model,
        windows,
        wanted,
        provenance=provenance,
        progress=lambda done, total: progress(f"collecting {what}", done, total),
    )


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
