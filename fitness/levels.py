"""The level database: one rank byte per weight, built once per model, criterion and statistics, mapped by all workers.

A level is a multiple of 1/256 of a row, and the mask of any level is one comparison with the ranks, so that a search
over sparsities stores no weights and reads one byte a weight where a matrix changes. This holds where kept weights stay
as they are; a compressor that changes them needs stored levels, see `evoprune.fitness.stored_levels`.
Source: layerwise sparsity allocation, sections 5.6 and 7.2 (13); see `evoprune.metrics.ranks` for the ranks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from evoprune.fitness.adapters import SiteModule
from evoprune.fitness.cache import cache_folder, disk_errors
from evoprune.fitness.parcels import find, packing, require
from evoprune.fitness.prepare import Prepared
from evoprune.fitness.resident import ResidentWeights
from evoprune.fitness.statistics_reader import Statistics
from evoprune.metrics.criterion import Criterion, Metric
from evoprune.metrics.errors import InvalidCandidate, InvalidInput
from evoprune.metrics.files import canonical_json, content_hash
from evoprune.metrics.interpreter import free_inputs
from evoprune.metrics.ranks import GONE, rank_bytes
from evoprune.metrics.records import Site

FORMAT = "evoprune-levels/1"
MANIFEST, RANKS = "manifest.json", "ranks.safetensors"

Write = Callable[[ResidentWeights, SiteModule, int], None]
"""Brings one matrix of a resident model to a level between the ends, 0 and 256."""


@dataclass(frozen=True)
class LevelDatabase:
    """The ranks of all weights of one model by one criterion: a parcel.

    Attributes:
        folder: holds ``manifest.json`` and ``ranks.safetensors``, uint8 [out, in] by site name.
        manifest: what it was built from.
    """

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, name: str, prepared: Prepared, criterion: str) -> LevelDatabase:
        """The database of this name, fetched from the cluster if this node lacks it.

        Args:
            name: as `LevelDatabase.name` gives it.
            prepared: the set whose model and statistics it must be built from.
            criterion: the key of the criterion that it must be built with; see `build_levels`.

        Raises:
            InvalidInput: it is of something else, or damaged, or nowhere.
        """
        folder = require(name)
        with readable(folder):
            with safe_open(folder / RANKS, framework="pt") as file:
                shapes = {site: file.get_slice(site).get_shape() for site in file.keys()}  # noqa: SIM118
            manifest = manifest_of(folder, level_recipe(prepared, criterion))
        if shapes != {site.name: [site.out_features, site.in_features] for site in prepared.sites}:
            raise InvalidInput(f"the level database {name} holds other matrices than the model: delete {folder}")
        return cls(folder, manifest)

    @property
    def name(self) -> str:
        """Names the content, on every node."""
        return self.folder.name

    @property
    def ranks(self) -> Path:
        """File of the rank bytes."""
        return self.folder / RANKS

    def check(self, site: str, level: int) -> None:
        """Refuse a level that there is not.

        Raises:
            InvalidInput: it is no whole number from 0 to 256.
        """
        if type(level) is not int or not 0 <= level <= GONE:
            raise InvalidInput(
                f"level {level!r} of {site} is no whole number from 0 to {GONE}: give 256 times a sparsity"
            )

    @contextmanager
    def opened(self) -> Iterator[Write]:
        """What brings a matrix to a level between 0 and 256."""
        with safe_open(self.ranks, framework="pt") as ranks:

            def write(weights: ResidentWeights, bound: SiteModule, level: int) -> None:
                keep = ranks.get_tensor(bound.site.name).to(bound.weight().device) >= level
                weights.write(bound, keep)

            yield write


@contextmanager
def readable(folder: Path, kind: str = "level") -> Iterator[None]:
    """Inside, what keeps a database of a `kind` in `folder` from being read is one line.

    Raises:
        InvalidInput: in place of what file system and parsers raise.
    """
    try:
        yield
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        raise InvalidInput(f"{folder} holds no readable {kind} database ({type(error).__name__}: {error})") from None


def manifest_of(folder: Path, recipe: Mapping[str, Any], kind: str = "level") -> dict[str, Any]:
    """The manifest of the database of a `kind` in `folder`.

    Raises:
        InvalidInput: it is of something else than `recipe` says.
        OSError, ValueError, AttributeError: it cannot be read; see `readable`.
    """
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    for part, expected in recipe.items():
        if (found := manifest.get(part)) != expected:
            raise InvalidInput(
                f"the {kind} database {folder.name} is of {part} {str(found)[:80]!r}, not {str(expected)[:80]!r}: "
                f"build it again"
            )
    return manifest


def level_recipe(prepared: Prepared, criterion: str) -> dict[str, Any]:
    """All that decides the ranks, as JSON values; arguments as in `build_levels`."""
    identity = prepared.facts["identity"]
    return {
        "format": FORMAT,
        "criterion": criterion,
        "fingerprint": prepared.facts["fingerprint"],
        "dtype": identity["dtype"],
        "statistics": identity["statistics"][0],
    }


def criterion_key(spelt: Mapping[str, Any], criterion: Criterion, prepared: Prepared) -> str:
    """Names the ranks that a criterion gives in a prepared set.

    Ranks serve every level, so that searches at other sparsities share them. Only a criterion that reads the terminal
    ``sparsity``, or of which it cannot be told, ranks otherwise where the target of the set is another one.

    Args:
        spelt: the criterion as jobs spell it.
        criterion: what it spells.
        prepared: says what the target is.
    """
    blind = isinstance(criterion, Metric) and "sparsity" not in criterion.expression.terminals
    return canonical_json(spelt if blind else [spelt, prepared.facts["identity"]["sparsity"]])


@torch.no_grad()
def build_levels(
    prepared: Prepared,
    criterion: Criterion,
    key: str,
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> LevelDatabase:
    """Rank the weights of every site of a prepared set, or find that it was done before, here or in the cluster.

    Only one matrix is in memory at a time. Scores are compared within rows, whatever the criterion's own group is; the
    terminal ``sparsity`` is that of the prepared set at every level.

    Args:
        prepared: the model's dense weights and its statistics.
        criterion: gives the scores, low = removed first.
        key: names the criterion: equal for equal scores only; see `criterion_key`.
        device: where scores are computed and sorted.
        progress: called with (done, total) in matrices.

    Raises:
        InvalidCandidate: scores that are not finite, or no scores of every weight.
        InvalidInput: the criterion reads a statistic that was not collected, or the disk is full or read-only.
    """
    recipe = level_recipe(prepared, key)
    prefix = f"levels-{content_hash(recipe)[:24]}"
    known = find(prefix)
    if known is not None:
        return LevelDatabase.open(known, prepared, key)
    sites, statistics = prepared.sites, prepared.statistics()

    def all_ranked() -> Iterable[Tensor]:
        for done, (site, weight) in enumerate(zip(sites, dense_weights(prepared, device), strict=True)):
            progress(done, len(sites))
            yield site_ranks(criterion, site, weight, statistics, prepared.facts["identity"]["sparsity"])
        progress(len(sites), len(sites))

    with disk_errors(cache_folder()), packing(prefix) as packed:
        _write_bytes(packed.folder / RANKS, sites, all_ranked())
        (packed.folder / MANIFEST).write_text(canonical_json(recipe) + "\n", encoding="utf-8")
    return LevelDatabase.open(packed.name, prepared, key)


def dense_weights(prepared: Prepared, device: torch.device | str) -> Iterator[Tensor]:
    """[out, in] dense weight of every site in model order, in the model's dtype on `device`, one at a time."""
    for site in prepared.sites:
        with safe_open(prepared.dense, framework="pt") as file:
            yield file.get_tensor(site.name).to(device)


def site_ranks(criterion: Criterion, site: Site, weight: Tensor, statistics: Statistics, sparsity: float) -> Tensor:
    """[out, in] uint8 ranks of a matrix by a criterion, on the device of its dense `weight`.

    Raises:
        InvalidCandidate, InvalidInput: see `build_levels`.
    """
    inputs = {
        **free_inputs(site, weight, sparsity),
        **statistics.site_statistics(site.name, criterion.needs, weight.device),
    }
    scores = criterion.score(site, inputs)
    if scores.shape != weight.shape:
        raise InvalidCandidate("TYPE", f"scores of shape {tuple(scores.shape)} for {site.name}")
    return rank_bytes(scores)


def _write_bytes(path: Path, sites: list[Site], matrices: Iterable[Tensor]) -> None:
    """A safetensors file of one uint8 matrix per site, written as they come: its own library wants all at once.

    The format is 8 bytes of little-endian header length, a JSON header with each tensor's place, and the data.
    """
    header: dict[str, Any] = {}
    end = 0
    for site in sites:
        place = [end, end := end + site.weights]
        header[site.name] = {"dtype": "U8", "shape": [site.out_features, site.in_features], "data_offsets": place}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for matrix in matrices:
            stream.write(matrix.cpu().numpy().data)
