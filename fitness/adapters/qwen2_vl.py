"""Qwen2-VL and Qwen2.5-VL. Query, key and value of a vision block are one matrix; the projector merges four patches."""

from evoprune.fitness.adapters.llama import LLAMA_KINDS
from evoprune.fitness.adapters.multimodal import MULTIMODAL, PROJECTOR, VISION, Component, MultimodalAdapter
from evoprune.metrics.records import LANGUAGE

# The two differ in the MLP of a vision block.
for family, mlp in (
    ("qwen2_vl", ("mlp.fc1", "mlp.fc2")),
    ("qwen2_5_vl", ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")),
):
    MULTIMODAL.add(
        family,
        MultimodalAdapter(
            components=(
                Component(VISION, "model.visual.blocks", ("attn.qkv", "attn.proj", *mlp)),
                Component(PROJECTOR, "model.visual.merger", ("mlp.0", "mlp.2")),
                Component(LANGUAGE, "model.language_model.layers", LLAMA_KINDS),
            )
        ),
    )
