"""A set of statistics on disk: one safetensors file per decoder block, and a manifest.

Keys are ``<module path>::<terminal>``. Vectors and ``H`` are float32. Gradient statistics are float16 times a float32
scale of their own (``<key>::scale``), a power of two that brings the largest magnitude near 2^14: what fp16 loses at
1e-7 it keeps there. Nothing in a set is unpickled or evaluated.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from evoprune.metrics.errors import InvalidInput, UnknownName
from evoprune.metrics.files import canonical_json, file_hash, write_atomically
from evoprune.metrics.records import Site
from evoprune.metrics.terminals import FREE_TERMINALS, STATISTICS

FORMAT_VERSION = 1
# Raised whenever a terminal's definition changes: older sets are then refused.
DEFINITION_VERSION = 1
MANIFEST = "manifest.json"

# The Gram matrix (1/T) Σ x xᵀ, [in, in]: for objectives and compressors, no leaf of the language.
GRAM = "H"
KNOWN = STATISTICS | {GRAM}
# Not stored: the square roots of what is. Without experts, no gate weighs an input.
SQUARE_ROOTS = {"X_l2": "X_ss", "X_gate_l2": "X_ss", "Y_l2": "Y_ss"}


def stored_names(names: Iterable[str]) -> frozenset[str]:
    """What must be stored to know `names`; terminals that need no data are passed over.

    Raises:
        UnknownName: a name is not a statistic.
    """
    wanted = frozenset(names) - FREE_TERMINALS
    for name in sorted(wanted - KNOWN):
        raise UnknownName("statistic", name, KNOWN)
    return frozenset(SQUARE_ROOTS.get(name, name) for name in wanted)


def encode(key: str, tensor: Tensor) -> dict[str, Tensor]:
    """`tensor` as it is stored under `key`, on the CPU. A gradient statistic is scaled in place."""
    if not key.rpartition("::")[2].startswith("G_"):
        return {key: tensor.detach().float().cpu().contiguous()}
    peak = float(tensor.abs().amax())
    # 2^127 is the last power of two in float32.
    exponent = min(14 - math.frexp(peak)[1], 126) if peak > 0 else 0
    half = tensor.mul_(2.0**exponent).to(torch.float16).cpu().contiguous()
    return {key: half, f"{key}::scale": torch.tensor(2.0**-exponent)}


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill that becomes `folder` at the end, whole or not at all.

    If `folder` has come into being meanwhile, made by another process from the same inputs, that one stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    partial.mkdir()
    try:
        yield partial
        try:
            partial.rename(folder)
        except OSError:
            if not (folder / MANIFEST).is_file():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class SetWriter:
    """Writes a set into a folder, as much at a time as the caller has ready, so that it need not fit into memory.

    Args:
        folder: empty; see `new_folder`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._parts: dict[int, list[Path]] = {}
        self._zeros: dict[str, float] = {}

    def add(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        """Write what `encode` made for decoder block `block`, or a part of it."""
        parts = self._parts.setdefault(block, [])
        parts.append(self._folder / f"block-{block:04d}.{len(parts)}.part")
        save_file(dict(tensors), parts[-1])
        for key, tensor in tensors.items():
            if tensor.dtype == torch.float16:
                self._zeros[key] = 1 - torch.count_nonzero(tensor).item() / tensor.numel()

    def finish(self, sites: Iterable[Site], leaders: Mapping[str, str], facts: Mapping[str, Any]) -> None:
        """Join the parts and write the manifest.

        Args:
            sites: all sites of the model.
            leaders: site -> the site that its input statistics are stored under.
            facts: what the manifest says besides: names, fingerprint, windows, settings.
        """
        files: dict[str, dict[str, Any]] = {}
        for block, parts in sorted(self._parts.items()):
            path = self._folder / _file_name(block)
            joined: dict[str, Tensor] = {}
            for part in parts:
                joined |= load_file(part)
            save_file(joined, path)
            del joined
            for part in parts:
                part.unlink()
            files[path.name] = {"bytes": path.stat().st_size, "sha256": file_hash(path)}
        manifest = dict(facts) | {
            "format": FORMAT_VERSION,
            "definitions": DEFINITION_VERSION,
            "files": files,
            "zero_fractions": self._zeros,
            "sites": [
                {
                    "name": site.name,
                    "block": site.block,
                    "shape": [site.out_features, site.in_features],
                    "input_of": leaders.get(site.name, site.name),
                }
                for site in sites
            ],
        }
        write_atomically(self._folder / MANIFEST, canonical_json(manifest) + "\n")


class Statistics:
    """The statistics of every site of one model, read from a folder.

    Files are memory-mapped, so that all workers of a machine share one copy, and opened at the first use of their
    block. Every tensor that is handed out is a private float32 copy: writing into it changes nothing else.

    Attributes:
        folder: where the set is.
        manifest: what it was made from: model, text, settings, zero fractions.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self._sites = {site["name"]: site for site in manifest["sites"]}
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

    @property
    def names(self) -> frozenset[str]:
        """The statistics that `tensor` can give, square roots included."""
        stored = frozenset(self.manifest["names"])
        return stored | {root for root, source in SQUARE_ROOTS.items() if source in stored}

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of the sites, in model order."""
        return tuple(self._sites)

    @property
    def sequences(self) -> int:
        """How many sequences the set was collected from; 0 where that is not known."""
        return int(self.manifest["sequences"])

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
        owner = site if stored[:2] in ("G_", "Y_") else facts["input_of"]
        tensor = self._read(facts["block"], f"{owner}::{stored}", device)
        rows, columns = facts["shape"]
        shape = {"G": (rows, columns), "Y": (rows, 1)}.get(stored[0], (1, columns))
        if tuple(tensor.shape) != ((columns, columns) if stored == GRAM else shape):
            raise self._damaged(_file_name(facts["block"]))
        return tensor.sqrt_() if name in SQUARE_ROOTS else tensor

    def site_statistics(self, site: str, names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Several statistics of one site; terminals that need no data are passed over. See `tensor`."""
        return {name: self.tensor(site, name, device) for name in sorted(set(names) - FREE_TERMINALS)}

    def verify(self) -> None:
        """Compare every file with its hash in the manifest.

        Raises:
            InvalidInput: a file differs.
        """
        for name, file in self.manifest["files"].items():
            if file_hash(self.folder / name) != file["sha256"]:
                raise self._damaged(name)

    def _read(self, block: int, key: str, device: torch.device | str) -> Tensor:
        try:
            if block not in self._readers:
                self._readers[block] = safe_open(self.folder / _file_name(block), framework="pt")
            mapped = self._readers[block].get_tensor(key)
            private: Tensor = mapped.to(device).to(torch.float32, copy=True)
            if mapped.dtype == torch.float16:
                private *= self._readers[block].get_tensor(f"{key}::scale").to(device)
        except (OSError, SafetensorError):
            raise self._damaged(_file_name(block)) from None
        return private

    def _damaged(self, file: str) -> InvalidInput:
        return InvalidInput(f"{self.folder / file} differs from its manifest: delete {self.folder} and run again")


def _file_name(block: int) -> str:
    return f"block-{block:04d}.safetensors"
