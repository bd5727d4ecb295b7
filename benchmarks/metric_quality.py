"""Does the search find a better metric? The reference model at 60 % per-row sparsity, seeds 0, 1 and 2.

    python benchmarks/metric_quality.py                    # about an hour on 2 cores
    python benchmarks/metric_quality.py --second FOLDER    # also transfer to another model, from train_model.py

A seed draws texts A and B and the search; text C is fixed, at least 50,000 tokens, and read only here. Random search
gets the same seeds, texts and number of evaluations. The winner's transfer is measured at 50 %, 70 % and 2:4, without
another search, against baselines on the same statistics. Writes benchmarks/out/metric_quality.json and a table.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from evoprune.fitness.context import EvaluationContext
from evoprune.fitness.worker import MetricWorker
from evoprune.metrics.expression import parse
from evoprune.search.config import resolve
from evoprune.search.result import paired_difference, summary
from evoprune.search.rundir import RunDirectory
from evoprune.search.session import start_search
from evoprune.search.worker_session import Resources

OUT = Path(__file__).parent / "out"
SEEDS = (0, 1, 2)
HELDOUT_WINDOWS = 200
TRANSFERS: dict[str, dict[str, Any]] = {
    "50 %": {"sparsity": 0.5},
    "70 %": {"sparsity": 0.7},
    "2:4": {"sparsity": None, "pattern": (2, 4)},
}
COMPARED = ("magnitude", "wanda", "ria", "gblm", "gblm-gradient", "pruner-zero")


def search(searcher: str, seed: int, evaluations: int) -> dict[str, Any]:
    """The result of one search; one that finished before with the same settings is read, not repeated."""
    folder = OUT / "quality" / f"{searcher}-{seed}-{evaluations}"
    if folder.exists():
        result = RunDirectory.open(folder).result
        if result is not None:
            return result
        shutil.rmtree(folder)
    config = resolve(
        overrides={
            "seed": seed,
            "evaluations": evaluations,
            "searcher.name": searcher,
            "data.heldout_windows": HELDOUT_WINDOWS,
        }
    )
    run = start_search(config, Resources(), run_dir=folder)
    assert run.result is not None
    return run.result


def transfer(expressions: dict[str, str], seed: int, model: str = "reference", **rule: Any) -> dict[str, Any]:
    """Held-out numbers of metrics on another target or model, from statistics of the same seed."""
    config = resolve(overrides={"seed": seed, "model.name": model, "data.heldout_windows": HELDOUT_WINDOWS})
    values = {**config.context().to_json(), "rungs": (2,), **rule}
    worker = MetricWorker(EvaluationContext.from_json(values))
    prepared = worker.handle("prepare", {})["name"]
    criteria: dict[str, dict[str, Any] | None] = {"dense": None}
    criteria |= {name: {"name": name} for name in COMPARED}
    criteria |= {name: {"expression": parse(text).to_json()} for name, text in expressions.items()}
    losses = {
        name: worker.handle("heldout", {"prepared": prepared, "criterion": criterion})
        for name, criterion in criteria.items()
    }
    return {
        name: {**summary(found), "winner_minus_this": paired_difference(losses["winner"], found)}
        for name, found in losses.items()
    }


def verdict(results: list[dict[str, Any]]) -> list[str]:
    """What the numbers say, one line a question."""
    lines = []
    for result in results:
        rows = {row["name"]: row for row in result["baselines"]}
        beaten = all(rows[name]["winner_minus_this"]["loss"] < 0 for name in ("wanda", "ria"))
        strong = min(("gblm", "gblm-gradient", "pruner-zero", "power"), key=lambda name: rows[name]["heldout"]["loss"])
        gap = rows[strong]["winner_minus_this"]
        lines.append(
            f"seed {result['seed']}: {'below' if beaten else 'NOT below'} Wanda and RIA; against the best of the "
            f"others ({strong}) {gap['loss']:+.4f} ± {gap['stderr']:.4f}"
        )
    names = [row["name"] for row in results[0]["baselines"]]
    for name in names:
        gaps = [
            next(row for row in result["baselines"] if row["name"] == name)["winner_minus_this"]["loss"]
            for result in results
        ]
        mean = sum(gaps) / len(gaps)
        lines.append(f"mean over seeds, winner minus {name}: {mean:+.4f} (from {min(gaps):+.4f} to {max(gaps):+.4f})")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=int, default=250)
    parser.add_argument("--second", type=Path, help="folder of a second model")
    options = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    evolved = [search("evolution", seed, options.evaluations) for seed in SEEDS]
    drawn = [search("random", seed, options.evaluations) for seed in SEEDS]
    record: dict[str, Any] = {"evolution": evolved, "random": drawn, "transfer": {}}
    lines = verdict(evolved)
    for ours, theirs in zip(evolved, drawn, strict=True):
        better = ours["best"]["fitness"] < theirs["best"]["fitness"]
        lines.append(
            f"seed {ours['seed']}: fitness on B {ours['best']['fitness']:.5f} by evolution, "
            f"{theirs['best']['fitness']:.5f} by random search: {'lower' if better else 'NOT lower'}"
        )
    for result in evolved:
        power = next(row for row in result["baselines"] if row["name"] == "power")
        found = {"winner": result["best"]["expression"], "power": power["expression"]}
        targets = [(name, "reference", rule) for name, rule in TRANSFERS.items()]
        if options.second is not None:
            targets.append(("second model, 60 %", str(options.second), {"sparsity": 0.6}))
        for name, model, rule in targets:
            rows = transfer(found, result["seed"], model, **rule)
            record["transfer"].setdefault(name, []).append(rows)
            gaps = ", ".join(
                f"{other} {rows[other]['winner_minus_this']['loss']:+.4f}" for other in (*COMPARED[1:], "power")
            )
            lines.append(f"seed {result['seed']}, {name}: loss {rows['winner']['loss']:.4f}; winner minus {gaps}")
    (OUT / "metric_quality.json").write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
