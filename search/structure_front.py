"""What a search for a front of shapes found, and a file for each of its members."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from evoprune.fitness.latency_table import LatencyTable, write_table
from evoprune.metrics.files import content_hash
from evoprune.metrics.shape import BlockShape
from evoprune.search.config_structure import StructureSearchConfig
from evoprune.search.engine.executor import Job, Outcome
from evoprune.search.front_result import FrontComparison
from evoprune.search.pareto_search import ParetoSearch
from evoprune.search.result import member_name, summary
from evoprune.search.rundir import RunDirectory
from evoprune.search.spaces.ladder import Genome
from evoprune.search.spaces.structure_range import StructureRange
from evoprune.search.structure_result import (
    ALONE,
    UNIFORM,
    choice,
    heldout_job,
    refit_recipe,
    run_facts,
    units_job,
    units_of,
    write_whole,
)


class StructureFrontComparison(FrontComparison[StructureSearchConfig, StructureRange]):
    """The front of a search beside its seeds, criteria of units alone, and uniform shapes of its members' costs.

    Args:
        config, identity, search, seeds: see `FrontComparison`.
        run: what it is a run of.
        table: of latencies, where these are a cost.

    Raises:
        InvalidInput: no candidate has a fitness.
    """

    reference = UNIFORM

    def __init__(
        self,
        config: StructureSearchConfig,
        identity: str,
        search: ParetoSearch[StructureRange],
        seeds: Sequence[tuple[str, Genome]],
        run: RunDirectory,
        table: LatencyTable | None,
    ) -> None:
        super().__init__(config, identity, search, seeds)
        self._run = run
        self._table = table
        self._blocks: list[tuple[BlockShape, ...]] = []  # of every member
        assert config.target.sparsity_range is not None
        budgets = config.front.spread(config.target.sparsity_range)
        # Criteria count neurons, which have no keys and values.
        names = config.criteria if search.space.costs.quantity != "kv_bytes" else ()
        self._alone = [(name, fraction) for name in names for fraction in budgets]

    def timing_job(self) -> Job:
        assert self._table is not None
        spelled = self._search.space.spelled
        shapes = [None, *(spelled(self._search.front[at].member.genome) for at in self._chosen)]
        payload = {"pass": self._table.work.to_json(), "shapes": shapes}
        return Job(content_hash([self._identity, "whole-latency", payload]), "whole-latency", payload)

    def heldout_jobs(self, genomes: Iterable[Genome | None]) -> list[Job]:
        spelled, payload = self._search.space.spelled, self._search.payload
        entrants = [{"shape": None if genome is None else spelled(genome)} for genome in genomes]
        return [heldout_job(self._identity, payload, entrant) for entrant in entrants]

    def jobs(self) -> list[Job]:
        """Every entrant on held-out text, criteria alone there too, and the units of every member."""
        space, payload = self._search.space, self._search.payload
        choices = [choice(space.costs, fraction, name, None) for name, fraction in self._alone]
        shapes = [space.spelled(point.member.genome) for point in self._search.front]
        return [
            *super().jobs(),
            *(heldout_job(self._identity, payload, asked) for asked in choices),
            *(units_job(self._identity, payload, {"shape": shape}) for shape in shapes),
        ]

    def described(self, genome: Genome) -> dict[str, Any]:
        return {"shape": self._search.space.spelled(genome)}

    def reference_near(self, sparsity: float) -> Genome:
        space = self._search.space.at(sparsity)
        return space.near(space.even(), random.Random(0))

    def result(self, run_id: str, evaluations: int, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """The content of ``result.json``, from the outcomes of `jobs`; see `FrontComparison.rows`."""
        config, search = self._config, self._search
        units = len(outcomes) - len(search.front)
        measured = units - len(self._alone)
        self._blocks = [units_of(outcome) for outcome in outcomes[units:]]
        found = {
            **run_facts(config, search, self._run, search.space.costs, evaluations),
            "target": f"{config.target.sparsity:g}",
            "stage_tokens": [config.front.windows * config.data.window],
            **self.rows(outcomes[:measured]),
        }
        alone = zip(self._alone, outcomes[measured:units], strict=True)
        found["baselines"] += [self._by_itself(name, outcome) for (name, _), outcome in alone if outcome.status == "ok"]
        if self._table is not None:
            found["pareto"] |= {**self._table.work.to_json(), "device": self._table.place["device"]}
        return found

    def _by_itself(self, name: str, outcome: Outcome) -> dict[str, Any]:
        """The row of a criterion's own choice of units, with the weights that it leaves them."""
        kept = outcome.values["kept"]
        first, *others = self._search.costs
        return {
            "name": name + ALONE,
            "sparsity": (first.dense - first.of(kept)) / first.dense,
            "cost": first.of(kept),
            **{cost.name: cost.of(kept) for cost in others},
            "fitness": None,
            "shape": kept,
            "heldout": summary(outcome.values),
        }

    def export(self, run: RunDirectory, result: Mapping[str, Any]) -> None:
        """Write every member as ``front/SAVED.json`` and the best as ``shape.json``, and read them back.

        Raises:
            EvopruneError: a file does not give its member back.
        """
        folder = run.path / "export"
        (folder / "front").mkdir(parents=True, exist_ok=True)
        recipe, widths = refit_recipe(self._config), self._search.space.costs.widths
        for row, blocks in zip(result["front"], self._blocks, strict=True):
            files = [folder / "front" / f"{member_name(row)}.json"]
            if row == result["best"]:
                files.append(folder / "shape.json")
            for file in files:
                write_whole(blocks, recipe, self._config, run, widths, {"sparsity": row["sparsity"]}, file)
        if self._table is not None:
            write_table(self._table, folder / "latency.json")
