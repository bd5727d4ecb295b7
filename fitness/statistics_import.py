"""Gradient files of GBLM-Pruner and Pruner-Zero, made into a set of statistics."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from evoprune.fitness.models import LanguageModel
from evoprune.fitness.statistics_reader import Statistics
from evoprune.fitness.statistics_store import SetWriter, encode, new_folder, site_facts
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.files import file_hash

# Both projects multiply each gradient by this before they square or sum it.
GRADIENT_SCALE = 100


def import_gradients(path: Path, language_model: LanguageModel, folder: Path, *, name: str = "G_l2") -> Statistics:
    """Read a ``.pth`` dictionary ``<part of the block>_layer_<block>`` -> float16 gradient, without unpickling objects.

    Args:
        path: the file, such as ``gradients_aggregrate_norm_l2_model_llama-2-7b-hf_128_0.pth``.
        language_model: the model that it was computed from.
        folder: the new set to write; must not exist.
        name: what the file holds: ``G_l2`` or ``G_l1``.

    Raises:
        InvalidInput: the file is no such dictionary, or not of this model.
    """
    if name not in ("G_l2", "G_l1"):
        raise InvalidInput(f"gradient files hold G_l2 or G_l1, not {name[:40]!r}")
    if folder.exists():
        raise InvalidInput(f"{folder} exists: give a new folder for the imported statistics")
    gradients = _load(path)
    sites = [bound.site for bound in language_model.sites]
    with new_folder(folder) as partial:
        writer = SetWriter(partial)
        for block in sorted({site.block for site in sites}):
            encoded: dict[str, Tensor] = {}
            for site in sites:
                if site.block == block:
                    key = f"{site.kind}_layer_{block}"
                    value = gradients.get(key)
                    if not isinstance(value, Tensor) or value.shape != (site.out_features, site.in_features):
                        raise InvalidInput(
                            f"{path} holds no {key!r} of shape {[site.out_features, site.in_features]}: "
                            f"it is not of {language_model.name!r}"
                        )
                    if not bool(value.isfinite().all()):
                        raise InvalidInput(f"{path}: {key!r} is not finite: its float16 values overflowed")
                    encoded |= encode(f"{site.name}::{name}", value.float() / GRADIENT_SCALE)
            writer.add(block, encoded)
        facts = {
            "model": language_model.name,
            "fingerprint": language_model.fingerprint,
            "names": [name],
            "sequences": 0,
            "tokens": 0,
            "windows": None,
            "settings": {},
            "rows": {},
            "provenance": {"imported": path.name, "sha256": file_hash(path)},
        }
        writer.finish(site_facts(sites), facts)
    return Statistics.open(folder, fingerprint=language_model.fingerprint)


def _load(path: Path) -> dict[str, object]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a file of unknown origin fails in as many ways as torch has readers
        raise InvalidInput(f"{path} is no file of gradient tensors ({type(error).__name__})") from None
    if not isinstance(found, dict):
        raise InvalidInput(f"{path} holds a {type(found).__name__}, not a dictionary of gradients")
    return found
