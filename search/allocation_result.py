"""What an allocation search found: winner and allocators on held-out text, and the files that the winner leaves in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evoprune.metrics.allocation_file import write_allocation
from evoprune.metrics.errors import InvalidInput
from evoprune.search.allocation_search import AllocationSearch
from evoprune.search.config_allocation import AllocationSearchConfig
from evoprune.search.engine.executor import Job, Outcome
from evoprune.search.level_result import allocation_of_row, heldout_jobs, run_facts, sparsities_of, write_whole
from evoprune.search.pooled_search import Member
from evoprune.search.result import failure, paired_difference, summary
from evoprune.search.rundir import RunDirectory
from evoprune.search.spaces.ladder import Genome


class AllocationComparison:
    """The winner of a search beside the allocators that it started from, all at levels of the same database.

    Args:
        config: of the run.
        identity: hash of everything that an evaluation depends on beside its candidate.
        search: at its end.
        seeds: what allocators ask for, by name; equal ones are one candidate of the search.
        model_class: what the allocation is of.
        distinct: different genomes among all births.

    Raises:
        InvalidInput: no candidate has a fitness.
    """

    def __init__(
        self,
        config: AllocationSearchConfig,
        identity: str,
        search: AllocationSearch,
        seeds: Mapping[str, Genome],
        model_class: str,
        distinct: int,
    ) -> None:
        if search.best is None:
            raise InvalidInput("no candidate could be evaluated; `evoprune show` counts the reasons")
        self._config = config
        self._identity = identity
        self._search = search
        self._best: Member = search.best
        self._seeds = seeds
        self._model_class = model_class
        self._distinct = distinct
        self._fitness = {genome: search.seed_fitness.get(name) for name, genome in search.seeds.items()}
        self._entrants: dict[str, Genome | None] = {"dense": None, "winner": self._best.genome, **seeds}

    def jobs(self) -> list[Job]:
        """Every entrant on held-out text."""
        return heldout_jobs(self._identity, self._search, self._entrants.values())

    def result(self, run_id: str, evaluations: int, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """The content of ``result.json``, from the outcomes of `jobs`.

        Raises:
            EvopruneError: the dense model or the winner could not be measured.
        """
        losses = {}
        for name, outcome in zip(self._entrants, outcomes, strict=True):
            if outcome.status == "ok":
                losses[name] = outcome.values
            elif name in ("dense", "winner"):
                raise failure(outcome)
        config, search, best = self._config, self._search, self._best
        return {
            **run_facts(config, search, run_id, evaluations, self._distinct),
            "stage_tokens": [stage.windows * config.data.window for stage in config.searcher.stages],
            "dense": {"heldout": summary(losses["dense"])},
            "baselines": [
                {
                    "name": name,
                    "fitness": self._fitness.get(genome),
                    "allocation": sparsities_of(search.space, genome),
                    "heldout": summary(losses[name]),
                    "winner_minus_this": paired_difference(losses["winner"], losses[name]),
                }
                for name, genome in self._seeds.items()
                if name in losses
            ],
            "best": {
                "birth": best.birth,
                "generation": best.generation,
                "origin": best.origin,
                "fitness": best.kl,
                "stderr": best.stderr,
                "allocation": sparsities_of(search.space, best.genome),
                "removed": search.space.removed(best.genome),
                "heldout": summary(losses["winner"]),
            },
            "front": [],
        }

    def export(self, run: RunDirectory, result: Mapping[str, Any]) -> None:
        """Write the winner as ``allocation.json`` and as EvoPress's text, and read the first back.

        Raises:
            EvopruneError: it does not give the winner back.
        """
        folder = run.path / "export"
        folder.mkdir(exist_ok=True)
        # Where parts go as a whole, the budget is what came nearest to the target.
        budget = None if self._config.target.drop_only else self._config.target.sparsity
        parameters = {name: result[name] for name in ("run", "metric", "seed")}
        space = self._search.space
        winner = allocation_of_row(result["best"], space, self._model_class, budget, "evolution", parameters)
        write_whole(winner, folder / "allocation.json")
        write_allocation(winner, folder / "allocation.txt")
