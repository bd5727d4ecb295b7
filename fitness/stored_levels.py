"""Stored levels: the weights of every matrix at every level of a grid, for compressors that change what stays.

Masks of one criterion are nested, so that a rank byte a weight holds all of them; what SparseGPT makes of a matrix at
one level says nothing of the next. So each level is a matrix of its own, in the model's dtype, computed once from the
dense model's statistics and mapped by all workers. Files are one per matrix, so that a build that was stopped goes on.
Source: layerwise sparsity allocation, section 5.6; Sieberling et al. 2025 (EvoPress, arXiv:2410.14649), section 4.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from evoprune.fitness.adapters import SiteModule
from evoprune.fitness.cache import cache_folder, check_room, disk_errors
from evoprune.fitness.compressors import Goal, compress_all, compressor_of
from evoprune.fitness.levels import MANIFEST, Write, dense_weights, manifest_of, readable, site_ranks
from evoprune.fitness.parcels import find, link, packing, require
from evoprune.fitness.prepare import Prepared
from evoprune.fitness.resident import ResidentWeights
from evoprune.metrics.criterion import Criterion
from evoprune.metrics.errors import InvalidCandidate, InvalidInput
from evoprune.metrics.files import canonical_json, content_hash
from evoprune.metrics.ranks import GONE
from evoprune.metrics.records import LEVELS, Site, removed_count

FORMAT = "evoprune-stored-levels/1"


@dataclass(frozen=True)
class StoredLevels:
    """The weights of all matrices of one model at some levels: a parcel.

    Attributes:
        folder: holds ``manifest.json`` and one safetensors file per site, in model order: [out, in] by level.
        manifest: what it was built from.
        files: of the sites, by name.
    """

    folder: Path
    manifest: dict[str, Any]
    files: dict[str, Path]

    @classmethod
    def open(
        cls, name: str, prepared: Prepared, compressor: str, levels: Sequence[int], criterion: str
    ) -> StoredLevels:
        """The database of this name, fetched from the cluster if this node lacks it.

        Args:
            name: as `StoredLevels.name` gives it.
            prepared: the set whose model and statistics it must be built from.
            compressor, levels, criterion: as in `build_stored_levels`; the last is the criterion's key.

        Raises:
            InvalidInput: it is of something else, or damaged, or nowhere.
        """
        folder = require(name)
        files = {site.name: folder / _file_name(at) for at, site in enumerate(prepared.sites)}
        with readable(folder):
            manifest = manifest_of(folder, stored_recipe(prepared, compressor, levels, criterion))
            alike = all(_holds(files[site.name], site, levels) for site in prepared.sites)
        if not alike:
            raise InvalidInput(f"the level database {name} holds other matrices than the model: delete {folder}")
        return cls(folder, manifest, files)

    @property
    def name(self) -> str:
        """Names the content, on every node."""
        return self.folder.name

    def check(self, site: str, level: int) -> None:
        """Refuse a level that is not stored; 0 and 256, a dense matrix and none, need no storing.

        Raises:
            InvalidInput: names those that are.
        """
        stored = self.manifest["levels"]
        if type(level) is not int or level not in (0, *stored, GONE):
            raise InvalidInput(
                f"level {level!r} of {site} is not stored; 0, {', '.join(map(str, stored))} and {GONE} are"
            )

    @contextmanager
    def opened(self) -> Iterator[Write]:
        """What brings a matrix to a stored level."""

        def write(weights: ResidentWeights, bound: SiteModule, level: int) -> None:
            weights.write_weight(bound, self.weight(bound.site.name, level))

        yield write

    def weight(self, site: str, level: int) -> Tensor:
        """[out, in] weight of a site at a stored level, in the model's dtype, mapped from the file: read only."""
        with safe_open(self.files[site], framework="pt") as file:
            return file.get_tensor(str(level))


def stored_recipe(prepared: Prepared, compressor: str, levels: Sequence[int], criterion: str) -> dict[str, Any]:
    """All that decides the weights, as JSON values; arguments as in `StoredLevels.open`."""
    identity, reads = prepared.facts["identity"], compressor_of(compressor).reads_criterion
    return {
        "format": FORMAT,
        "compressor": compressor,
        "levels": list(levels),
        "criterion": criterion if reads else None,
        "fingerprint": prepared.facts["fingerprint"],
        "dtype": identity["dtype"],
        "statistics": identity["statistics"][0],
        "threads": identity.get("threads"),
    }


def stored_bytes(sites: Sequence[Site], dtype: str, levels: Sequence[int]) -> int:
    """What the levels take on the disk.

    Args:
        sites: the matrices.
        dtype: of the model, such as ``torch.bfloat16``.
        levels: those that are stored.
    """
    size = torch.empty((), dtype=getattr(torch, dtype.removeprefix("torch."))).element_size()
    return size * len(levels) * sum(site.weights for site in sites)


@torch.no_grad()
def build_stored_levels(
    prepared: Prepared,
    compressor: str,
    levels: Sequence[int],
    criterion: Criterion,
    key: str,
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> StoredLevels:
    """Compress every site of a prepared set to every level, or find that it was done before, here or in the cluster.

    All levels of one matrix are in memory at a time. A level l removes floor(l * in / 256) weights a row on average, as
    many as a mask does. What an interrupted build has finished is not done again.

    Args:
        prepared: the model's dense weights and its statistics.
        compressor: see `compressor_of`; its `needs` are among the statistics.
        levels: from 1 to 255, in ascending order.
        criterion: for compressors that read one; see `build_levels`.
        key: names the criterion.
        device: where matrices are compressed.
        progress: called with (done, total) in matrices.

    Raises:
        InvalidCandidate: scores that are not finite, or no scores of every weight.
        InvalidInput: a statistic was not collected or is of no use, or the disk has no room for the levels.
    """
    recipe = stored_recipe(prepared, compressor, levels, key)
    prefix = f"levels-{content_hash(recipe)[:24]}"
    known = find(prefix)
    if known is not None:
        return StoredLevels.open(known, prepared, compressor, levels, key)
    sites = prepared.sites
    begun = cache_folder() / "levels" / prefix
    files = [begun / _file_name(at) for at in range(len(sites))]
    missing = [not _is_whole(file, site, levels) for file, site in zip(files, sites, strict=True)]
    with disk_errors(cache_folder()):
        begun.mkdir(parents=True, exist_ok=True)
        left = [site for site, needed in zip(sites, missing, strict=True) if needed]
        check_room(
            stored_bytes(left, recipe["dtype"], levels),
            f"{len(levels)} levels of all matrices",
            "store fewer of them (--set target.grid=8)",
        )
        for done, (site, weight) in enumerate(zip(sites, dense_weights(prepared, device), strict=True)):
            progress(done, len(sites))
            if missing[done]:
                _write(_compressed(prepared, compressor, levels, criterion, site, weight), files[done])
        progress(len(sites), len(sites))
        with packing(prefix) as packed:
            for file in files:
                link(file, packed.folder / file.name)
            (packed.folder / MANIFEST).write_text(canonical_json(recipe) + "\n", encoding="utf-8")
        shutil.rmtree(begun, ignore_errors=True)
    return StoredLevels.open(packed.name, prepared, compressor, levels, key)


def _compressed(
    prepared: Prepared, compressor: str, levels: Sequence[int], criterion: Criterion, site: Site, weight: Tensor
) -> dict[str, Tensor]:
    """[out, in] weight of a matrix by level, on the CPU."""
    plugin, statistics = compressor_of(compressor), prepared.statistics()
    given = statistics.site_statistics(site.name, plugin.needs, weight.device)
    ranks = None
    try:
        if plugin.reads_criterion:
            ranks = site_ranks(criterion, site, weight, statistics, prepared.facts["identity"]["sparsity"])
        goals = (_goal(site, level, ranks) for level in levels)
        made = [result.weight.cpu() for result in compress_all(compressor, weight, goals, given, measured=False)]
    except (InvalidCandidate, InvalidInput) as error:
        raise InvalidInput(f"cannot compress {site.name}: {error}") from None
    return {str(level): found.contiguous() for level, found in zip(levels, made, strict=True)}


def _goal(site: Site, level: int, ranks: Tensor | None) -> Goal:
    if ranks is not None:
        return Goal.of_mask(ranks >= level)
    return Goal(site.out_features * removed_count(level / LEVELS, site.in_features))


def _file_name(at: int) -> str:
    return f"matrix-{at:05d}.safetensors"


def _holds(file: Path, site: Site, levels: Sequence[int]) -> bool:
    """Whether `file` has a matrix of the site's shape for each level; errors as of `readable`."""
    with safe_open(file, framework="pt") as held:
        shapes = {level: held.get_slice(level).get_shape() for level in held.keys()}  # noqa: SIM118
    return shapes == {str(level): [site.out_features, site.in_features] for level in levels}


def _is_whole(file: Path, site: Site, levels: Sequence[int]) -> bool:
    """Whether an earlier build has written this file."""
    try:
        return _holds(file, site, levels)
    except (OSError, SafetensorError):
        return False


def _write(tensors: dict[str, Tensor], file: Path) -> None:
    """Write one matrix's file, whole or not at all."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        save_file(tensors, partial)
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
