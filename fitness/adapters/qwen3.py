"""Qwen3 without experts; the norms of q and k are never pruned."""

from evoprune.fitness.adapters.base import ADAPTERS, ModelAdapter
from evoprune.fitness.adapters.llama import LLAMA_KINDS

ADAPTERS.add("qwen3", ModelAdapter(blocks="model.layers", kinds=LLAMA_KINDS))
