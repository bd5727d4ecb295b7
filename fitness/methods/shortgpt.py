"""ShortGPT: the blocks that change the hidden states least go as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from evoprune.fitness.hidden_states import block_influence
from evoprune.fitness.methods import METHODS, Evidence, ModelEdit, check_protected, least_influential, without


@dataclass(frozen=True)
class ShortGpt:
    """Drop the blocks of least influence, the mean over tokens of 1 - cos(input, output), all at once.

    Attributes:
        protect_first, protect_last: so many blocks at either end stay.
    """

    protect_first: int = 0
    protect_last: int = 0

    source: ClassVar[str] = "Men et al. 2024, ShortGPT, arXiv:2403.03853"

    def __post_init__(self) -> None:
        check_protected(self.protect_first, self.protect_last)

    def edit(self, evidence: Evidence) -> ModelEdit:
        going = evidence.blocks_to_go()
        influence = block_influence(evidence.language_model, evidence.windows)
        gone = least_influential(influence, going, self.protect_first, self.protect_last)
        evidence.progress(1, 1)
        return ModelEdit(without(evidence, gone), found={"dropped": gone, "influence": influence})


METHODS.add("shortgpt", ShortGpt())
