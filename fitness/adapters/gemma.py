"""Gemma 1 to 3, text only: the three generations differ in norms and attention masks, not in linear layers."""

from evoprune.fitness.adapters.base import ADAPTERS
from evoprune.fitness.adapters.llama import LLAMA_LIKE, SANDWICHED

ADAPTERS.add("gemma", LLAMA_LIKE)
for generation in ("gemma2", "gemma3_text"):
    ADAPTERS.add(generation, SANDWICHED)
