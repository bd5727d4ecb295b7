"""The level database: one rank byte per weight, built once per model, criterion and statistics, mapped by all workers.

A level is a multiple of 1/256 of a row, and the mask of any level is one comparison with the ranks, so that a search
over sparsities stores no weights and reads one byte a weight where a matrix changes. This holds for criteria that leave
kept weights as they are; a compressor that changes them needs stored levels.
Source: layerwise sparsity allocation, sections 5.6 and 7.2 (13); see `evoprune.metrics.ranks` for the ranks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from evoprune.fitness.cache import cache_folder, disk_errors
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.parcels import find, packing, require
from evoprune.fitness.prepare import Prepared
from evoprune.fitness.resident import ResidentWeights
from evoprune.metrics.criterion import Criterion
from evoprune.metrics.errors import InvalidCandidate, InvalidInput
from evoprune.metrics.files import canonical_json, content_hash
from evoprune.metrics.interpreter import free_inputs
from evoprune.metrics.ranks import GONE, rank_bytes
from evoprune.metrics.records import Site

FORMAT = "evoprune-levels/1"
MANIFEST, RANKS = "manifest.json", "ranks.safetensors"


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
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            with safe_open(folder / RANKS, framework="pt") as file:
                shapes = {site: file.get_slice(site).get_shape() for site in file.keys()}  # noqa: SIM118
            found = {part: manifest.get(part) for part in level_recipe(prepared, criterion)}
        except (OSError, ValueError, AttributeError, SafetensorError) as error:
            raise InvalidInput(f"{folder} holds no readable level database ({type(error).__name__}: {error})") from None
        for part, expected in level_recipe(prepared, criterion).items():
            if found[part] != expected:
                raise InvalidInput(
                    f"the level database {name} is of {part} {str(found[part])[:80]!r}, not {str(expected)[:80]!r}: "
                    f"build it again"
                )
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


def level_recipe(prepared: Prepared, criterion: str) -> dict[str, Any]:
    """All that decides the ranks, as JSON values; arguments as in `build_levels`."""
    identity = prepared.facts["identity"]
    return {
        "format": FORMAT,
        "criterion": criterion,
        "fingerprint": prepared.facts["fingerprint"],
        "dtype": identity["dtype"],
        "statistics": identity["statistics"][0],
        "sparsity": identity["sparsity"],
    }


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
        key: names the criterion: equal for equal scores only, such as the text of an expression.
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

    def ranked(site: Site) -> Tensor:
        with safe_open(prepared.dense, framework="pt") as file:
            weight = file.get_tensor(site.name).to(device)
        inputs = {
            **free_inputs(site, weight, recipe["sparsity"]),
            **statistics.site_statistics(site.name, criterion.needs, device),
        }
        scores = criterion.score(site, inputs)
        if scores.shape != weight.shape:
            raise InvalidCandidate("TYPE", f"scores of shape {tuple(scores.shape)} for {site.name}")
        return rank_bytes(scores)

    def all_ranked() -> Iterable[Tensor]:
        for done, site in enumerate(sites):
            progress(done, len(sites))
            yield ranked(site)
        progress(len(sites), len(sites))

    with disk_errors(cache_folder()), packing(prefix) as packed:
        _write_bytes(packed.folder / RANKS, sites, all_ranked())
        (packed.folder / MANIFEST).write_text(canonical_json(recipe) + "\n", encoding="utf-8")
    return LevelDatabase.open(packed.name, prepared, key)


class ResidentLevels:
    """The levels of a resident model: a change of levels rewrites the matrices that it concerns and no others.

    Args:
        language_model: dense when it is handed over; its site weights are overwritten.
        dense: as `ResidentWeights` takes it.
        database: of the same model.

    Raises:
        InvalidInput: the database is of another model.
    """

    def __init__(self, language_model: LanguageModel, dense: Path, database: LevelDatabase) -> None:
        if database.manifest["fingerprint"] != language_model.fingerprint:
            raise InvalidInput(
                f"the level database {database.name} is of the model with fingerprint "
                f"{database.manifest['fingerprint'][:12]}, not of the one with {language_model.fingerprint[:12]}"
            )
        self._bound = {bound.site.name: bound for bound in language_model.sites}
        self._weights = ResidentWeights(language_model, dense)
        self._database = database
        self._device = language_model.device
        self._levels: dict[str, int | None] = dict.fromkeys(self._bound, 0)

    def complete(self, levels: Mapping[str, int]) -> dict[str, int]:
        """The level of every site in model order: those that `levels` leaves out are dense, at level 0.

        Raises:
            InvalidInput: a level outside 0 to 256, or a site that the model does not have.
        """
        for name, level in levels.items():
            if name not in self._bound:
                raise InvalidInput(f"no site {name[:80]!r} in this model; the first is {next(iter(self._bound))!r}")
            if type(level) is not int or not 0 <= level <= GONE:
                raise InvalidInput(
                    f"level {level!r} of {name} is no whole number from 0 to {GONE}: give 256 times a sparsity"
                )
        return {name: levels.get(name, 0) for name in self._bound}

    @torch.no_grad()
    def apply(self, levels: Mapping[str, int]) -> int:
        """Bring the model to `levels`, sites left out to the dense weight; the number of matrices rewritten.

        Raises:
            InvalidInput: see `complete`; nothing is changed then.
        """
        changed = {name: level for name, level in self.complete(levels).items() if level != self._levels[name]}
        with safe_open(self._database.ranks, framework="pt") as ranks:
            for name, level in changed.items():
                bound, before = self._bound[name], self._levels[name]
                # An interrupted write leaves a matrix that is at no level.
                self._levels[name] = None
                if level == GONE:
                    self._weights.empty(bound)
                elif level:
                    self._weights.write(bound, ranks.get_tensor(name).to(bound.weight().device) >= level)
                else:
                    self._weights.write_dense(bound)
                if level != GONE and before in (GONE, None):
                    self._weights.write_bias(bound)
                self._levels[name] = level
        return len(changed)

    def restore(self) -> None:
        """Bring every site to level 0, by writing the dense weights back.

        Raises:
            AuditFailed: the restored model differs from the one that was handed over.
        """
        self._levels = dict.fromkeys(self._bound, None)
        self._weights.restore()
        self._levels = dict.fromkeys(self._bound, 0)


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
