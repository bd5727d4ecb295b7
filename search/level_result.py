"""What results of searches over level vectors share: measuring on held-out text, facts of the run, files to take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from evoprune.metrics.allocation import Allocation, SiteSparsity, slack_of
from evoprune.metrics.allocation_file import read_allocation, write_allocation
from evoprune.metrics.errors import EvopruneError
from evoprune.metrics.files import content_hash
from evoprune.metrics.records import LEVELS
from evoprune.search.calibration import calibration_facts
from evoprune.search.config_allocation import AllocationSearchConfig
from evoprune.search.engine.executor import Job
from evoprune.search.objective_words import objective_facts
from evoprune.search.pooled_search import PooledSearch
from evoprune.search.spaces.ladder import Genome
from evoprune.search.spaces.levels import LevelSpace


def heldout_jobs(identity: str, search: PooledSearch[Any], genomes: Iterable[Genome | None]) -> list[Job]:
    """Jobs that measure genomes on held-out text; None is the dense model."""
    jobs = []
    for genome in genomes:
        levels = None if genome is None else search.space.levels(genome)
        payload = {**search.payload, "levels": levels}
        key = content_hash([identity, "heldout", payload["criterion"], levels])
        jobs.append(Job(key, "heldout", payload))
    return jobs


def sparsities_of(space: LevelSpace, genome: Genome) -> dict[str, float]:
    """What every matrix loses, by name."""
    return {site.name: level / LEVELS for site, level in zip(space.sites, space.levels(genome), strict=True)}


def run_facts(
    config: AllocationSearchConfig, search: PooledSearch[Any], run_id: str, evaluations: int, distinct: int
) -> dict[str, Any]:
    """What ``result.json`` says of the search as a whole.

    Args:
        distinct: different genomes among all births.
    """
    return {
        "run": run_id,
        "kind": "allocation",
        "model": config.model.name,
        "target": f"{config.target.sparsity:g}",
        "metric": config.target.metric,
        "compressor": config.target.compressor,
        "stored_levels": None if config.target.stored is None else list(config.target.stored),
        "granularity": config.target.granularity,
        "drop": config.target.drop,
        "drop_only": config.target.drop_only,
        **objective_facts(config),
        "seed": config.seed,
        "evaluations": evaluations,
        "births": search.births,
        "distinct": distinct,
        "generations": search.last_generation,
        "reasons": dict(sorted(search.reasons.items())),
        "final_tokens": config.searcher.windows * config.data.window,
        "window": config.data.window,
        "data": config.data.source,
        "calibration": calibration_facts(config.data),
        "prunable": sum(site.weights for site in search.space.sites),
    }


def provenance(config: AllocationSearchConfig, result: Mapping[str, Any]) -> dict[str, Any]:
    """What an exported allocation says of its origin, and what `prune` needs to give the same weights again."""
    found = {name: result[name] for name in ("run", "metric", "seed")}
    if config.target.stored is not None:
        found |= {"compressor": config.target.compressor, "threads": config.threads}
    return found


def allocation_of_row(
    row: Mapping[str, Any],
    space: LevelSpace,
    model_class: str,
    budget: float | None,
    allocator: str,
    parameters: Mapping[str, Any],
    fingerprint: str | None,
) -> Allocation:
    """The allocation of a row of a result.

    Args:
        row: has the ``allocation``, by name of the matrices.
        space: has the matrices.
        model_class: what the allocation is of.
        budget: as a fraction of all weights; None is what goes, as it is where the steps of the space are so coarse
            that the budget is met to less than a file may claim.
        allocator: who made it, with its `parameters`.
        fingerprint: of the weights that it was found on, if anybody asks.

    Raises:
        InvalidInput: it does not meet the budget.
    """
    sites = tuple(
        SiteSparsity(site.name, (site.out_features, site.in_features), row["allocation"][site.name])
        for site in space.sites
    )
    if budget is None or space.tolerance > slack_of(sites):
        budget = sum(site.removed for site in sites) / sum(site.weights for site in sites)
    allocation = Allocation(model_class, budget, sites, allocator, parameters, fingerprint)
    allocation.check_budget()
    return allocation


def write_whole(allocation: Allocation, file: Path) -> None:
    """Write an allocation as ``.json`` and read it back.

    Raises:
        EvopruneError: the file does not give it back.
    """
    write_allocation(allocation, file)
    if read_allocation(file) != allocation:
        raise EvopruneError(f"{file} does not give the allocation back")
