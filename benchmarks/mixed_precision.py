"""Who shares out bits best? Held-out losses of the reference model at equal mean bits.

    python benchmarks/mixed_precision.py                             # minutes on 2 quiet cores
    python benchmarks/mixed_precision.py --means 3 --compressor sparsegpt --seeds 0 1 2

Every matrix keeps all its weights, rounded by a compressor to as many bits as an allocation gives it; uniform stands
where the mean is a level. What a matrix is at a level does not depend on the others, so all levels are made once, from
the dense model, and allocations are put together from them. Seeds draw texts A and B; text C is fixed. Writes
benchmarks/out/mixed_precision.json and prints a table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import evoprune
from evoprune.fitness.allocating import ModelEvidence
from evoprune.fitness.allocators import BitAllocator, Level, configured
from evoprune.fitness.examples import read_side
from evoprune.fitness.mixed_precision import LEVELS, BitTarget, least_cost
from evoprune.fitness.pruning import needed_statistics
from evoprune.metrics.criterion import CRITERIA
from evoprune.metrics.records import Site

OUT = Path(__file__).parent / "out"
CRITERION = CRITERIA["wanda"]
WINDOW, WINDOWS_A, WINDOWS_B = 256, 64, 8
ALLOCATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "cmpq": ("cmpq", {}),
    "cmpq, of matrices": ("cmpq", {"between": "matrix"}),
    "pmpq": ("pmpq", {}),
    "tdmpq": ("tdmpq", {}),
    "dp": ("dp", {}),
    "dp, of losses": ("dp", {"error": "loss"}),
}


class Stored(ModelEvidence):
    """Evidence whose levels are made once."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._made: dict[tuple[str, Level], tuple[Tensor, float]] = {}

    def compressed(self, site: Site, levels: Sequence[Level]) -> Iterator[tuple[Tensor, float]]:
        missing = [level for level in levels if (site.name, level) not in self._made]
        for level, made in zip(missing, super().compressed(site, missing), strict=True):
            self._made[site.name, level] = made
        yield from (self._made[site.name, level] for level in levels)


def say(what: str, done: int, total: int) -> None:
    print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)


@torch.no_grad()
def measure(
    seed: int, means: list[float], bits: tuple[int, ...], labels: list[str], compressor: str, tokens: int
) -> Iterator[dict[str, Any]]:
    """One row per mean and allocation."""
    dense = evoprune.load_model("reference")
    texts = [
        read_side(dense, "corpus", side, window=WINDOW, count=count, seed=seed)
        for side, count in (("A", WINDOWS_A), ("B", WINDOWS_B))
    ]
    statistics = evoprune.collect_statistics(dense, needed_statistics(CRITERION, compressor) | {"H"}, seed=seed)
    evidence = Stored(dense, 0.0, CRITERION, statistics, *texts, say, compressor=compressor)
    sites = evidence.sites
    levels = [[Level(own, 0.0) for own in bits] for _ in sites]
    sizes = [[own * site.weights for own in bits] for site in sites]
    costs = {}
    for label in labels:
        allocator = configured(ALLOCATIONS[label][0], ALLOCATIONS[label][1])
        assert isinstance(allocator, BitAllocator)
        costs[label] = allocator.level_costs(evidence, levels)
    for mean in means:
        target = BitTarget(mean, bits)
        budget = target.budget(sum(site.weights for site in sites))
        chosen = {label: least_cost(costs[label], sizes, budget) for label in labels}
        if mean in bits:
            chosen = {"uniform": [bits.index(int(mean))] * len(sites), **chosen}
        for label, places in chosen.items():
            if label != "uniform" and places == chosen.get("uniform"):
                continue
            weights = [bound.weight() for bound in dense.sites]
            copies = [weight.clone() for weight in weights]
            for site, place, weight in zip(sites, places, weights, strict=True):
                weight.copy_(next(evidence.compressed(site, [Level(bits[place], 0.0)]))[0])
            found = evoprune.evaluate(dense, tokens=tokens)
            for weight, copy in zip(weights, copies, strict=True):
                weight.copy_(copy)
            yield {
                "allocation": label,
                "mean": mean,
                "budget": budget,
                "bits": sum(row[place] for row, place in zip(sizes, places, strict=True)),
                "seed": seed,
                "compressor": compressor,
                "matrices": dict(sorted(Counter(bits[place] for place in places).items())),
                "loss": found.loss,
                "perplexity": found.perplexity,
                "tokens": found.held_out.tokens,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--means", type=float, nargs="+", default=[3, 3.5, 4])
    parser.add_argument("--allocations", nargs="+", default=list(ALLOCATIONS), choices=list(ALLOCATIONS))
    parser.add_argument("--levels", type=int, nargs="+", default=list(LEVELS), help="bits that a matrix may have")
    parser.add_argument("--compressor", default="obq")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tokens", type=int, default=20480, help="of text C")
    given = parser.parse_args()
    torch.set_num_threads(1)
    OUT.mkdir(exist_ok=True)
    rows = []
    print(f"dense: loss {evoprune.evaluate('reference', tokens=given.tokens).loss:.4f}")
    print("| mean bits | allocation | seed | matrices by bits | loss | perplexity |")
    print("| ---: | --- | ---: | --- | ---: | ---: |", flush=True)
    for seed in given.seeds:
        levels = tuple(sorted(given.levels))
        for row in measure(seed, given.means, levels, given.allocations, given.compressor, given.tokens):
            rows.append(row)
            (OUT / "mixed_precision.json").write_text(json.dumps(rows, indent=2) + "\n")
            by_bits = ", ".join(f"{count} of {bits}" for bits, count in row["matrices"].items())
            cells = f"{row['mean']:g} | {row['allocation']} | {seed} | {by_bits}"
            print(f"| {cells} | {row['loss']:.4f} | {row['perplexity']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
