"""Which measurement of a pruned shape predicts what it is worth after recovery? Spearman correlations over shapes.

    python benchmarks/structure_selection.py                     # 7 minutes of processor time, on one core
    python benchmarks/structure_selection.py --shapes 32 --recovery-tokens 400000

Shapes of one budget lie on random walks of level switches that start from the uniform shape and from the one of the
least output errors. Of each: KL as the database leaves it (one-shot), after a path refit, and after short trainings of
output matrices and norms; and then KL after a longer training of all matrices. All on the same windows of text B, and
trained on text A. Processor time is of one measurement, by one thread. Source: layerwise sparsity allocation, sections
5.7 and 8 (check 13). Writes benchmarks/out/structure_selection.json.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evoprune.fitness.dense_stream import CORRECTION
from evoprune.fitness.short_training import Training
from evoprune.fitness.structure_worker import StructureWorker
from evoprune.fitness.unit_costs import UnitCosts
from evoprune.search.breeders.switches import Switches
from evoprune.search.config import resolve_as
from evoprune.search.config_structure import StructureSearchConfig
from evoprune.search.dynamic_program import least_error_genome
from evoprune.search.spaces.ladder import Genome
from evoprune.search.spaces.structure import StructureSpace
from evoprune.search.structure_run import errors_of_choices

OUT = Path(__file__).parent / "out"
SPARSITY = 0.5
WINDOWS = 96
# Tokens and learning rate of each.
SHORT = {"training 10k, 1e-4": (10_240, 1e-4), "training 10k, 1e-3": (10_240, 1e-3)}
LONG_RATE = 1e-3


def walks(space: StructureSpace, starts: Sequence[Genome], count: int) -> list[Genome]:
    """So many different genomes, from each start further and further away."""
    switches, rng = Switches(space, 0), random.Random(0)
    found = dict.fromkeys(starts)
    ends = list(starts)
    while len(found) < count:
        for at, end in enumerate(ends):
            ends[at] = switches.children(end, 1, rng)[0]
            found[ends[at]] = None
    return list(found)[:count]


def ranks(values: Sequence[float]) -> list[int]:
    """Place of each value, 0 for the least."""
    order = sorted(range(len(values)), key=lambda at: values[at])
    return [order.index(at) for at in range(len(values))]


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Rank correlation of values of which no two are equal."""
    return statistics.correlation(ranks(one), ranks(other))


class Bench:
    """One worker, and a budget."""

    def __init__(self) -> None:
        config = resolve_as(StructureSearchConfig, overrides={"target.sparsity": SPARSITY, "searcher.windows": WINDOWS})
        self._worker = StructureWorker(config.context())
        self._named = {
            "prepared": self._worker.handle("prepare", {})["name"],
            **self._worker.handle("database", {"accumulation": config.target.accumulation}),
        }
        asked = {"quantity": "parameters", "batch": 1, "sequence": None}
        costs = UnitCosts.from_json(self._worker.handle("costs", asked))
        self.space = StructureSpace(costs, SPARSITY, heads="both", drop="parts", step=None)
        errors = errors_of_choices(self.space, self._worker.handle("errors", self._named)["errors"])
        rng = random.Random(0)
        self.starts = [self.space.near(self.space.even(), rng), least_error_genome(self.space, errors, rng)]

    def prepare(self, training: Training) -> None:
        """Have the teacher ready, which all shapes share, so that no measurement has its time."""
        self._worker.handle("training", training.to_json())

    def measured(self, genome: Genome, selection: dict[str, Any] | None) -> tuple[float, float]:
        """KL in nats per token, and seconds of processor time."""
        shape, began = self.space.spelled(genome), time.process_time()
        if selection is None:
            asked = {"shape": shape, "parent": shape, "first": 0, "last": WINDOWS}
            kl = self._worker.handle("shape", {**self._named, **asked})["kl"]
        else:
            kl = self._worker.handle("recovered", {**self._named, "shape": shape, "selection": selection})["recovered"]
        return kl, time.process_time() - began


PATH_REFIT = {"method": "path-refit", "correction": CORRECTION}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=int, default=16)
    parser.add_argument("--recovery-tokens", type=int, default=102_400)
    options = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    bench = Bench()
    trainings = {name: Training(tokens, 2048, "outputs", "kl", rate) for name, (tokens, rate) in SHORT.items()}
    trainings["recovery"] = Training(options.recovery_tokens, 2048, "all", "kl", LONG_RATE)
    selections: dict[str, dict[str, Any] | None] = {"one-shot": None, "path-refit": PATH_REFIT}
    selections |= {
        name: {"method": "training-aware", "training": training.to_json()} for name, training in trainings.items()
    }
    genomes = walks(bench.space, bench.starts, options.shapes)
    # Who is in the last stage is alike: the half that one-shot prefers.
    half: list[int] = []
    record: dict[str, Any] = {
        "shapes": [bench.space.spelled(genome) for genome in genomes], "recovery tokens": options.recovery_tokens,
        "windows": WINDOWS, "kl": {}, "seconds": {}, "spearman": {},
    }  # fmt: skip
    kl, seconds = record["kl"], record["seconds"]
    # The recovery comes first, as all others are compared with it.
    for name in ("recovery", *(name for name in selections if name != "recovery")):
        if name in trainings:
            bench.prepare(trainings[name])
        found = [bench.measured(genome, selections[name]) for genome in genomes]
        kl[name] = [value for value, _ in found]
        seconds[name] = statistics.mean(spent for _, spent in found)
        if name == "one-shot":
            half = sorted(range(len(genomes)), key=lambda at: kl["one-shot"][at])[: len(genomes) // 2]
        told = f"{name}: mean KL {statistics.mean(kl[name]):.4f}, {seconds[name]:.1f} s each"
        if half:
            better = spearman(*([values[at] for at in half] for values in (kl[name], kl["recovery"])))
            record["spearman"][name] = {"all": spearman(kl[name], kl["recovery"]), "better half": better}
            told += "; Spearman {all:.2f}, {better half:.2f} in the better half".format(**record["spearman"][name])
        print(told, flush=True)
        # What there is can be read while the rest runs.
        (OUT / "structure_selection.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
