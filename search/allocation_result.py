"""What an allocation search found: winner and allocators on held-out text, and the files that the winner leaves in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evoprune.fitness.card import public_name
from evoprune.metrics.allocation import Allocation
from evoprune.metrics.allocation_file import write_allocation
from evoprune.metrics.allocation_formula import AllocationFormula, Statistics, formula_document, read_formula
from evoprune.metrics.emit_allocation import allocation_source
from evoprune.metrics.errors import EvopruneError, InvalidInput
from evoprune.metrics.files import file_hash, write_atomically
from evoprune.metrics.records import MaskRule
from evoprune.search.config_allocation import AllocationSearchConfig
from evoprune.search.engine.executor import Job, Outcome
from evoprune.search.generation_search import GenerationSearch
from evoprune.search.level_result import (
    allocation_of_row,
    heldout_jobs,
    provenance,
    run_facts,
    sparsities_of,
    write_whole,
)
from evoprune.search.pooled_search import Member
from evoprune.search.replaying import replay_job, replayed_facts
from evoprune.search.result import failure, paired_difference, summary
from evoprune.search.rundir import RunDirectory
from evoprune.search.spaces.ladder import Genome
from evoprune.search.spaces.levels import LevelSpace


class AllocationComparison:
    """The winner of a search beside the allocators that it started from, all at levels of the same database.

    Args:
        config: of the run.
        identity: hash of everything that an evaluation depends on beside its candidate.
        search: at its end.
        seeds: what allocators ask for, by name; equal ones are one candidate of the search.
        model_class: what the allocation is of.
        distinct: different genomes among all births.
        statistics: what formulas read of the matrices, where formulas were searched.

    Raises:
        InvalidInput: no candidate has a fitness.
    """

    def __init__(
        self,
        config: AllocationSearchConfig,
        identity: str,
        search: GenerationSearch[LevelSpace],
        seeds: Mapping[str, Genome],
        model_class: str,
        distinct: int,
        statistics: Statistics | None = None,
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
        self._winner: Mapping[str, Any] = {}
        self._fitness = {genome: search.seed_fitness.get(name) for name, genome in search.seeds.items()}
        self._entrants: dict[str, Genome | None] = {"dense": None, "winner": self._best.genome, **seeds}
        self._statistics = statistics
        # The best of the finals that a formula gives, though an allocator may have won them.
        self._formula = next((member for member in search.finals if search.note(member.genome)), None)
        if self._formula is not None:
            self._entrants["formula"] = self._formula.genome

    def jobs(self) -> list[Job]:
        """Every entrant on held-out text."""
        return heldout_jobs(self._identity, self._search, self._entrants.values())

    def replay(self) -> Job | None:
        """See `Replayable`."""
        target, payload = self._config.target, self._search.payload
        if target.stored is None:
            return None
        row = {"allocation": sparsities_of(self._search.space, self._best.genome)}
        return replay_job(
            self._identity,
            payload["prepared"],
            payload["criterion"],
            target.compressor,
            MaskRule(target.sparsity),
            self._allocation(row, {}, None),
        )

    def replayed(self, outcome: Outcome) -> dict[str, Any]:
        """See `Replayable`."""
        return replayed_facts(outcome, self._winner)

    def _allocation(self, row: Mapping[str, Any], parameters: Mapping[str, Any], fingerprint: str | None) -> Allocation:
        # Where parts go as a whole, the budget is what came nearest to the target.
        budget = None if self._config.target.drop_only else self._config.target.sparsity
        space = self._search.space
        return allocation_of_row(row, space, self._model_class, budget, "evolution", parameters, fingerprint)

    def result(self, run_id: str, evaluations: int, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """The content of ``result.json``, from the outcomes of `jobs`.

        Raises:
            EvopruneError: the dense model or the winner could not be measured.
        """
        losses = {}
        for name, outcome in zip(self._entrants, outcomes, strict=True):
            if outcome.status == "ok":
                losses[name] = outcome.values
            elif name in ("dense", "winner", "formula"):
                raise failure(outcome)
        config, search, best = self._config, self._search, self._best
        self._winner = losses["winner"]
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
            **self._found_formula(losses),
        }

    def _found_formula(self, losses: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """The best formula, as ``formula`` of the result; nothing where none was searched or none has a fitness."""
        if self._formula is None:
            return {}
        known = self._search.note(self._formula.genome)["formula"]
        formula = AllocationFormula.from_text(known["expression"], known["spread"])
        return {
            "formula": {
                "expression": formula.expression.text,
                "spread": formula.spread,
                "text": formula.text,
                "latex": formula.latex,
                "reads": formula.meanings(),
                "how": known["how"],
                "generation": self._formula.generation,
                "wins": self._formula.genome == self._best.genome,
                "fitness": self._formula.kl,
                "stderr": self._formula.stderr,
                "allocation": sparsities_of(self._search.space, self._formula.genome),
                "heldout": summary(losses["formula"]),
                "winner_minus_this": paired_difference(losses["winner"], losses["formula"]),
            }
        }

    def export(self, run: RunDirectory, result: Mapping[str, Any]) -> None:
        """Write the winner as ``allocation.json`` and as EvoPress's text, and read the first back.

        Raises:
            EvopruneError: it does not give the winner back.
        """
        folder = run.path / "export"
        folder.mkdir(exist_ok=True)
        parameters = provenance(self._config, result)
        winner = self._allocation(result["best"], parameters, run.identity["model_fingerprint"])
        write_whole(winner, folder / "allocation.json")
        write_allocation(winner, folder / "allocation.txt")
        if "formula" in result:
            self._export_formula(folder, result)

    def _export_formula(self, folder: Path, result: Mapping[str, Any]) -> None:
        """Write the best formula as ``formula.json`` and ``allocation.py``, and read the first back.

        Raises:
            EvopruneError: it does not give the formula's allocation back.
        """
        assert self._statistics is not None
        found, sites, sparsity = result["formula"], self._search.space.sites, self._config.target.sparsity
        formula = AllocationFormula.from_text(found["expression"], found["spread"])
        model = public_name(result["model"])
        provenance = {name: result[name] for name in ("run", "metric", "target", "seed", "top_k") if name in result}
        title = f"How much each matrix loses, found by evoprune for {model} at a sparsity of {sparsity:g}."
        source = allocation_source(formula, self._statistics, sites, sparsity, title=title)
        write_atomically(folder / "allocation.py", source)
        provenance |= {"model": model, "kl": found["fitness"], "allocation.py": file_hash(folder / "allocation.py")}
        document = formula_document(formula, provenance)
        write_atomically(folder / "formula.json", json.dumps(document, indent=2, ensure_ascii=False) + "\n")
        read = read_formula(folder / "formula.json")
        names = [site.name for site in sites]
        if (
            read is None
            or dict(zip(names, read.sparsities(self._statistics, sites, sparsity), strict=True)) != found["allocation"]
        ):
            raise EvopruneError(f"{folder / 'formula.json'} does not give its allocation back")
