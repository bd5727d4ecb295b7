"""OPT. `project_in` and `project_out` of OPT-350m lie outside the blocks and stay dense."""

from evoprune.fitness.adapters.base import ADAPTERS, AttentionLayout, MlpLayout, ModelAdapter

ADAPTERS.add(
    "opt",
    ModelAdapter(
        blocks="model.decoder.layers",
        kinds=(
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.out_proj",
            "fc1",
            "fc2",
        ),
        attention=AttentionLayout(
            "self_attn",
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "self_attn.out_proj",
            ("self_attn_layer_norm",),
        ),
        mlp=MlpLayout("", ("fc1",), "fc2", ("final_layer_norm",), "ffn_dim"),
    ),
)
