"""Llama 1 to 3 and the many models that reuse its code."""

from evoprune.fitness.adapters.base import ADAPTERS, AttentionLayout, MlpLayout, ModelAdapter

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

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATED = ("mlp.gate_proj", "mlp.up_proj")

LLAMA_LIKE = ModelAdapter(
    blocks="model.layers",
    kinds=LLAMA_KINDS,
    attention=AttentionLayout("self_attn", _QKV, "self_attn.o_proj", ("input_layernorm",)),
    mlp=MlpLayout("mlp", _GATED, "mlp.down_proj", ("post_attention_layernorm",)),
)
SANDWICHED = ModelAdapter(
    blocks="model.layers",
    kinds=LLAMA_KINDS,
    attention=AttentionLayout("self_attn", _QKV, "self_attn.o_proj", ("input_layernorm", "post_attention_layernorm")),
    mlp=MlpLayout("mlp", _GATED, "mlp.down_proj", ("pre_feedforward_layernorm", "post_feedforward_layernorm")),
)
"""The same with norms before and behind each part, as Gemma 2 and 3 have them."""

ADAPTERS.add("llama", LLAMA_LIKE)
