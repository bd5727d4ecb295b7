"""How a set of statistics is written: one safetensors file per decoder block, and a manifest.

Keys are ``<module path>::<terminal>``. Vectors and ``H`` are float32. Gradient statistics are float16 times a float32
scale of their own (``<key>::scale``), a power of two that brings the largest magnitude near 2^14: what fp16 loses at
1e-7 it keeps there. Nothing in a set is unpickled or evaluated.
"""

from __future__ import annotations

import math
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from evoprune.metrics.errors import UnknownName
from evoprune.metrics.files import canonical_json, file_hash, write_atomically
from evoprune.metrics.records import Site
from evoprune.metrics.terminals import FREE_TERMINALS, STATISTICS

FORMAT_VERSION = 3
# Raised whenever a terminal's definition changes: older sets are then refused.
DEFINITION_VERSION = 2
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
    stored = frozenset(SQUARE_ROOTS.get(name, name) for name in wanted)
    # Sets with variances can be merged only with the means beside them.
    return stored | {"X_mean"} if "X_var" in stored else stored


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


def site_facts(sites: Iterable[Site], leaders: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """What a manifest says of each site.

    Args:
        sites: all sites of the model, in model order.
        leaders: site -> the site that its input statistics are stored under; itself by default.
    """
    return [
        {
            "name": site.name,
            "block": site.block,
            "shape": [site.out_features, site.in_features],
            "input_of": (leaders or {}).get(site.name, site.name),
        }
        for site in sites
    ]


class SetWriter:
    """Writes a set into a folder, as much at a time as the caller has ready, so that it need not fit into memory.

    Args:
        folder: empty; see `new_folder`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._parts: dict[int, list[Path]] = {}
        self._zeros: dict[str, float] = {}
        self._dead_rows: dict[str, int] = {}

    def add(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        """Write what `encode` made for decoder block `block`, or a part of it."""
        parts = self._parts.setdefault(block, [])
        parts.append(self._folder / f"block-{block:04d}.{len(parts)}.part")
        _save(dict(tensors), parts[-1])
        for key, tensor in tensors.items():
            if tensor.dtype == torch.float16:
                self._zeros[key] = 1 - torch.count_nonzero(tensor).item() / tensor.numel()
            if tensor.dim() == 2 and (dead := tensor.shape[0] - int(tensor.any(1).sum())):
                self._dead_rows[key] = dead

    def finish(self, sites: list[dict[str, Any]], facts: Mapping[str, Any]) -> None:
        """Join the parts and write the manifest.

        Args:
            sites: what `site_facts` says of the model.
            facts: what the manifest says besides: names, fingerprint, windows, settings, rows.
        """
        files: dict[str, dict[str, Any]] = {}
        for block, parts in sorted(self._parts.items()):
            path = self._folder / file_name(block)
            joined: dict[str, Tensor] = {}
            for part in parts:
                joined |= load_file(part)
            _save(joined, path)
            del joined
            for part in parts:
                part.unlink()
            files[path.name] = {"bytes": path.stat().st_size, "sha256": file_hash(path)}
        manifest = dict(facts) | {
            "format": FORMAT_VERSION,
            "definitions": DEFINITION_VERSION,
            "files": files,
            "zero_fractions": self._zeros,
            "dead_rows": self._dead_rows,
            "sites": sites,
        }
        write_atomically(self._folder / MANIFEST, canonical_json(manifest) + "\n")


def file_name(block: int) -> str:
    """The file of decoder block `block`."""
    return f"block-{block:04d}.safetensors"


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # what a full disk looks like through safetensors
        raise OSError(f"cannot write {path}: {error}") from None
