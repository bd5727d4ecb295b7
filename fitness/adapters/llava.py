"""LLaVA and LLaVA-NeXT: any vision tower, a projector, any language model; the newline embedding stays dense."""

from evoprune.fitness.adapters.multimodal import MULTIMODAL, PROJECTOR, VISION, Component, MultimodalAdapter
from evoprune.metrics.records import LANGUAGE

for family in ("llava", "llava_next"):
    MULTIMODAL.add(
        family,
        MultimodalAdapter(
            components=(
                Component(VISION, "model.vision_tower"),
                Component(PROJECTOR, "model.multi_modal_projector", ("linear_1", "linear_2")),
                Component(LANGUAGE, "model.language_model"),
            )
        ),
    )
