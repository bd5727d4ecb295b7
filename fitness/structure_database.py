"""The structure database: for every block which heads and neurons go first, and what the weights that stay become.

For the output matrix of every attention and MLP it holds an order of removal and one Cholesky factor, from which any
width is one triangular solve; so a search over shapes stores no weights by level. Every block is a parcel of its own,
so that a build that was stopped goes on, and blocks that do not depend on each other are built on several workers.
Source: Kurtic et al. 2023 (ZipLM, arXiv:2302.04089); Tang et al. 2025 (DarwinLM, arXiv:2502.07780), section 3;
layerwise sparsity allocation, section 5.6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from evoprune.fitness.cache import cache_folder, check_room, disk_errors
from evoprune.fitness.gram import DAMPINGS
from evoprune.fitness.levels import MANIFEST, manifest_of, readable
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.parcels import packing, require
from evoprune.fitness.refit import Factor
from evoprune.fitness.removal_order import SHARE
from evoprune.fitness.samples import Samples, Sequences
from evoprune.fitness.structure_parts import Stored, columns_of, kept_heads, part_bytes
from evoprune.fitness.units import PARTS, BlockUnits, PartName
from evoprune.metrics.files import canonical_json, content_hash
from evoprune.metrics.shape import BlockShape

FORMAT = "evoprune-structure/2"

Mode = Literal["dense", "expectation", "path"]


@dataclass(frozen=True)
class StructureDatabase:
    """Orders and factors of all blocks of one model: a parcel that names those of the blocks.

    Attributes:
        folder: holds ``manifest.json``.
        manifest: what it was built from, and ``blocks``, the parcels.
        units: of the model that it was built for.
    """

    folder: Path
    manifest: dict[str, Any]
    units: tuple[BlockUnits, ...]

    @classmethod
    def open(cls, name: str, language_model: LanguageModel, units: Sequence[BlockUnits]) -> StructureDatabase:
        """The database of this name, fetched from the cluster if this node lacks it; its blocks when they are read.

        Args:
            name: as `StructureDatabase.name` gives it.
            language_model: that it must have been built from.
            units: of this model.

        Raises:
            InvalidInput: it is of another model, or damaged, or nowhere.
        """
        folder = require(name)
        with readable(folder, "structure"):
            manifest = manifest_of(folder, model_facts(language_model, units), "structure")
        return cls(folder, manifest, tuple(units))

    @property
    def name(self) -> str:
        """Names the content, on every node."""
        return self.folder.name

    def kept_neurons(self, block: int, width: int) -> tuple[int, ...]:
        """The neurons of a block, ascending, that stay longest: so many."""
        return tuple(sorted(self._tensors(block, "mlp", "order")["order"][:width].tolist()))

    def kept_heads(self, block: int, groups: int, heads_per_group: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """KV groups and query heads of a block, ascending: the groups that stay longest, and in each so many heads."""
        return kept_heads(self._tensors(block, "attention", "groups", "heads"), groups, heads_per_group)

    def output(
        self,
        block: int,
        part: PartName,
        shape: BlockShape,
        device: torch.device | str = "cpu",
        weight: Tensor | None = None,
    ) -> Tensor:
        """[out, kept] float32: what the output matrix of a part becomes, columns ascending.

        Of a part that stays whole this is the best of all weights, with zeros for inputs that were always zero: the
        dense weight but for rounding, unless outputs make up for what was changed before them.

        Args:
            block, part: which.
            shape: what stays of the block, whether the orders would keep it or not.
            device: where it is computed, and returned.
            weight: [out, in] that is refitted on the inputs of the dense part, in place of the dense weight, and makes
                up for nothing else.
        """
        stored = self._tensors(block, part, "order", "lower", "target")
        factor = Factor(*(stored[name].to(device) for name in ("order", "lower", "target")))
        if weight is not None:
            factor = factor.of_weight(weight.to(device))
        return factor.refit(columns_of(getattr(self.units[block], part), shape))

    def errors(self, block: int, part: PartName) -> Tensor:
        """Output error at every width, float64, of 1 for nothing kept and 0 for all, on the damped inputs.

        It is measured from what the best of all weights puts out.

        Of an MLP [neurons + 1], by neurons kept; of an attention [groups + 1, heads of each + 1], by KV groups kept and
        query heads kept in each.
        """
        return self._tensors(block, part, "errors")["errors"]

    def _tensors(self, block: int, part: PartName, *names: str) -> Stored:
        folder = require(self.manifest["blocks"][block])
        with readable(folder, "structure"), safe_open(folder / f"{part}.safetensors", framework="pt") as file:
            return {name: file.get_tensor(name) for name in names}


def model_facts(language_model: LanguageModel, units: Sequence[BlockUnits]) -> dict[str, Any]:
    """What a database and a model must agree on, as JSON values."""
    return {
        "format": FORMAT,
        "fingerprint": language_model.fingerprint,
        "dtype": str(language_model.model.dtype),
        "widths": [[block.widths.groups, block.widths.heads, block.widths.neurons] for block in units],
    }


def structure_recipe(
    language_model: LanguageModel,
    units: Sequence[BlockUnits],
    texts: Sequence[Sequences],
    mode: Mode,
    path: Sequence[BlockShape] | None,
    correction: float,
) -> dict[str, Any]:
    """All that decides a database, as JSON values; arguments as in `evoprune.fitness.structure_build`."""
    device = language_model.device.type
    return {
        **model_facts(language_model, units),
        "texts": [text.digest() if isinstance(text, Samples) else content_hash(text.tolist()) for text in texts],
        "mode": mode,
        "path": path and [content_hash([shape.groups, shape.heads, shape.neurons]) for shape in path],
        "orders": {"attention": ["groups", "balanced"], "mlp": ["rounds", SHARE]},
        "dampings": list(DAMPINGS),
        "device": device,
        "threads": None if device == "cuda" else torch.get_num_threads(),
        **({} if path is None else {"correction": correction}),
    }


def block_prefix(recipe: dict[str, Any], block: int) -> str:
    """How the name of a block's parcel begins. Of a path it depends on the shapes up to this block only."""
    path = recipe["path"] and recipe["path"][: block + 1]
    return f"structure-block-{content_hash({**recipe, 'path': path, 'block': block})[:24]}"


def write_block(prefix: str, parts: dict[PartName, Stored]) -> str:
    """Make a block's parcel; returns its name.

    Raises:
        InvalidInput: the disk is full or read-only.
    """
    with disk_errors(cache_folder()):
        with packing(prefix) as packed:
            for part, tensors in parts.items():
                save_file(tensors, packed.folder / f"{part}.safetensors")
        return packed.name


def read_block(name: str) -> dict[PartName, Stored]:
    """What `write_block` wrote.

    Raises:
        InvalidInput: it cannot be read.
    """
    folder = require(name)
    found: dict[PartName, Stored] = {}
    for part in PARTS:
        with readable(folder, "structure"), safe_open(folder / f"{part}.safetensors", framework="pt") as file:
            found[part] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return found


def write_manifest(recipe: dict[str, Any], blocks: Sequence[str]) -> str:
    """Make the parcel of a database whose blocks are there; returns its name.

    Raises:
        InvalidInput: the disk is full or read-only.
    """
    with disk_errors(cache_folder()):
        with packing(database_prefix(recipe)) as packed:
            text = canonical_json({**recipe, "blocks": list(blocks)})
            (packed.folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
        return packed.name


def database_prefix(recipe: dict[str, Any]) -> str:
    """How the name of a database begins."""
    return f"structure-{content_hash(recipe)[:24]}"


def check_disk(units: Sequence[BlockUnits]) -> None:
    """Refuse what the disk of the cache has no room for.

    Args:
        units: of the blocks that are missing.

    Raises:
        InvalidInput: says how much is needed.
    """
    size = sum(part_bytes(block.attention) + part_bytes(block.mlp) for block in units)
    cache_folder().mkdir(parents=True, exist_ok=True)
    check_room(size, f"factors of {len(units)} blocks", "delete what is no longer needed there")
