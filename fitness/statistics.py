"""The statistics that metrics read: collected once per model, text and settings, then shared by every process."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from evoprune.fitness.cache import cache_folder, disk_errors
from evoprune.fitness.heap import freed_tensors_released
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.samples import Samples, Sequences
from evoprune.fitness.statistics_gradient import loss_scale
from evoprune.fitness.statistics_passes import PassSettings, Progress, run_passes
from evoprune.fitness.statistics_reader import Statistics
from evoprune.fitness.statistics_store import (
    DEFINITION_VERSION,
    FORMAT_VERSION,
    SetWriter,
    new_folder,
    site_facts,
    stored_names,
)
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.files import content_hash

__all__ = ["PassSettings", "Statistics", "collect_statistics", "statistics_for"]

MANY_ZEROS = 0.01
logger = logging.getLogger(__name__)


def statistics_for(
    language_model: LanguageModel,
    windows: Sequences,
    names: Iterable[str],
    *,
    cache: Path | None = None,
    settings: PassSettings | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """The statistics `names` of `language_model` on `windows`: from the cache, or collected now and kept there.

    A cached set serves if it was made from the same model, text and settings and holds at least `names`.

    Args:
        language_model: the dense model.
        windows: int64 [n, window], text A; or samples of images and text.
        names: terminals that need data, ``H`` for the full Gram matrix; terminals that need none are passed over.
        cache: root of the cache; the user's by default.
        settings: how the passes run.
        provenance: where the text came from, for the manifest: JSON values.
        progress: called with (done, total) in sequences over all passes; not called on a hit.

    Raises:
        InvalidInput: unknown names, unusable windows, or a cached set that is damaged.
    """
    stored = stored_names(names)
    settings = (settings or PassSettings()).resolved(language_model, _longest(windows))
    place = (cache or cache_folder()) / "statistics"
    key = statistics_key(language_model, windows, settings)
    for folder in sorted(place.glob(f"{key}-*")):
        held = Statistics.open(folder, fingerprint=language_model.fingerprint)
        if stored <= held.names:
            held.verify()
            return held
    folder = place / f"{key}-{content_hash(sorted(stored))[:8]}"
    return collect_statistics(
        language_model, windows, stored, folder=folder, settings=settings, provenance=provenance, progress=progress
    )


def statistics_key(language_model: LanguageModel, windows: Sequences, settings: PassSettings | None = None) -> str:
    """Names what statistics are made from, whichever of them; arguments as in `statistics_for`."""
    settings = (settings or PassSettings()).resolved(language_model, _longest(windows))
    return content_hash(_identity(language_model, windows, settings))[:32]


def collect_statistics(
    language_model: LanguageModel,
    windows: Sequences,
    names: Iterable[str],
    *,
    folder: Path,
    settings: PassSettings | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """Run the model over `windows` and write the statistics as the new set `folder`.

    Arguments as in `statistics_for`. Sums that would need more memory than the model itself, such as three gradient
    terminals of a large one, are collected for a group of decoder blocks at a time, in as many passes.

    Raises:
        InvalidInput: unknown names, unusable windows, `folder` is something else, or the disk is full or read-only.
        EvopruneError: a statistic is not finite or cannot be defined for this architecture.
    """
    stored = stored_names(names)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InvalidInput(f"{folder} is not empty: give a new folder for the statistics")
    settings = (settings or PassSettings()).resolved(language_model, _longest(windows))
    facts = _identity(language_model, windows, settings) | {
        "model": language_model.name,
        "names": sorted(stored),
        "tokens": windows.tokens if isinstance(windows, Samples) else windows.numel(),
        "loss_scale": loss_scale(language_model.model.dtype),
        "provenance": dict(provenance or {}),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    with disk_errors(folder), new_folder(folder) as partial, freed_tensors_released():
        writer = SetWriter(partial)
        leaders, rows = run_passes(language_model, windows, stored, settings, writer, progress)
        writer.finish(site_facts((bound.site for bound in language_model.sites), leaders), facts | {"rows": rows})
    found = Statistics.open(folder, fingerprint=language_model.fingerprint)
    _warn_of_zeros(found.manifest["zero_fractions"])
    return found


def text_facts(windows: Sequences) -> dict[str, Any]:
    """What a manifest says of the text, as JSON values: a hash of its tokens, how many sequences, and the longest.

    Raises:
        InvalidInput: these are no windows.
    """
    return {"windows": _text_hash(windows), "sequences": len(windows), "window": _longest(windows)}


def _longest(windows: Sequences) -> int:
    """Tokens of the longest sequence.

    Raises:
        InvalidInput: these are no windows.
    """
    if isinstance(windows, Samples):
        return windows.longest
    if windows.dim() != 2 or windows.dtype != torch.int64 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise InvalidInput(
            f"calibration windows are {windows.dtype} {list(windows.shape)}: give int64 [sequences, at least 2 tokens]"
        )
    return windows.shape[1]


def _text_hash(windows: Sequences) -> str:
    if isinstance(windows, Samples):
        return windows.digest()
    return hashlib.sha256(windows.cpu().contiguous().numpy().tobytes()).hexdigest()


def _identity(language_model: LanguageModel, windows: Sequences, settings: PassSettings) -> dict[str, Any]:
    """All that decides a statistic's bits, but for library versions."""
    model = language_model.model
    return text_facts(windows) | {
        "format": FORMAT_VERSION,
        "definitions": DEFINITION_VERSION,
        "fingerprint": language_model.fingerprint,
        "components": list(language_model.components or ()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": str(getattr(model.config, "_attn_implementation", None)),
        "device": model.device.type,
        "threads": torch.get_num_threads(),
        "settings": asdict(settings),
    }


def _warn_of_zeros(fractions: Mapping[str, float]) -> None:
    """Say where gradients are exactly zero: scores made of them tie."""
    many = {key: zeros for key, zeros in fractions.items() if zeros > MANY_ZEROS}
    if many:
        worst = max(many, key=lambda key: many[key])
        logger.warning(
            "%d of %d gradient statistics hold more than 1 %% zeros (worst: %s, %.1f %%): their scores will tie",
            *(len(many), len(fractions), worst, 100 * many[worst]),
        )
