"""Llama 1 to 3 and the many models that reuse its code."""

from evoprune.fitness.adapters.base import ADAPTERS, ModelAdapter

# Mistral, Qwen and Gemma have other forward passes but the same layout of linear layers.
LLAMA_KINDS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)

ADAPTERS.add("llama", ModelAdapter(blocks="model.layers", kinds=LLAMA_KINDS))
