"""How a set of statistics is read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from evoprune.fitness.statistics_store import (
    DEFINITION_VERSION,
    FORMAT_VERSION,
    GRAM,
    MANIFEST,
    SQUARE_ROOTS,
    file_name,
)
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.files import file_hash
from evoprune.metrics.terminals import FREE_TERMINALS, TERMINALS

# Along more rows than this a statistic may not be all zero (symbolic pruning metrics, section 3.7).
DEAD_ROWS = 0.01


class SiteReader(Protocol):
    """What has statistics of sites: a set on the disk, or sums in memory."""

    def site_statistics(self, site: str, names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Several statistics of one site, private and float32; terminals that need no data are passed over."""


class ModelStatistics(SiteReader, Protocol):
    """Statistics of the matrices of one model, which say what they are.

    Attributes:
        names: what `site_statistics` can give.
        manifest: what they were made from.
    """

    @property
    def names(self) -> frozenset[str]: ...

    @property
    def manifest(self) -> dict[str, Any]: ...


@runtime_checkable
class Replayed(Protocol):
    """Statistics of a model whose blocks are pruned one after the other, which know the dense model's beside them."""

    def dense_inputs(self, site: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """``H`` or ``X_ss`` of the inputs that a site has in the dense model."""
        ...


class Statistics:
    """The statistics of every site of one model, read from a folder.

    Files are memory-mapped, so that all workers of a machine share one copy, and opened at the first use of their
    block. Every tensor that is handed out is a private float32 copy: writing into it changes nothing else.

    Attributes:
        folder: where the set is.
        manifest: what it was made from: model, text, settings, zero fractions.
        names: the statistics that `tensor` can give, square roots included.
        sites: the names of the sites, in model order.
        sequences: how many sequences the set was collected from; 0 where that is not known.
        tokens: how many tokens; 0 where that is not known.
        rows: site -> of how many tokens its statistics of inputs and outputs are; empty where there are none.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        stored = frozenset(manifest["names"])
        self.names = stored | {root for root, source in SQUARE_ROOTS.items() if source in stored}
        self._sites: dict[str, dict[str, Any]] = {site["name"]: site for site in manifest["sites"]}
        self.sites = tuple(self._sites)
        self.sequences = int(manifest["sequences"])
        self.tokens = int(manifest["tokens"])
        self.rows: dict[str, int] = manifest["rows"]
        self._readers: dict[int, Any] = {}

    @classmethod
    def open(cls, folder: str | Path, *, fingerprint: str | None = None, verify: bool = False) -> Statistics:
        """Read a set's manifest.

        Args:
            folder: the set.
            fingerprint: the model that the set must be of.
            verify: read every file and compare its hash.

        Raises:
            InvalidInput: it is no set, or damaged, of another model, or of other definitions.
        """
        folder = Path(folder)
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            versions = manifest["format"], manifest["definitions"]
            present = {name: (folder / name).stat().st_size for name in manifest["files"]}
            expected = {name: file["bytes"] for name, file in manifest["files"].items()}
            model, model_fingerprint = manifest["model"], manifest["fingerprint"]
            found = cls(folder, manifest)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidInput(f"{folder} holds no readable statistics ({type(error).__name__}: {error})") from None
        if versions != (FORMAT_VERSION, DEFINITION_VERSION):
            raise InvalidInput(
                f"the statistics in {folder} are of format and definitions {versions[0]}.{versions[1]}, "
                f"not {FORMAT_VERSION}.{DEFINITION_VERSION}: collect them again"
            )
        if fingerprint is not None and model_fingerprint != fingerprint:
            raise InvalidInput(
                f"the statistics in {folder} are of {str(model)[:80]!r} with fingerprint "
                f"{str(model_fingerprint)[:12]}, not of the model with fingerprint {fingerprint[:12]}"
            )
        if present != expected:
            raise found._damaged(next(name for name in expected if present[name] != expected[name]))
        if verify:
            found.verify()
        return found

    def tensor(self, site: str, name: str, device: torch.device | str = "cpu") -> Tensor:
        """One statistic of one site, private and float32.

        Args:
            site: the site's module path.
            name: out of `names`.
            device: where the tensor shall be.

        Returns:
            [1, in], [out, 1] or [out, in], as the terminal's type says; ``H`` is [in, in].

        Raises:
            InvalidInput: no such site or statistic in this set, or the file is damaged.
        """
        facts = self._sites.get(site)
        if facts is None:
            raise InvalidInput(f"no statistics of {site[:80]!r} in {self.folder}")
        if name not in self.names:
            have = ", ".join(sorted(self.names)) or "none"
            raise InvalidInput(f"the statistics in {self.folder} hold no {name[:80]!r}; they hold {have}")
        stored = SQUARE_ROOTS.get(name, name)
        tensor = self._read(facts["block"], self._key(site, stored), device)
        rows, columns = facts["shape"]
        shape = {"G": (rows, columns), "Y": (rows, 1)}.get(stored[0], (1, columns))
        if tuple(tensor.shape) != ((columns, columns) if stored == GRAM else shape):
            raise self._damaged(file_name(facts["block"]))
        return tensor.sqrt_() if name in SQUARE_ROOTS else tensor

    def site_statistics(self, site: str, names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Several statistics of one site; terminals that need no data are passed over. See `tensor`."""
        return {name: self.tensor(site, name, device) for name in sorted(set(names) - FREE_TERMINALS)}

    def dead(self) -> frozenset[str]:
        """The names that are all zero along at least `DEAD_ROWS` of the rows of all matrices.

        A statistic of the inputs has one row, which counts for every row of its matrix.
        """
        counts: dict[str, int] = self.manifest["dead_rows"]
        rows = sum(facts["shape"][0] for facts in self._sites.values())
        found = set()
        for name in self.names - {GRAM}:
            dead = 0
            for site, facts in self._sites.items():
                count = counts.get(self._key(site, SQUARE_ROOTS.get(name, name)), 0)
                dead += count if TERMINALS[name].type.varies_with_row else count * facts["shape"][0]
            if dead and dead >= DEAD_ROWS * rows:
                found.add(name)
        return frozenset(found)

    def verify(self) -> None:
        """Compare every file with its hash in the manifest.

        Raises:
            InvalidInput: a file differs.
        """
        for name, file in self.manifest["files"].items():
            if file_hash(self.folder / name) != file["sha256"]:
                raise self._damaged(name)

    def _key(self, site: str, stored: str) -> str:
        """Where a stored statistic of a site is: that of its inputs under the first site that shares them."""
        owner = site if stored[:2] in ("G_", "Y_") else self._sites[site]["input_of"]
        return f"{owner}::{stored}"

    def _read(self, block: int, key: str, device: torch.device | str) -> Tensor:
        try:
            if block not in self._readers:
                self._readers[block] = safe_open(self.folder / file_name(block), framework="pt")
            mapped = self._readers[block].get_tensor(key)
            private: Tensor = mapped.to(device).to(torch.float32, copy=True)
            if mapped.dtype == torch.float16:
                private *= self._readers[block].get_tensor(f"{key}::scale").to(device)
        except (OSError, SafetensorError):
            raise self._damaged(file_name(block)) from None
        return private

    def _damaged(self, file: str) -> InvalidInput:
        return InvalidInput(f"{self.folder / file} differs from its manifest: delete {self.folder} and run again")
