"""How good are compressors? Output errors of a synthetic layer, and held-out losses of the reference model.

    python benchmarks/compressor_quality.py                     # the synthetic layer, seconds
    python benchmarks/compressor_quality.py --reference         # also the reference model, minutes on 2 quiet cores
    python benchmarks/compressor_quality.py --reference --seeds 0 1 2

The layer is that of pruners.md 0.4, and its figures stand beside ours; they are of another random layer, so only orders
compare. The reference model is pruned by row with Wanda inside, or by the compressor's own choice of as many weights of
every matrix, with wrappers multiplied out, and not at patterns that a compressor refuses; seeds draw text A; text C is
fixed. Seconds are of the processor, of compressing all matrices. Writes benchmarks/out/compressor_quality.json and
prints tables.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import evoprune
from evoprune.fitness.compressors import COMPRESSORS, AtRunTime, Goal, compress, compressor_of
from evoprune.fitness.pruning import check_rule, mask_rule, needed_statistics, prune_model
from evoprune.metrics.criterion import CRITERIA
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.mask import mask
from evoprune.metrics.records import MaskRule, parse_pattern

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.layers import synthetic_layer

OUT = Path(__file__).parent / "out"
CRITERION = "wanda"
TARGETS = ("0.5", "0.6", "0.7", "2:4")

# Refits of SparseGPT's mask, which no compressor is.
REFITTED = "sparsegpt, refit"
NAMES = ("mask", "refit", "sparsegpt", REFITTED, "obs", "admm", "awp")
CHAPTER = {
    (0.8, "0.5"): (0.0132, 0.0082, 0.0094, 0.0078, 0.0067, 0.0067, 0.0086),
    (0.8, "0.7"): (0.0390, 0.0272, 0.0318, 0.0274, 0.0224, 0.0222, 0.0281),
    (0.8, "2:4"): (0.0246, 0.0151, 0.0169, 0.0143, 0.0141, 0.0132, 0.0158),
    (1.5, "0.7"): (0.0445, 0.0088, 0.0164, 0.0089, 0.0053, 0.0054, 0.0125),
    (1.5, "2:4"): (0.0275, 0.0041, 0.0064, 0.0035, 0.0033, 0.0030, 0.0063),
}
VARIANTS = (
    "awp:ramp=50",
    "obq:bits=4",
    "sparsegpt:bits=4",
    "awp:bits=4",
    "obq:bits=3",
    "sparsegpt:bits=3",
    "awp:bits=3",
)


def wanda_goal(weight: Tensor, gram: Tensor, target: str) -> Goal:
    rule = MaskRule(None, parse_pattern(target)) if ":" in target else MaskRule(float(target))
    return Goal.of_mask(mask(weight.abs() * gram.diagonal().sqrt(), rule), rule.pattern)


def error(spelled: str, weight: Tensor, gram: Tensor, goal: Goal) -> float:
    given = goal if compressor_of(spelled).reads_criterion else replace(goal, mask=None)
    found = compress(spelled, weight, given, {"H": gram})
    assert found.error is not None
    return found.error


def synthetic(seeds: list[int]) -> list[dict[str, Any]]:
    """One row per layer and target: mean errors over seeds by compressor, and the chapter's."""
    rows = []
    for (decay, target), known in CHAPTER.items():
        found: dict[str, list[float]] = {}
        for seed in seeds:
            weight, gram = synthetic_layer(decay, seed=seed)
            goal = wanda_goal(weight, gram, target)
            for name in (*NAMES, *VARIANTS):
                if name != REFITTED:
                    found.setdefault(name, []).append(error(name, weight, gram, goal))
                    continue
                own = compress("sparsegpt", weight, Goal(goal.removed, goal.pattern), {"H": gram}).mask
                found.setdefault(name, []).append(error("refit", weight, gram, Goal.of_mask(own, goal.pattern)))
        ours = {name: sum(errors) / len(errors) for name, errors in found.items()}
        rows.append({"decay": decay, "target": target, "errors": ours, "chapter": dict(zip(NAMES, known, strict=True))})
    return rows


def reference(seeds: list[int], targets: list[str], compressors: list[str], tokens: int) -> Iterator[dict[str, Any]]:
    """One row per seed, target and compressor, on the reference model."""
    dense, criterion = evoprune.load_model("reference"), CRITERIA[CRITERION]
    weights = [bound.weight().clone() for bound in dense.sites]
    for seed in seeds:
        needs = frozenset().union(*(needed_statistics(criterion, name) for name in compressors))
        statistics = evoprune.collect_statistics(dense, needs, seed=seed)
        for target in targets:
            for name in compressors:
                sparsity, pattern = (None, target) if ":" in target else (float(target), None)
                rule = mask_rule(criterion, sparsity, pattern, None, name)
                try:
                    check_rule(dense, rule, name)
                except InvalidInput:
                    continue
                began = time.process_time()
                layers = prune_model(dense, criterion, rule, statistics=statistics, compressor=name)
                seconds = time.process_time() - began
                # The name of what is measured is no key of any cache here, so that the model may change in place.
                loss = evoprune.evaluate(dense, tokens=tokens).loss
                errors = [layer.error for layer in layers if layer.error is not None]
                with torch.no_grad():
                    for bound, weight in zip(dense.sites, weights, strict=True):
                        bound.weight().copy_(weight)
                yield {
                    "seed": seed,
                    "target": target,
                    "compressor": name,
                    "loss": loss,
                    "mean_error": sum(errors) / len(errors),
                    "seconds": seconds,
                }


def synthetic_lines(rows: list[dict[str, Any]]) -> list[str]:
    names = (*NAMES, *VARIANTS)
    lines = ["| decay, target | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for row in rows:
        known = row["chapter"]
        cells = [f"{row['errors'][name]:.4f}" + (f" ({known[name]:.4f})" if name in known else "") for name in names]
        lines.append(f"| {row['decay']}, {row['target']} | " + " | ".join(cells) + " |")
    return lines


def reference_lines(rows: list[dict[str, Any]], dense: float) -> list[str]:
    """Means over seeds: held-out loss, and seconds."""
    targets = list(dict.fromkeys(row["target"] for row in rows))
    lines = [
        f"held-out loss in nats per token (processor seconds); dense {dense:.4f}",
        "| compressor | " + " | ".join(targets) + " |",
        "|---|" + "---|" * len(targets),
    ]
    for name in dict.fromkeys(row["compressor"] for row in rows):
        cells = []
        for target in targets:
            mine = [row for row in rows if (row["compressor"], row["target"]) == (name, target)]
            loss, seconds = (sum(row[key] for row in mine) / max(len(mine), 1) for key in ("loss", "seconds"))
            cells.append(f"{loss:.4f} ({seconds:.1f})" if mine else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", action="store_true", help="also prune the reference model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), help="of the reference model")
    of_weights = [name for name in COMPRESSORS if not isinstance(COMPRESSORS[name], AtRunTime)]
    parser.add_argument("--compressors", nargs="+", default=[*of_weights, "awp:ramp=50"], help="for that model")
    parser.add_argument("--tokens", type=int, default=20480, help="of text C")
    options = parser.parse_args()
    torch.set_num_threads(1)
    OUT.mkdir(exist_ok=True)
    record: dict[str, Any] = {"synthetic": synthetic(options.seeds)}
    file = OUT / "compressor_quality.json"
    file.write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join(synthetic_lines(record["synthetic"])), flush=True)
    if options.reference:
        record["dense"] = evoprune.evaluate("reference", tokens=options.tokens).loss
        record["reference"] = []
        for row in reference(options.seeds, options.targets, options.compressors, options.tokens):
            record["reference"].append(row)
            # What there is can be read while the rest runs.
            file.write_text(json.dumps(record, indent=1) + "\n")
        print("\n".join(reference_lines(record["reference"], record["dense"])))


if __name__ == "__main__":
    main()
