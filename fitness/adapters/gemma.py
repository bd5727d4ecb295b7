"""Gemma 1 to 3, text only: the three generations differ in norms and attention masks, not in linear layers."""

from evoprune.fitness.adapters.base import ADAPTERS, ModelAdapter
from evoprune.fitness.adapters.llama import LLAMA_KINDS

for generation in ("gemma", "gemma2", "gemma3_text"):
    ADAPTERS.add(generation, ModelAdapter(blocks="model.layers", kinds=LLAMA_KINDS))
