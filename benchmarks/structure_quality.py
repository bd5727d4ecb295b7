"""Does the search find a better shape? The reference model without 25 and 50 % of its heads and MLPs, seeds 0, 1 and 2.

    python benchmarks/structure_quality.py                   # hours on a core
    python benchmarks/structure_quality.py --model FOLDER    # of another model, such as train_model.py makes

A seed draws texts A and B and the search; text C is fixed, at least 50,000 tokens, and read only for the result. All
entrants have the same parameters to within one neuron. FLAP, Wanda-sp and LLM-Pruner choose and compensate as
published; ZipLM is its structured SPDY, one shot, on a database of dense activations, its candidates measured on the
text of the last stage, and on as many tokens in all as those of the search. The uniform shape is measured on both
databases. Winner, ZipLM and uniform are measured after a path refit as well, and the winner and the uniform shape also
after one as published, without the correction. Adds to benchmarks/out/structure_quality.json, and prints a table.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
from pathlib import Path
from typing import Any

from evoprune.fitness.dense_stream import CORRECTION
from evoprune.fitness.structure_worker import StructureWorker
from evoprune.fitness.unit_costs import MlpCost, UnitCosts
from evoprune.search.config import resolve_as
from evoprune.search.config_structure import DEFAULT_SEEDS, StructureSearchConfig
from evoprune.search.dynamic_program import Spdy
from evoprune.search.result import paired_difference, summary
from evoprune.search.rundir import RunDirectory
from evoprune.search.search_run import generation_plan
from evoprune.search.session import start_search
from evoprune.search.spaces.structure import StructureSpace
from evoprune.search.structure_result import ALONE, UNIFORM, choice
from evoprune.search.structure_run import errors_of_choices
from evoprune.search.worker_session import Resources

OUT = Path(__file__).parent / "out"
SEEDS = (0, 1, 2)
SPARSITIES = (0.25, 0.5)
HELDOUT_WINDOWS = 200
PUBLISHED = ("flap", "wanda-sp", "llm-pruner")
# Candidates that SPDY proposes at a time.
BATCH = 16
REFITTED, AS_PUBLISHED = ", path refit", ", path refit as published"


def configured(model: str, sparsity: float, seed: int, evaluations: int, heldout: int) -> StructureSearchConfig:
    return resolve_as(
        StructureSearchConfig,
        overrides={
            "model.name": model,
            "seed": seed,
            "evaluations": evaluations,
            "target.sparsity": sparsity,
            "data.heldout_windows": heldout,
            "searcher.seeds": [*DEFAULT_SEEDS, "llm-pruner"],
        },
    )


def search(config: StructureSearchConfig, label: str) -> dict[str, Any]:
    """The result of one search; one that finished before with the same settings is read, not repeated."""
    target = config.target.sparsity
    assert target is not None
    folder = OUT / "structure" / f"{label}-{100 * target:.0f}-{config.seed}-{config.evaluations}"
    if folder.exists():
        result = RunDirectory.open(folder).result
        if result is not None:
            return result
        shutil.rmtree(folder)
    result = start_search(config, Resources(executor="inline"), run_dir=folder).result
    assert result is not None
    return result


class Entrants:
    """Everybody's held-out losses beside those of a search's winner, on the same texts; one worker does it all."""

    def __init__(self, config: StructureSearchConfig) -> None:
        assert config.target.sparsity is not None
        self._config, self._fraction = config, config.target.sparsity
        self._worker = StructureWorker(config.context())
        prepared = self._worker.handle("prepare", {})["name"]
        self._payloads = {}
        for accumulation in ("dense", "expectation"):
            making = {"prepared": prepared, "accumulation": accumulation}
            self._payloads[accumulation] = {**making, **self._worker.handle("database", making)}
        asked = {"quantity": "parameters", "batch": 1, "sequence": None}
        self.costs = UnitCosts.from_json(self._worker.handle("costs", asked))
        target = config.target
        self._space = StructureSpace(self.costs, self._fraction, heads=target.heads, drop=target.drop, step=target.step)

    def uniform(self) -> list[list[int]]:
        return self._space.spelled(self._space.near(self._space.even(), random.Random(0)))

    def losses(self, accumulation: str, shape: list[list[int]]) -> dict[str, Any]:
        """Of the model cut to a shape, with the weights of a database."""
        return {**self._worker.handle("heldout", {**self._payloads[accumulation], "shape": shape}), "kept": shape}

    def published(self, criterion: str) -> dict[str, Any]:
        """Of the model as a criterion of units leaves it."""
        asked = choice(self.costs, self._fraction, criterion, None)
        return self._worker.handle("heldout", {**self._payloads["dense"], **asked})

    def refitted(self, accumulation: str, shape: list[list[int]], correction: float) -> dict[str, Any]:
        """Of the model cut to a shape, with the units of a database and the weights of a path refit."""
        selection = {"method": "path-refit", "correction": correction}
        asked = {**self._payloads[accumulation], "shape": shape, "selection": selection}
        return {**self._worker.handle("heldout", asked), "kept": shape}

    def ziplm(self, evaluations: int) -> dict[str, Any]:
        """Of the best shape that SPDY finds."""
        payload, windows = self._payloads["dense"], self._config.searcher.stages[-1].windows
        errors = errors_of_choices(self._space, self._worker.handle("errors", payload)["errors"])
        spdy, measured = Spdy(self._space, errors, self._config.seed), 0
        while measured < evaluations and (genomes := spdy.propose(min(BATCH, evaluations - measured))):
            values = []
            for shape in map(self._space.spelled, genomes):
                asked = {**payload, "shape": shape, "parent": self.uniform(), "first": 0, "last": windows}
                values.append(self._worker.handle("shape", asked)["kl"])
            spdy.tell(values)
            measured += len(genomes)
        assert spdy.best is not None
        return {**self.losses("dense", self._space.spelled(spdy.best)), "evaluations": measured}


def compared(config: StructureSearchConfig, label: str) -> dict[str, Any]:
    """One search, and everybody beside its winner."""
    result, entrants = search(config, label), Entrants(config)
    searcher, window = config.searcher, config.data.window
    assert config.evaluations is not None
    tokens = config.evaluations * generation_plan(searcher, window).per_candidate
    winner = entrants.losses("expectation", result["best"]["shape"])
    found = {
        UNIFORM: entrants.losses("expectation", entrants.uniform()),
        **{name + ALONE: entrants.published(name) for name in PUBLISHED},
        "ziplm": entrants.ziplm(round(tokens / (searcher.stages[-1].windows * window))),
    }
    refits = {}
    for name in ("winner", UNIFORM, "ziplm"):
        kept = found.get(name, winner)["kept"]
        accumulation = "dense" if name == "ziplm" else "expectation"
        refits[name + REFITTED] = entrants.refitted(accumulation, kept, CORRECTION)
        if name != "ziplm":
            refits[name + AS_PUBLISHED] = entrants.refitted(accumulation, kept, 0.0)
    dense_built = entrants.losses("dense", entrants.uniform())
    parameters = [entrants.costs.of([tuple(kept) for kept in entry["kept"]]) for entry in (winner, *found.values())]
    neuron = max(mlp.per_neuron for mlp in entrants.costs.mlp if isinstance(mlp, MlpCost))
    return {
        "seed": config.seed,
        "winner": {**summary(winner), "shape": winner["kept"]},
        "rivals": {
            name: {**summary(losses), "shape": losses["kept"], "winner_minus_this": paired_difference(winner, losses)}
            for name, losses in found.items()
        },
        "refits": {
            name: {**summary(losses), "winner_minus_this": paired_difference(winner, losses)}
            for name, losses in refits.items()
        },
        "neurons apart": (max(parameters) - min(parameters)) / neuron,
        "expectation_minus_dense": paired_difference(found[UNIFORM], dense_built),
    }


def verdict(head: str, rows: list[dict[str, Any]]) -> list[str]:
    """What the numbers say, one line a question."""
    lines = []
    for row in rows:
        gaps = {name: rival["winner_minus_this"] for name, rival in row["rivals"].items()}
        nearest = max(gaps, key=lambda name: gaps[name]["loss"])
        beaten = "below all" if gaps[nearest]["loss"] < 0 else "NOT below all"
        built = row["expectation_minus_dense"]
        lines.append(
            f"{head}, seed {row['seed']}: loss {row['winner']['loss']:.4f}, {beaten}; nearest {nearest} "
            f"{gaps[nearest]['loss']:+.4f} ± {gaps[nearest]['stderr']:.4f}; {row['neurons apart']:.2f} neurons apart; "
            f"uniform by expectation minus by dense {built['loss']:+.4f} ± {built['stderr']:.4f}"
        )
    for name in [*rows[0]["rivals"], *rows[0]["refits"]]:
        found = [{**row["rivals"], **row["refits"]}[name] for row in rows]
        losses, apart = [one["loss"] for one in found], [one["winner_minus_this"]["loss"] for one in found]
        spread = f"from {min(apart):+.4f} to {max(apart):+.4f}"
        mean = f"loss {statistics.mean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})"
        lines.append(f"{head}, {len(rows)} seeds, {name}: {mean}, winner minus this {spread}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=int, default=1000)
    parser.add_argument("--model", default="reference", help="the embedded one, or a folder; its name is the label")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--sparsities", type=float, nargs="+", default=SPARSITIES)
    parser.add_argument("--heldout-windows", type=int, default=HELDOUT_WINDOWS)
    options = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    label = Path(options.model).name
    file = OUT / "structure_quality.json"
    record: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    lines: list[str] = []
    for sparsity in options.sparsities:
        rows = []
        for seed in options.seeds:
            config = configured(options.model, sparsity, seed, options.evaluations, options.heldout_windows)
            rows.append(compared(config, label))
            record[f"{label} {sparsity}"] = rows
            # What there is can be read while the rest runs.
            file.write_text(json.dumps(record, indent=1) + "\n")
        lines += verdict(f"{label} at {100 * sparsity:.0f} %", rows)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
