"""Joining two sets of statistics, so that calibration can be sharded over machines or extended later."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from evoprune.fitness.gram import inverse_diagonals
from evoprune.fitness.statistics_store import GRAM, SetWriter, Statistics, encode, new_folder
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.files import content_hash
from evoprune.metrics.records import Site

INVERSES = ("Hinv", "Hchol2")


@dataclass(frozen=True, slots=True)
class _Shares:
    """How much of the whole each set is: by sequences and by tokens, each pair of fractions adding up to 1."""

    sequences: tuple[float, float]
    tokens: tuple[float, float]


# How a terminal of the whole follows from those of the parts. X_var and the inverses need more than this.
RULES: dict[str, Callable[[Tensor, Tensor, _Shares], Tensor]] = {
    "X_ss": lambda a, b, share: share.sequences[0] * a + share.sequences[1] * b,
    "Y_ss": lambda a, b, share: share.sequences[0] * a + share.sequences[1] * b,
    "X_l1": lambda a, b, share: share.tokens[0] * a + share.tokens[1] * b,
    "X_mean": lambda a, b, share: share.tokens[0] * a + share.tokens[1] * b,
    "X_max": lambda a, b, share: a.maximum(b),
    "G_l2": lambda a, b, share: a.hypot(b),
    "G_l1": lambda a, b, share: a + b,
    "G_mean": lambda a, b, share: share.sequences[0] * a + share.sequences[1] * b,
    "G_reg": lambda a, b, share: (share.sequences[0] ** 0.5 * a).hypot(share.sequences[1] ** 0.5 * b),
    GRAM: lambda a, b, share: share.tokens[0] * a + share.tokens[1] * b,
}


def merge(first: Statistics, second: Statistics, folder: Path) -> Statistics:
    """The statistics of both sets' texts together, written as the new set `folder`.

    Equal to one pass over both texts up to the precision of the stored values: float32 for vectors and the Gram
    matrix, half precision for gradients.

    Args:
        first: of the same model, in the same settings and with the same names as `second`.
        second: of another text.
        folder: must not exist.

    Raises:
        InvalidInput: the sets do not belong together, or one of their names cannot be merged.
    """
    _refuse_unequal(first, second)
    if folder.exists():
        raise InvalidInput(f"{folder} exists: give a new folder for the merged statistics")
    names = first.manifest["names"]
    sites = [Site(name=facts["name"], kind="", n_blocks=0, **_place(facts)) for facts in first.manifest["sites"]]
    leaders = {facts["name"]: facts["input_of"] for facts in first.manifest["sites"]}
    shares = _Shares(_shares(first.sequences, second.sequences), _shares(first.tokens, second.tokens))
    facts = dict(first.manifest) | {
        "windows": content_hash([first.manifest["windows"], second.manifest["windows"]]),
        "sequences": first.sequences + second.sequences,
        "tokens": first.tokens + second.tokens,
        "provenance": {"merged": [first.manifest["provenance"], second.manifest["provenance"]]},
    }
    with new_folder(folder) as partial:
        writer = SetWriter(partial)
        for block in sorted({site.block for site in sites}):
            tensors: dict[str, Tensor] = {}
            for site in sites:
                if site.block == block:
                    for name, tensor in _merged_site(first, second, site.name, names, shares).items():
                        tensors |= encode(f"{site.name}::{name}", tensor)
            writer.add(block, tensors)
        writer.finish(sites, leaders, facts)
    return Statistics.open(folder, fingerprint=first.manifest["fingerprint"])
