"""How good are compressors? Output errors of a synthetic layer, and held-out losses of the reference model.

    python benchmarks/compressor_quality.py                     # the synthetic layer, seconds
    python benchmarks/compressor_quality.py reference           # the reference model, minutes on 2 quiet cores
    python benchmarks/compressor_quality.py reference --seeds 0 1 2
    python benchmarks/compressor_quality.py together            # with metrics and allocations: hours

synthetic: the layer is that of pruners.md 0.4, and its figures stand beside ours; they are of another random layer, so
only orders compare.

reference: the model is pruned by row with Wanda inside, or by the compressor's own choice of as many weights of
every matrix, with wrappers multiplied out, and not at patterns that a compressor refuses; seeds draw text A; text C is
fixed. Seconds are of the processor, of compressing all matrices.

together: the reference model at 60 %, and how much of the loss between Wanda at uniform sparsity and the dense model
each part of a recipe wins back, and all of them: metrics searched for masks and under a refit, allocations searched
with Wanda and masks, under ADMM (which the metric found for masks is tried with too) and under the refit, and both
under the refit, the allocation with the metric that was found. Every row is pruned anew by the files that the searches
left, with statistics of the dense model and in replay. A search that finished before with the same settings is read,
not repeated.

Writes benchmarks/out/compressor_quality.json and prints tables.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import evoprune
from evoprune.fitness.compressors import COMPRESSORS, AtRunTime, Goal, compress, compressor_of
from evoprune.fitness.evaluation import evaluate_language_model
from evoprune.fitness.examples import read_side
from evoprune.fitness.pruning import check_rule, mask_rule, needed_statistics, prune_model
from evoprune.fitness.samples import Sequences
from evoprune.metrics.criterion import CRITERIA
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.mask import mask
from evoprune.metrics.records import MaskRule, parse_pattern
from evoprune.search.config import resolve, resolve_as
from evoprune.search.config_allocation import AllocationSearchConfig
from evoprune.search.result import paired_difference
from evoprune.search.rundir import RunDirectory
from shared import searched

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.layers import synthetic_layer

OUT = Path(__file__).parent / "out"
CRITERION = "wanda"
TARGETS = ("0.5", "0.6", "0.7", "2:4")
PARTS = ("synthetic", "reference", "together")
RUNS = OUT / "compressor"
WINDOW = 256
HELDOUT_WINDOWS = 200
"""Windows of text C for rows of `together`: 51,000 predicted tokens."""

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


@dataclass(frozen=True)
class Recipe:
    """What is pruned together.

    Attributes:
        name: of the row.
        metric: a name, an expression or a file.
        compressor: with its parameters.
        allocation: a file; None for uniform sparsity.
    """

    name: str
    metric: str = CRITERION
    compressor: str = "mask"
    allocation: Path | None = None

    def losses(
        self, options: argparse.Namespace, seed: int, accumulation: Literal["dense", "path"], heldout: Sequences
    ) -> Sequence[float]:
        """Of every window of text C."""
        pruned = evoprune.prune(
            "reference",
            metric=self.metric,
            compressor=self.compressor,
            accumulation=accumulation,
            allocation=self.allocation,
            sparsity=options.sparsity if self.allocation is None else None,
            calibration_sequences=options.calibration_sequences,
            calibration_window=WINDOW,
            seed=seed,
        )
        return evaluate_language_model(pruned.language_model.model, heldout).window_losses


def recipes(options: argparse.Namespace, seed: int) -> Iterator[Recipe]:
    """All rows of one seed, each as soon as its searches are done."""
    refit = options.refit
    common = {
        "seed": seed,
        "target.sparsity": options.sparsity,
        "data.heldout_windows": options.heldout_windows,
        "data.calibration_sequences": options.calibration_sequences,
        "data.window": WINDOW,
        "data.calibration_window": WINDOW,
    }

    def label(what: str, evaluations: int) -> Path:
        sizes = (options.sparsity, seed, evaluations, options.heldout_windows, options.calibration_sequences)
        return RUNS / "-".join([what.replace(":", "_"), *map(str, sizes)])

    def metric(compressor: str) -> RunDirectory:
        changes = {"target.compressor": compressor, "evaluations": options.metric_evaluations}
        config = resolve(overrides=common | changes)
        return searched(config, label(f"metric-{compressor}", options.metric_evaluations))

    def allocation(compressor: str, inside: str = CRITERION, what: str = CRITERION) -> Path:
        changes = {"target.compressor": compressor, "target.metric": inside}
        changes["evaluations"] = options.allocation_evaluations
        config = resolve_as(AllocationSearchConfig, overrides=common | changes)
        run = searched(config, label(f"allocation-{compressor}-{what}", options.allocation_evaluations))
        return run.path / "export" / "allocation.json"

    yield Recipe("wanda")
    masked = metric("mask")
    assert masked.result is not None
    power = next((row["expression"] for row in masked.result["baselines"] if row["name"] == "power"), None)
    if power is not None:
        yield Recipe("power product", power)
    evolved = str(masked.path / "export" / "metric.json")
    yield Recipe("metric", evolved)
    yield Recipe("refit", compressor=refit)
    yield Recipe("admm", compressor="admm")
    yield Recipe("allocation", allocation=allocation("mask"))
    yield Recipe("metric, refit", evolved, refit)
    under = metric(refit)
    assert under.result is not None
    found = str(under.path / "export" / "metric.json")
    yield Recipe("metric for refit, refit", found, refit)
    yield Recipe("refit, allocation for it", CRITERION, refit, allocation(refit))
    for_admm = allocation("admm")
    yield Recipe("admm, allocation for it", compressor="admm", allocation=for_admm)
    yield Recipe("metric, refit, allocation for admm", evolved, refit, for_admm)
    both = allocation(refit, under.result["best"]["expression"], f"metric{options.metric_evaluations}")
    yield Recipe("metric and allocation for refit, refit", found, refit, both)


def together(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row per seed and recipe."""
    model = evoprune.load_model("reference")
    heldout = read_side(model, "corpus", "C", window=WINDOW, count=options.heldout_windows)
    dense = evaluate_language_model(model.model, heldout).loss
    for seed in options.seeds:
        wanda: Sequence[float] = ()
        for recipe in recipes(options, seed):
            losses = {name: recipe.losses(options, seed, name, heldout) for name in ("dense", "path")}
            wanda = wanda or losses["dense"]
            gap = sum(wanda) / len(wanda) - dense
            row: dict[str, Any] = {"seed": seed, "recipe": recipe.name, "dense": dense}
            for name, found in losses.items():
                loss = sum(found) / len(found)
                row[name_of(name)] = {
                    "loss": loss,
                    "closed": (dense + gap - loss) / gap,
                    "minus wanda": paired_difference({"nll": found}, {"nll": wanda}),
                }
            yield row


def name_of(accumulation: str) -> str:
    return {"dense": "as searched", "path": "replayed"}[accumulation]


def together_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Means over seeds: held-out loss, and share of the gap between Wanda and dense that is closed."""
    seeds = {row["seed"] for row in rows}
    names = [name_of(name) for name in ("dense", "path")]
    lines = [
        f"held-out loss in nats per token (share of the gap between wanda and dense {rows[0]['dense']:.4f} that is "
        f"closed), mean over {len(seeds)} seeds",
        "| | " + " | ".join(names) + " |",
        "|---|---|---|",
    ]
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        mine = [row for row in rows if row["recipe"] == recipe]
        cells = []
        for name in names:
            loss, closed = (sum(row[name][key] for row in mine) / len(mine) for key in ("loss", "closed"))
            cells.append(f"{loss:.4f} ({closed:.0%})")
        lines.append(f"| {recipe} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)}; synthetic by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), help="of the reference model")
    of_weights = [name for name in COMPRESSORS if not isinstance(COMPRESSORS[name], AtRunTime)]
    parser.add_argument("--compressors", nargs="+", default=[*of_weights, "awp:ramp=50"], help="for that model")
    parser.add_argument("--tokens", type=int, default=20480, help="of text C, for the part reference")
    apart = parser.add_argument_group("of the part together")
    apart.add_argument("--sparsity", type=float, default=0.6)
    apart.add_argument("--refit", default="refit:steps=10", help="the compressor that metrics are searched under")
    apart.add_argument("--metric-evaluations", type=int, default=500)
    apart.add_argument("--allocation-evaluations", type=int, default=1000)
    apart.add_argument("--heldout-windows", type=int, default=HELDOUT_WINDOWS)
    apart.add_argument("--calibration-sequences", type=int, default=64)
    options = parser.parse_args()
    if unknown := sorted(set(options.parts) - set(PARTS)):
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    torch.set_num_threads(1)
    RUNS.mkdir(parents=True, exist_ok=True)
    file = OUT / "compressor_quality.json"
    record: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    def gathered(name: str, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows of a part, which can be read in the file while the rest runs."""
        record[name] = []
        for row in rows:
            record[name].append(row)
            file.write_text(json.dumps(record, indent=1) + "\n")
        return record[name]

    for part in options.parts or ("synthetic",):
        if part == "synthetic":
            lines = synthetic_lines(gathered(part, synthetic(options.seeds)))
        elif part == "reference":
            record["dense"] = evoprune.evaluate("reference", tokens=options.tokens).loss
            found = reference(options.seeds, options.targets, options.compressors, options.tokens)
            lines = reference_lines(gathered(part, found), record["dense"])
        else:
            lines = together_lines(gathered(part, together(options)))
        print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
