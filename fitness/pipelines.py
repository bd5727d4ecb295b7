"""Pipelines of diffusers: a text encoder and a denoiser, pruned as components of one model. Needs diffusers.

Source: Ramesh and Zhao 2024, arXiv:2411.15113: linear layers alone are pruned, convolutions and the VAE stay dense.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from evoprune.fitness.adapters import SiteModule
from evoprune.fitness.adapters.base import Part, bind_sites, is_linear
from evoprune.fitness.hub import PIPELINE_INDEX, one_line, silence
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.files import user_path

TEXT_ENCODER, DENOISER = "text_encoder", "denoiser"
# What diffusers calls the parts that are pruned; a pipeline has one denoiser and up to three text encoders.
_COMPONENTS = {
    "text_encoder": TEXT_ENCODER,
    "text_encoder_2": "text_encoder_2",
    "text_encoder_3": "text_encoder_3",
    "unet": DENOISER,
    "transformer": DENOISER,
}


@dataclass(frozen=True)
class Pipeline:
    """A pipeline ready for pruning.

    Attributes:
        model: its parts by the names that diffusers gives them, in eval mode; no parameter asks for gradients.
        sites: prunable matrices, the text encoder's first; their names begin with that of their part.
        name: what the user typed.
        pipe: the diffusers pipeline, whose parts are those of `model`.
    """

    model: nn.ModuleDict
    sites: tuple[SiteModule, ...]
    name: str
    pipe: Any

    def copy(self) -> Pipeline:
        """The same with weights of its own."""
        pipe = deepcopy(self.pipe)
        return pipeline_of(pipe, self.name)

    def save(self, folder: str | Path) -> Path:
        """Write it as diffusers does, dense safetensors with zeros; returns the folder.

        Raises:
            InvalidInput: the folder is not empty.
        """
        place = user_path(folder)
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise InvalidInput(f"{folder} is not empty: give a new folder for the pipeline")
        with silence():
            self.pipe.save_pretrained(place, safe_serialization=True)
        return place


def is_pipeline(name: str) -> bool:
    """Whether a folder holds a pipeline of diffusers."""
    return bool(name) and (user_path(name) / PIPELINE_INDEX).is_file()


def load_pipeline(name: str) -> Pipeline:
    """Load a pipeline from a local folder, with safetensors only.

    Raises:
        InvalidInput: diffusers is not installed, there is no such folder, or it holds nothing that can be pruned.
    """
    try:
        import diffusers
    except ImportError:
        raise InvalidInput("pipelines need diffusers: pip install 'evoprune[diffusion]'") from None
    if not is_pipeline(name):
        raise InvalidInput(f"no pipeline {name[:200]!r}: give a folder with a {PIPELINE_INDEX} that diffusers wrote")
    try:
        with silence():
            pipe = diffusers.DiffusionPipeline.from_pretrained(str(user_path(name)), use_safetensors=True)
    except Exception as error:  # whatever diffusers makes of files that a stranger wrote
        raise InvalidInput(f"the pipeline in {name[:200]} cannot be read: {one_line(error)}") from error
    return pipeline_of(pipe, name)


def pipeline_of(pipe: Any, name: str) -> Pipeline:
    """A diffusers pipeline, or anything with such `components`, ready for pruning.

    Raises:
        InvalidInput: none of its parts can be pruned.
    """
    known = {part: module for part, module in pipe.components.items() if part in _COMPONENTS}
    modules = {part: known[part] for part in _COMPONENTS if isinstance(known.get(part), nn.Module)}
    if not modules:
        raise InvalidInput(f"pipeline {name[:200]!r} has none of the parts {', '.join(_COMPONENTS)}")
    model = nn.ModuleDict(modules)
    model.eval().requires_grad_(False)
    parts = [part for name, module in modules.items() for part in _parts(name, module)]
    return Pipeline(model, tuple(bind_sites(model, parts, others_stay_dense=True)), name, pipe)


def _parts(name: str, module: nn.Module) -> Iterator[Part]:
    """Blocks are what the first index in a path counts, such as ``down_blocks.0``; what has none is a block alone."""
    blocks: dict[str, list[str]] = {}
    for path, child in module.named_modules():
        if is_linear(child):
            words = path.split(".")
            end = next((index for index, word in enumerate(words[:-1]) if word.isdigit()), None)
            blocks.setdefault("" if end is None else ".".join(words[: end + 1]), []).append(path)
    for block, paths in blocks.items():
        where = f"{name}.{block}" if block else name
        kinds = tuple(path.removeprefix(f"{block}.") for path in paths)
        yield Part(_COMPONENTS[name], [(where, module.get_submodule(block))], kinds, where)
