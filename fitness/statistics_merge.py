"""Joining two sets of statistics, so that calibration can be sharded over machines or extended later."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from evoprune.fitness.gram import inverse_diagonals
from evoprune.fitness.statistics_reader import Statistics
from evoprune.fitness.statistics_store import GRAM, SetWriter, encode, new_folder
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.files import content_hash

INVERSES = ("Hinv", "Hchol2")
# What must be equal for two sets to belong together.
COMMON = ("fingerprint", "dtype", "attention", "names", "sites")
# What must be equal in their settings.
COMMON_SETTINGS = ("mode", "tokens")


@dataclass(frozen=True, slots=True)
class _Shares:
    """How much of the whole each set is at one site.

    Attributes:
        s, u: by sequences; s + u = 1.
        t, v: by tokens; t + v = 1.
        q, r: by what sums of squares are divided by, sequences or chosen tokens; q + r = 1.
        tokens: tokens of the whole for each of what sums of squares are divided by.
    """

    s: float
    u: float
    t: float
    v: float
    q: float
    r: float
    tokens: float


# How a terminal of the whole follows from those of the parts. X_var and the inverses need another terminal as well.
RULES: dict[str, Callable[[Tensor, Tensor, _Shares], Tensor]] = {
    "X_ss": lambda a, b, of: of.q * a + of.r * b,
    "Y_ss": lambda a, b, of: of.q * a + of.r * b,
    "X_l1": lambda a, b, of: of.t * a + of.v * b,
    "X_mean": lambda a, b, of: of.t * a + of.v * b,
    "X_v": lambda a, b, of: (of.q**0.5 * a).hypot(of.r**0.5 * b),
    "X_l": lambda a, b, of: (of.q**0.5 * a).hypot(of.r**0.5 * b),
    "X_max": lambda a, b, of: a.maximum(b),
    "G_l2": lambda a, b, of: a.hypot(b),
    "G_l1": lambda a, b, of: a + b,
    "G_mean": lambda a, b, of: of.s * a + of.u * b,
    "G_reg": lambda a, b, of: (of.s**0.5 * a).hypot(of.u**0.5 * b),
    GRAM: lambda a, b, of: of.t * a + of.v * b,
}


def merge(first: Statistics, second: Statistics, folder: Path) -> Statistics:
    """The statistics of both sets' texts together, written as the new set `folder`.

    Equal to one pass over both texts up to the precision of the stored values: float32 for vectors and the Gram
    matrix, half precision for gradients. ``Hinv`` and ``Hchol2`` follow from ``H``, which must be there.

    Args:
        first: of the same model and with the same names as `second`.
        second: of another text.
        folder: must not exist.

    Raises:
        InvalidInput: the sets do not belong together, or one of their names cannot be merged.
    """
    _refuse_mismatch(first, second)
    if folder.exists():
        raise InvalidInput(f"{folder} exists: give a new folder for the merged statistics")
    sequences, tokens = first.sequences + second.sequences, first.tokens + second.tokens
    facts = dict(first.manifest) | {
        "windows": content_hash([first.manifest["windows"], second.manifest["windows"]]),
        "sequences": sequences,
        "tokens": tokens,
        "rows": {site: first.rows[site] + second.rows[site] for site in first.rows},
        "provenance": {"merged": [first.manifest["provenance"], second.manifest["provenance"]]},
    }
    sites = first.manifest["sites"]
    with new_folder(folder) as partial:
        writer = SetWriter(partial)
        for block in sorted({site["block"] for site in sites}):
            encoded: dict[str, Tensor] = {}
            for site in sites:
                if site["block"] == block:
                    leads = site["input_of"] == site["name"]
                    names = [name for name in first.manifest["names"] if leads or name[:2] in ("G_", "Y_")]
                    for name, tensor in _merged(first, second, site["name"], names).items():
                        encoded |= encode(f"{site['name']}::{name}", tensor)
            writer.add(block, encoded)
        writer.finish(sites, facts)
    return Statistics.open(folder, fingerprint=first.manifest["fingerprint"])


def _shares(first: Statistics, second: Statistics, site: str) -> _Shares:
    sequences = first.sequences + second.sequences
    s, u = first.sequences / sequences, second.sequences / sequences
    if not first.rows:
        return _Shares(s, u, t=s, v=u, q=s, r=u, tokens=1.0)
    rows = first.rows[site] + second.rows[site]
    t, v = first.rows[site] / rows, second.rows[site] / rows
    if first.manifest["settings"].get("tokens"):
        return _Shares(s, u, t, v, q=t, r=v, tokens=1.0)
    return _Shares(s, u, t, v, q=s, r=u, tokens=rows / sequences)


def _merged(first: Statistics, second: Statistics, site: str, names: list[str]) -> dict[str, Tensor]:
    shares = _shares(first, second, site)
    found: dict[str, Tensor] = {}
    for name in names:
        if name in RULES:
            found[name] = RULES[name](first.tensor(site, name), second.tensor(site, name), shares)
    if "X_var" in names:  # Chan, Golub and LeVeque 1979
        shift = first.tensor(site, "X_mean") - second.tensor(site, "X_mean")
        within = shares.t * first.tensor(site, "X_var") + shares.v * second.tensor(site, "X_var")
        found["X_var"] = within + shares.t * shares.v * shift.square()
    if not set(INVERSES).isdisjoint(names):
        inverses = dict(zip(INVERSES, inverse_diagonals(found[GRAM], shares.tokens), strict=True))
        found |= {name: tensor for name, tensor in inverses.items() if name in names}
    return found


def _refuse_mismatch(first: Statistics, second: Statistics) -> None:
    both = f"{first.folder} and {second.folder}"
    for setting in COMMON_SETTINGS:
        if first.manifest["settings"].get(setting) != second.manifest["settings"].get(setting):
            raise InvalidInput(f"{both} cannot be merged: they differ in the setting {setting}")
    for fact in COMMON:
        if first.manifest.get(fact) != second.manifest.get(fact):
            raise InvalidInput(f"{both} cannot be merged: they differ in {fact}")
    if first.manifest["windows"] == second.manifest["windows"]:
        raise InvalidInput(f"{both} are of the same text: merging would count it twice")
    if not first.tokens or not second.tokens:
        raise InvalidInput(f"{both} cannot be merged: how much text one of them is from is not known")
    for statistics in (first, second):
        if statistics.manifest["settings"].get("mode") == "wanda_fp32":
            raise InvalidInput(f"{statistics.folder} repeats Wanda's running mean bit for bit, which no merge can")
    names = first.manifest["names"]
    if GRAM not in names and not set(INVERSES).isdisjoint(names):
        raise InvalidInput(f"{both} hold no {GRAM}: Hinv and Hchol2 can be merged only where the Gram matrix is kept")
