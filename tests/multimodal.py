"""Tiny random models that read images, their processors, and synthetic images: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from evoprune.fitness.adapters import list_sites
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.samples import Samples
from tests.models import VOCABULARY, tiny_tokenizer

FAMILIES = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl")
LAYERS, VISION_LAYERS = 2, 2
IMAGE = VOCABULARY
SPECIAL = ("<image>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")

_TEXT: dict[str, object] = {
    "vocab_size": VOCABULARY + len(SPECIAL),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": VISION_LAYERS,
    "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
}  # fmt: skip
_LLAVA: dict[str, object] = {
    "vision_config": _CLIP,
    "text_config": _TEXT | {"model_type": "llama"},
    "image_token_id": IMAGE,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
_IDS = {
    "image_token_id": IMAGE, "video_token_id": IMAGE + 1, "vision_start_token_id": IMAGE + 2,
    "vision_end_token_id": IMAGE + 3,
}  # fmt: skip
_PATCHES = {"num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "depth": VISION_LAYERS}
CONFIGS: dict[str, dict[str, object]] = {
    "llava": _LLAVA,
    "llava_next": _LLAVA | {"image_grid_pinpoints": [[28, 28], [28, 56], [56, 28], [56, 56]]},
    "qwen2_vl": {
        "text_config": _TEXT | _ROPE,
        "vision_config": _PATCHES | {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
        **_IDS,
    },
    "qwen2_5_vl": {
        "text_config": _TEXT | _ROPE,
        "vision_config": _PATCHES
        | {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "window_size": 56}
        | {"fullatt_block_indexes": [1]},
        **_IDS,
    },
}


def tiny_multimodal(family: str = "llava", *, seed: int = 0) -> PreTrainedModel:
    """A random float32 model in eval mode."""
    config = AutoConfig.for_model(family, **CONFIGS[family])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


def tiny_multimodal_model(family: str = "llava", *components: str) -> LanguageModel:
    """`tiny_multimodal` as `load_model` would hand it over, without a folder."""
    model = tiny_multimodal(family)
    chosen = components or None
    name = f"tiny-{family}"
    sites = tuple(list_sites(model, chosen))
    return LanguageModel(model, multimodal_tokenizer(), sites, name, f"{name}-{components}", components=chosen)


def multimodal_tokenizer() -> PreTrainedTokenizerFast:
    """`tiny_tokenizer` with the placeholders behind it."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(list(SPECIAL), special_tokens=True)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def save_llava(folder: Path) -> Path:
    """A tiny LLaVA with tokenizer and processor; returns `folder`."""
    tiny_multimodal().save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    LlavaProcessor(
        image_processor=images,
        tokenizer=multimodal_tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder


def synthetic_image(seed: int = 0, side: int = 56) -> Image.Image:
    """Coloured noise with a brightness of its own."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 255, (side, side, 3)) * generator.uniform(0.3, 1.0, 3)
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(
    family: str, seeds: tuple[int, ...] = (0, 1), *, words: int = 9, text_only: bool = False
) -> dict[str, Tensor]:
    """One batch of samples of equal length, each an image between random text, unless `text_only`."""
    n = len(seeds)
    generator = torch.Generator().manual_seed(seeds[0] + 1)
    text = torch.randint(1, VOCABULARY, (n, words), generator=generator)
    if text_only:
        return {"input_ids": text, "attention_mask": torch.ones_like(text)}
    images = [synthetic_image(seed) for seed in seeds]
    more: dict[str, Tensor] = {}
    if family.startswith("qwen"):
        patches = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=56 * 56)
        more = dict(patches(images, return_tensors="pt"))
        count = 4
    else:
        processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
        more = dict(processor(images, return_tensors="pt"))
        count = 4
        if family == "llava_next":
            # The crop is no copy of the whole: which of two equal tokens is chosen is a matter of rounding.
            pixels = more["pixel_values"]
            more = {
                "pixel_values": torch.stack([pixels, pixels.flip(-1)], 1),
                "image_sizes": torch.tensor([[28, 28]] * n),
            }
            count = 10
    ids = torch.cat([text[:, :3], torch.full((n, count), IMAGE), text[:, 3:]], 1)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}
    if family.startswith("qwen"):
        found["mm_token_type_ids"] = (ids == IMAGE).to(torch.int64)
    return found


def padded(batch: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    """The same batch with `width` tokens of padding in front."""
    n = len(batch["input_ids"])
    values = {"input_ids": 0, "attention_mask": 0, "mm_token_type_ids": 0}
    return {
        name: torch.cat([torch.full((n, width), values[name]), value], 1) if name in values else value
        for name, value in batch.items()
    }


def samples(model: LanguageModel, family: str, *seeds: int) -> Samples:
    """One batch for each seed."""
    return Samples([encoded(family, (seed,)) for seed in seeds or (0, 1, 2)], model.model.config)
