"""Qwen2 and Qwen2.5; the biases of q, k and v are never pruned."""

from evoprune.fitness.adapters.base import ADAPTERS, ModelAdapter
from evoprune.fitness.adapters.llama import LLAMA_KINDS

ADAPTERS.add("qwen2", ModelAdapter(blocks="model.layers", kinds=LLAMA_KINDS))
