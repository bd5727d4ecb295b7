"""The terminals of allocation formulas, measured on a dense model: the numbers that published allocators work with.

Each measurement gives a few terminals at once and says what it reads, so that a formula costs no more than what is in
it. The sources of the numbers are those of the allocators that use them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from evoprune.fitness.allocators import Evidence, Use, grouped, shared_out
from evoprune.fitness.allocators.alpha_pruning import tail_exponent
from evoprune.fitness.allocators.dsa import block_value
from evoprune.fitness.allocators.owl import outlier_ratio
from evoprune.fitness.compressors import relative_output_error
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.mask import mask
from evoprune.metrics.records import MaskRule
from evoprune.metrics.site_terminals import SITE_TERMINALS, structure

OUTLIER = 5.0
"""A score above so many times the mean is an outlier."""

Numbers = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Measurement:
    """How to get some terminals.

    Attributes:
        gives: their names.
        measure: one number per site for each of them.
        uses, needs: as of an `Allocator`.
    """

    gives: tuple[str, ...]
    measure: Callable[[Evidence], Numbers]
    uses: frozenset[Use] = frozenset()
    needs: frozenset[str] = frozenset()


@dataclass(frozen=True)
class SiteStatistics:
    """What was measured.

    Attributes:
        values: one finite number per site, in model order, by name of a terminal.
        faults: why a terminal is not among them, by name.
    """

    values: Numbers
    faults: Mapping[str, str]


@dataclass(frozen=True)
class Reading:
    """What measurements read beside weights; `uses` and `needs` as of an `Allocator`."""

    uses: frozenset[Use]
    needs: frozenset[str]


def measure_sites(evidence: Evidence, names: Iterable[str]) -> SiteStatistics:
    """The terminals `names` of a model; one that is no finite number for some matrix is left out, with the reason."""
    wanted = set(names)
    values: dict[str, Sequence[float]] = {}
    faults: dict[str, str] = {}
    for measurement in measurements(wanted):
        try:
            found = measurement.measure(evidence)
        except InvalidInput as error:
            faults |= dict.fromkeys(wanted.intersection(measurement.gives), str(error))
            continue
        for name in wanted.intersection(measurement.gives):
            odd = [site for site, value in zip(evidence.sites, found[name], strict=True) if not math.isfinite(value)]
            if odd:
                faults[name] = f"of {odd[0].name} it is no finite number"
            else:
                values[name] = found[name]
    return SiteStatistics(
        {name: values[name] for name in SITE_TERMINALS if name in values}, dict(sorted(faults.items()))
    )


def measurements(names: Iterable[str]) -> list[Measurement]:
    """What has to be measured to know these terminals."""
    wanted = set(names)
    return [measurement for measurement in _MEASUREMENTS if wanted.intersection(measurement.gives)]


def reading(names: Iterable[str]) -> Reading:
    """What measuring these terminals reads."""
    found = measurements(names)
    return Reading(
        frozenset().union(*(measurement.uses for measurement in found)),
        frozenset().union(*(measurement.needs for measurement in found)),
    )


def _scores(evidence: Evidence) -> Numbers:
    sites = evidence.sites
    found = {
        name: [0.0] * len(sites) for name in ("score_mean", "outliers", "outliers_block", "logvar", "logvar_block")
    }
    for block in grouped(sites, "block"):
        scores = [evidence.scores(sites[index]) for index in block]
        for index, matrix in zip(block, scores, strict=True):
            found["score_mean"][index] = matrix.double().mean().item()
            found["outliers"][index] = outlier_ratio([matrix], OUTLIER)
            found["logvar"][index] = block_value(matrix.flatten(), ["abslog"], "var", [])
        together = {
            "outliers_block": outlier_ratio(scores, OUTLIER),
            "logvar_block": block_value(torch.cat([matrix.flatten() for matrix in scores]), ["abslog"], "var", []),
        }
        for name, value in together.items():
            for index in block:
                found[name][index] = value
    return found


def _error(evidence: Evidence) -> Numbers:
    errors = []
    for site in evidence.sites:
        weight = evidence.weight(site)
        pruned = weight.masked_fill(~mask(evidence.scores(site), MaskRule(evidence.target)), 0)
        # The whole Gram matrix, which `dp` takes, would cost as much memory as the weights.
        errors.append(relative_output_error(weight, pruned, input_squares=evidence.statistic(site, "X_ss")) or 0.0)
    return {"error": errors}


def _spectra(evidence: Evidence) -> Numbers:
    exponents = [
        tail_exponent(torch.linalg.svdvals(evidence.weight(site)).double().square()) for site in evidence.sites
    ]
    blocks = grouped(evidence.sites, "block")
    means = [math.fsum(exponents[index] for index in block) / len(block) for block in blocks]
    return {"tail": exponents, "tail_block": shared_out(blocks, means)}


def _weights(evidence: Evidence) -> Numbers:
    return {"weight_rms": [_rms(evidence.weight(site)) for site in evidence.sites]}


def _inputs(evidence: Evidence) -> Numbers:
    return {
        "input_rms": [math.sqrt(evidence.statistic(site, "X_ss").double().mean().item()) for site in evidence.sites]
    }


def _rms(values: torch.Tensor) -> float:
    return math.sqrt(values.double().square().mean().item())


def _diversity(evidence: Evidence) -> Numbers:
    return {"diversity": evidence.diversity("all", True)}


def _of_blocks(name: str, by_block: Callable[[Evidence], Sequence[float]]) -> Callable[[Evidence], Numbers]:
    def measure(evidence: Evidence) -> Numbers:
        values = by_block(evidence)
        return {name: [values[site.block] for site in evidence.sites]}

    return measure


def _structure(evidence: Evidence) -> Numbers:
    return structure(evidence.sites)


_FREE = ("position", "first", "last", "attention", "mlp", "share", "fan_in", "fan_out")
_OF_SCORES = ("score_mean", "outliers", "outliers_block", "logvar", "logvar_block")
_MEASUREMENTS = (
    Measurement(_FREE, _structure),
    Measurement(("weight_rms",), _weights),
    Measurement(("tail", "tail_block"), _spectra),
    Measurement(("input_rms",), _inputs, needs=frozenset({"X_ss"})),
    Measurement(_OF_SCORES, _scores, uses=frozenset({"scores"})),
    Measurement(("error",), _error, uses=frozenset({"scores"}), needs=frozenset({"X_ss"})),
    Measurement(("diversity",), _diversity, uses=frozenset({"outputs"})),
    Measurement(
        ("influence",), _of_blocks("influence", lambda evidence: evidence.influence()), uses=frozenset({"hidden"})
    ),
    Measurement(
        ("ablation",), _of_blocks("ablation", lambda evidence: evidence.losses_without()), uses=frozenset({"loss"})
    ),
)
