"""Qwen2 and Qwen2.5; the biases of q, k and v are never pruned."""

from evoprune.fitness.adapters.base import ADAPTERS
from evoprune.fitness.adapters.llama import LLAMA_LIKE

ADAPTERS.add("qwen2", LLAMA_LIKE)
