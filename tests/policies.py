"""Mask policies of tiny models for tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from evoprune.fitness.mask_units import Mask, UnitTable, unit_table
from evoprune.fitness.maskers import Masker
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.policy_file import LearnedPolicy


def random_mask(table: UnitTable, seed: int = 0) -> Mask:
    """Exactly so many units of every choice; where nothing is chosen, about half of all."""
    draws = np.random.default_rng(seed).random(table.n)
    if table.strata is None:
        return draws < 0.5
    labels, keep = table.strata
    draws = draws.reshape(int(labels[-1]) + 1, -1)
    mask = np.zeros_like(draws, dtype=bool)
    np.put_along_axis(mask, np.argsort(draws, axis=1)[:, :keep], True, axis=1)
    return mask.reshape(-1)


def policy_of(language_model: LanguageModel, masker: Masker, mask: Mask | None = None, **changes: Any) -> LearnedPolicy:
    """A policy that keeps what `mask` says, or anything."""
    table = unit_table(language_model, masker)
    given: dict[str, Any] = {
        "model": type(language_model.model).__name__,
        "fingerprint": language_model.fingerprint,
        "table": table,
        "mask": random_mask(table) if mask is None else mask,
        "probabilities": np.random.default_rng(1).random(table.n),
        "calibration": None,
        "target": {"sparsity": 0.5},
        "origin": {"run": "policy-1"},
    }
    return LearnedPolicy(**(given | changes))
