"""Qwen3 without experts; the norms of q and k are never pruned."""

from evoprune.fitness.adapters.base import ADAPTERS
from evoprune.fitness.adapters.llama import LLAMA_LIKE

ADAPTERS.add("qwen3", LLAMA_LIKE)
