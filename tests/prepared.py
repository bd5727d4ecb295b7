"""A prepared set of a tiny model, made by hand: what levels need of one, without a corpus or a search text."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from evoprune.fitness.models import LanguageModel
from evoprune.fitness.prepare import Prepared
from evoprune.fitness.statistics import collect_statistics, statistics_key
from tests.models import random_windows


def tiny_prepared(folder: Path, language_model: LanguageModel, *, seed: int = 9) -> Prepared:
    """Weights, input norms and Gram matrices of `language_model` in the new folder `folder`; `seed` draws text A."""
    folder.mkdir()
    calibration = random_windows(4, 16, seed=seed)
    collect_statistics(language_model, calibration, ("X_l2", "H"), folder=folder / "statistics")
    save_file(
        {bound.site.name: bound.weight().contiguous() for bound in language_model.sites}, folder / "dense.safetensors"
    )
    site_facts = [
        {name: getattr(bound.site, name) for name in type(bound.site).__slots__} for bound in language_model.sites
    ]
    identity = {
        "dtype": str(torch.float32),
        "statistics": [statistics_key(language_model, calibration), "X_ss"],
        "sparsity": 0.5,
    }
    return Prepared(folder, {"identity": identity, "fingerprint": language_model.fingerprint, "sites": site_facts})
