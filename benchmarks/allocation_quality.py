"""Does the search find a better allocation? The reference model at 60 and 70 %, seeds 0, 1 and 2.

    python benchmarks/allocation_quality.py                     # about an hour on 2 quiet cores
    python benchmarks/allocation_quality.py --metric FILE       # also with an exported metric inside

A seed draws texts A and B and the search; text C is fixed, at least 50,000 tokens, and read only for the result. Every
allocator starts from the same statistics and stands at levels of the same database. Writes
benchmarks/out/allocation_quality.json and a table.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

from evoprune.search.config import resolve_as
from evoprune.search.config_allocation import AllocationSearchConfig
from evoprune.search.result import closed_gap
from evoprune.search.rundir import RunDirectory
from evoprune.search.session import start_search
from evoprune.search.worker_session import Resources

OUT = Path(__file__).parent / "out"
SEEDS = (0, 1, 2)
SPARSITIES = (0.6, 0.7)
HELDOUT_WINDOWS = 200
RIVALS = ("owl", "alpha-pruning", "atp", "das", "das-size-fair", "dp")


def search(metric: str, label: str, sparsity: float, seed: int, evaluations: int) -> dict[str, Any]:
    """The result of one search; one that finished before with the same settings is read, not repeated."""
    folder = OUT / "allocation" / f"{label}-{100 * sparsity:.0f}-{seed}-{evaluations}"
    if folder.exists():
        result = RunDirectory.open(folder).result
        if result is not None:
            return result
        shutil.rmtree(folder)
    config = resolve_as(
        AllocationSearchConfig,
        overrides={
            "seed": seed,
            "evaluations": evaluations,
            "target.sparsity": sparsity,
            "target.metric": metric,
            "data.heldout_windows": HELDOUT_WINDOWS,
        },
    )
    result = start_search(config, Resources(), run_dir=folder).result
    assert result is not None
    return result


def verdict(label: str, sparsity: float, results: list[dict[str, Any]]) -> list[str]:
    """What the numbers say, one line a question."""
    head = f"{label} at {100 * sparsity:.0f} %"
    lines = []
    for result in results:
        gaps = {row["name"]: row["winner_minus_this"] for row in result["baselines"]}
        closed = closed_gap(result)
        assert closed is not None
        uniform = gaps["uniform"]
        worst = max((gaps[name]["loss"] / max(gaps[name]["stderr"], 1e-12), name) for name in RIVALS if name in gaps)
        lines.append(
            f"{head}, seed {result['seed']}: loss {result['best']['heldout']['loss']:.4f}, minus uniform "
            f"{uniform['loss']:+.4f} ± {uniform['stderr']:.4f}, {closed:.0%} of the gap to dense closed; nearest rival "
            f"{worst[1]} ({worst[0]:+.1f} standard errors)"
        )
    for name in (row["name"] for row in results[0]["baselines"]):
        found = [
            row["winner_minus_this"]["loss"] for result in results for row in result["baselines"] if row["name"] == name
        ]
        spread = f" (from {min(found):+.4f} to {max(found):+.4f})"
        lines.append(
            f"{head}, mean over {len(found)} seeds, winner minus {name}: {statistics.mean(found):+.4f}{spread}"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=int, default=1000)
    parser.add_argument("--metric", help="an exported metric, to be searched with as well")
    options = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    plans = [("wanda", "wanda", sparsity) for sparsity in SPARSITIES]
    if options.metric is not None:
        plans += [(options.metric, "evolved", sparsity) for sparsity in SPARSITIES]
    record: dict[str, Any] = {}
    lines: list[str] = []
    for metric, label, sparsity in plans:
        results = [search(metric, label, sparsity, seed, options.evaluations) for seed in SEEDS]
        record[f"{label} {sparsity}"] = results
        lines += verdict(label, sparsity, results)
    (OUT / "allocation_quality.json").write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
