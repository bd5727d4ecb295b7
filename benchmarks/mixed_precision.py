"""Who shares out bits best? Held-out losses of the reference model at equal mean bits.

    python benchmarks/mixed_precision.py                             # minutes on 2 quiet cores
    python benchmarks/mixed_precision.py --means 3 --compressor awp --seeds 0 1 2

Every matrix keeps all its weights, rounded by a compressor to as many bits as an allocator gives it; uniform stands
where the mean is a level. Seeds draw texts A and B; text C is fixed. Writes benchmarks/out/mixed_precision.json and
prints a table.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import evoprune
from evoprune.fitness.mixed_precision import LEVELS
from evoprune.fitness.models import LanguageModel

OUT = Path(__file__).parent / "out"
ALLOCATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "uniform": ("uniform", {}),
    "cmpq": ("cmpq", {}),
    "cmpq, blocks": ("cmpq", {"between": "block"}),
    "pmpq": ("pmpq", {}),
    "tdmpq": ("tdmpq", {}),
    "dp": ("dp", {}),
    "dp, losses": ("dp", {"error": "loss"}),
}


def measure(dense: LanguageModel, label: str, mean: float, compressor: str, seed: int) -> dict[str, Any]:
    """One row of the table."""
    name, parameters = ALLOCATIONS[label]
    began = time.process_time()
    pruned = evoprune.prune(
        dense, bits=mean, allocation=name, allocation_parameters=parameters, compressor=compressor, seed=seed
    )
    seconds = time.process_time() - began
    found = evoprune.evaluate(pruned.language_model, dense=dense)
    assert pruned.allocation is not None
    return {
        "allocation": label,
        "mean": mean,
        "reached": pruned.mean_bits,
        "seed": seed,
        "compressor": compressor,
        "matrices": dict(sorted(Counter(pruned.allocation.bits_by_name().values()).items())),
        "perplexity": found.perplexity,
        "kl": found.kl,
        "stderr": found.held_out.stderr,
        "tokens": found.held_out.tokens,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--means", type=float, nargs="+", default=[3, 3.5, 4])
    parser.add_argument("--allocations", nargs="+", default=list(ALLOCATIONS), choices=list(ALLOCATIONS))
    parser.add_argument("--compressor", default="obq")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    given = parser.parse_args()
    dense = evoprune.load_model("reference")
    print(f"dense: perplexity {evoprune.evaluate(dense).perplexity:.4f}", file=sys.stderr)
    rows = []
    print("| mean bits | allocation | seed | matrices by bits | perplexity | KL | seconds |")
    print("| ---: | --- | ---: | --- | ---: | ---: | ---: |")
    for mean in given.means:
        for label in given.allocations:
            if label == "uniform" and mean not in LEVELS:
                continue
            for seed in given.seeds:
                row = measure(dense, label, mean, given.compressor, seed)
                rows.append(row)
                by_bits = ", ".join(f"{count} of {bits}" for bits, count in row["matrices"].items())
                print(
                    f"| {mean:g} | {label} | {seed} | {by_bits} | {row['perplexity']:.3f} | {row['kl']:.4f} "
                    f"| {row['seconds']:.0f} |",
                    flush=True,
                )
    OUT.mkdir(exist_ok=True)
    (OUT / "mixed_precision.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
