"""Mistral 7B and its successors without experts."""

from evoprune.fitness.adapters.base import ADAPTERS
from evoprune.fitness.adapters.llama import LLAMA_LIKE

ADAPTERS.add("mistral", LLAMA_LIKE)
