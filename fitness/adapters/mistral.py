"""Mistral 7B and its successors without experts."""

from evoprune.fitness.adapters.base import ADAPTERS, ModelAdapter
from evoprune.fitness.adapters.llama import LLAMA_KINDS

ADAPTERS.add("mistral", ModelAdapter(blocks="model.layers", kinds=LLAMA_KINDS))
