"""A probe: a few rows of real matrices with their statistics, on which metrics are compared before any forward pass.

Only some rows are taken, so reductions over columns or over the matrix are those of these rows, not of the whole
matrix: good for telling metrics apart, not for predicting a mask. Source: symbolic pruning metrics, section 3.4.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.expression import Expression
from evoprune.metrics.files import canonical_json, write_atomically
from evoprune.metrics.interpreter import evaluate
from evoprune.metrics.records import Site
from evoprune.metrics.terminals import TERMINALS

PROBE_SITES = 8
PROBE_ROWS = 16

_FORMAT = "probe/1"
_SYNTHETIC_COLUMNS = 64


@dataclass(frozen=True)
class Probe:
    """Inputs of several matrices.

    Attributes:
        names: of the matrices, in model order; the last one is synthetic: dead columns, equal weights, extreme
            ranges.
        inputs: for each matrix, terminals by name, float32, ready for `evaluate`; the synthetic one has every
            terminal.
    """

    names: tuple[str, ...]
    inputs: tuple[Mapping[str, Tensor], ...]

    @classmethod
    def build(cls, sites: Sequence[tuple[Site, Mapping[str, Tensor]]], rows: int = PROBE_ROWS) -> Probe:
        """A probe of the given matrices, usually those that `spread_sites` picks.

        Args:
            sites: each with its terminals as `evaluate` takes them: Mat [out, in], InVec [1, in], OutVec [out, 1],
                Scal [1, 1].
            rows: how many rows to take of each, evenly spaced.
        """
        names = [site.name for site, _ in sites]
        taken = [_some_rows(inputs, rows) for _, inputs in sites]
        return cls((*names, "synthetic"), (*taken, synthetic_inputs()))

    @property
    def real(self) -> tuple[Mapping[str, Tensor], ...]:
        """The inputs of the matrices of the model."""
        return self.inputs[:-1]

    @cached_property
    def terminals(self) -> frozenset[str]:
        """What every matrix of the model has."""
        return frozenset.intersection(*(frozenset(inputs) for inputs in self.real))

    @cached_property
    def wide(self) -> tuple[Mapping[str, Tensor], ...]:
        """The inputs in float64, with roots that are those of their squares to the last digit."""
        converted = []
        for inputs in self.inputs:
            doubled = {name: tensor.double() for name, tensor in inputs.items()}
            for root, square in (("X_l2", "X_ss"), ("Y_l2", "Y_ss")):
                if root in doubled and square in doubled:
                    doubled[root] = doubled[square].sqrt()
            converted.append(doubled)
        return tuple(converted)

    def typical(self, expression: Expression) -> float:
        """The median magnitude of an expression's scores over the matrices of the model; 0.0 without any."""
        scores = [evaluate(expression, inputs).abs().flatten() for inputs in self.real]
        return torch.cat(scores).median().item() if scores else 0.0

    def save(self, path: Path) -> None:
        """Write the probe as one safetensors file."""
        tensors = {
            f"{index}::{name}": tensor for index, inputs in enumerate(self.inputs) for name, tensor in inputs.items()
        }
        metadata = {"probe": canonical_json({"format": _FORMAT, "names": self.names})}
        write_atomically(path, safetensors.torch.save(tensors, metadata))

    @classmethod
    def load(cls, path: Path) -> Probe:
        """Read a probe.

        Raises:
            InvalidInput: `path` is no probe of this version.
        """
        try:
            return cls.from_bytes(path.read_bytes())
        except (OSError, SafetensorError, ValueError, LookupError) as error:
            raise InvalidInput(f"{path} is no probe: {error}") from None

    @classmethod
    def from_bytes(cls, data: bytes) -> Probe:
        """The probe whose file has this content.

        Raises:
            SafetensorError, ValueError, LookupError: it is none of this version.
        """
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        described = json.loads(header.get("__metadata__", {}).get("probe", "{}"))
        if described.get("format") != _FORMAT:
            raise ValueError(f"not of format {_FORMAT}")
        inputs: list[dict[str, Tensor]] = [{} for _ in described["names"]]
        for key, tensor in safetensors.torch.load(data).items():
            index, _, name = key.partition("::")
            inputs[int(index)][name] = tensor
        return cls(tuple(described["names"]), tuple(inputs))


def spread_sites(sites: Sequence[Site], count: int = PROBE_SITES) -> list[Site]:
    """Up to `count` of the sites, in their order, spread over depth and over kinds."""
    if len(sites) <= count:
        return list(sites)
    kinds = list(dict.fromkeys(site.kind for site in sites))
    picked: set[int] = set()
    for turn in range(count):
        depth = turn / max(count - 1, 1)
        kind = kinds[turn % len(kinds)]
        left = [index for index in range(len(sites)) if index not in picked]
        picked.add(min(left, key=lambda index: (sites[index].kind != kind, abs(sites[index].depth - depth))))
    return [sites[index] for index in sorted(picked)]


def synthetic_inputs() -> dict[str, Tensor]:
    """Every terminal of a made-up matrix that is hard to rank: what real statistics show rarely, and equal columns."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = PROBE_ROWS, _SYNTHETIC_COLUMNS

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weight = normal(rows, columns) * (0.7 * normal(rows, columns)).exp()
    weight[0] *= 1e4
    weight[1] *= 1e-5
    weight[2, ::2] = 0
    gradient = 1e-4 * (3 * normal(rows, columns)).exp()
    gradient[3] = 0
    spread = (2.5 * normal(1, columns)).exp()
    values = {
        "W": weight,
        "X_ss": spread.square(),
        "X_l1": spread * (0.3 * normal(1, columns)).exp(),
        "X_mean": spread * normal(1, columns),
        "X_var": spread.square() * (0.3 * normal(1, columns)).exp(),
        "X_max": 8 * spread * (0.5 * normal(1, columns)).exp(),
        "X_gate_l2": spread * (0.5 * normal(1, columns)).exp(),
        "Y_ss": (3 * normal(rows, 1)).exp(),
        "G_l2": gradient,
        "G_l1": 3 * gradient * (0.3 * normal(rows, columns)).exp(),
        "G_mean": gradient * normal(rows, columns),
        "G_reg": 1e-2 * (2 * normal(rows, columns)).exp(),
        "Hinv": (normal(1, columns)).exp() / (1 + spread.square()),
        "Hchol2": (normal(1, columns)).exp() / (1 + spread.square()),
        "X_v": spread * normal(1, columns).sigmoid().sqrt(),
        "X_l": spread * normal(1, columns).sigmoid().sqrt(),
        "depth": torch.full((1, 1), 0.3),
        "n_in": torch.full((1, 1), float(columns)).log(),
        "n_out": torch.full((1, 1), float(rows)).log(),
        "sparsity": torch.full((1, 1), 0.5),
    }
    dead, first, second = slice(5, 8), 10, 11
    for name, tensor in values.items():
        if tensor.shape[1] == columns and name not in ("W", "Hinv", "Hchol2"):
            tensor[:, dead] = 0
        if tensor.shape[1] == columns:
            tensor[:, second] = tensor[:, first]
    values["X_l2"], values["Y_l2"] = values["X_ss"].sqrt(), values["Y_ss"].sqrt()
    assert values.keys() == TERMINALS.keys()
    return values


def _some_rows(inputs: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
    """Evenly spaced rows of every terminal that has rows."""
    total = inputs["W"].shape[0]
    chosen = [index * total // min(rows, total) for index in range(min(rows, total))]
    return {
        name: (tensor[chosen] if len(tensor) == total > 1 else tensor).float().cpu().contiguous().clone()
        for name, tensor in inputs.items()
    }
