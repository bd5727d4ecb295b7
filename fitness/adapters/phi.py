"""Phi 1 to 2, whose blocks run attention and MLP side by side, and Phi 3 to 4 with fused projections."""

from evoprune.fitness.adapters.base import ADAPTERS, AttentionLayout, MlpLayout, ModelAdapter

ADAPTERS.add(
    "phi",
    ModelAdapter(
        blocks="model.layers",
        kinds=(
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.dense",
            "mlp.fc1",
            "mlp.fc2",
        ),
        attention=AttentionLayout(
            "self_attn", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.dense"
        ),
        mlp=MlpLayout("mlp", ("mlp.fc1",), "mlp.fc2"),
        shared_norms=("input_layernorm",),
    ),
)

# Rows of qkv_proj are q, then k, then v; rows of gate_up_proj are gate, then up. Scores are compared within a row
# by default, so the fusion changes nothing.
ADAPTERS.add(
    "phi3",
    ModelAdapter(
        blocks="model.layers",
        kinds=("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
        attention=AttentionLayout("self_attn", ("self_attn.qkv_proj",), "self_attn.o_proj", ("input_layernorm",)),
        mlp=MlpLayout("mlp", ("mlp.gate_up_proj",), "mlp.down_proj", ("post_attention_layernorm",)),
    ),
)
