"""What a policy search found: its best mask beside the initialisation and published criteria on held-out text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evoprune.fitness.mask_units import UnitTable, kept_cost, shape_of
from evoprune.fitness.policy_file import Calibration, LearnedPolicy, read_policy, to_json, write_policy
from evoprune.fitness.unit_costs import UnitCosts, kept_by
from evoprune.metrics.errors import EvopruneError, InvalidInput
from evoprune.metrics.files import content_hash
from evoprune.metrics.shape import Shape
from evoprune.metrics.shape_file import read_shape, write_shape
from evoprune.search.calibration import calibration_facts
from evoprune.search.config_policy import PolicySearchConfig
from evoprune.search.engine.executor import Job, Outcome
from evoprune.search.mask_words import spelled
from evoprune.search.objective_words import objective_facts
from evoprune.search.policy_search import INITIALISATION, Mode, PolicySearch
from evoprune.search.result import failure, paired_difference, summary
from evoprune.search.rundir import RunDirectory


class PolicyComparison:
    """The best mask beside the initialisation, and beside what published criteria choose at the same cost.

    Args:
        config: of the run.
        identity: hash of everything that an evaluation depends on beside its mask.
        search: at its end.
        table: the units.
        costs: of the model's parts; None where matrices are masked in a pattern.
        run: what it is a run of.

    Raises:
        InvalidInput: no mask has a loss.
    """

    def __init__(
        self,
        config: PolicySearchConfig,
        identity: str,
        search: PolicySearch,
        table: UnitTable,
        costs: UnitCosts | None,
        run: RunDirectory,
    ) -> None:
        if search.best is None:
            raise InvalidInput("no mask could be measured; `evoprune show` counts the reasons")
        self._config = config
        self._identity = identity
        self._search = search
        self._best: Mode = search.best
        self._table = table
        self._costs = costs
        self._run = run
        self._entrants: list[str] = []

    def jobs(self) -> list[Job]:
        search = self._search
        entrants: dict[str, dict[str, Any]] = {
            "dense": {"kept": None},
            "winner": {"kept": self._best.kept},
            INITIALISATION: {"kept": search.initialisation.kept},
            **{name: {"kept": mode.kept} for name, mode in search.starts.items()},
        }
        if self._costs is not None:
            fraction = 1 - self._cost(self._best.kept) / self._costs.dense
            for name in self._config.searcher.baselines:
                entrants[name] = {
                    "criterion": name,
                    "spread": None,
                    "costs": self._costs.to_json(),
                    "fraction": fraction,
                }
        self._entrants = list(entrants)
        return [
            Job(content_hash([self._identity, "heldout", entrant]), "heldout", {**search.payload, **entrant})
            for entrant in entrants.values()
        ]

    def result(self, run_id: str, evaluations: int, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        losses: dict[str, Mapping[str, Any]] = {}
        for name, outcome in zip(self._entrants, outcomes, strict=True):
            if outcome.status == "ok":
                losses[name] = outcome.values
            elif name in ("dense", "winner"):
                raise failure(outcome)
        config, search, best = self._config, self._search, self._best
        searcher, table, rows = config.searcher, self._table, unit_rows(self._table)
        modes = {INITIALISATION: search.initialisation, **search.starts}
        # Of others the fitness is that on less text.
        compared = {mode.kept: mode.fitness for mode in search.finals}
        return {
            "run": run_id,
            "kind": "policy",
            "model": config.model.name,
            "target": config.target.pattern or f"{config.target.sparsity:g}",
            "cost": config.target.cost,
            "budget": config.target.budget,
            "masker": config.masker,
            "units": {"n": table.n, "hash": table.hash, "rows": rows},
            **objective_facts(config),
            "searcher": searcher.name,
            "prior": searcher.prior,
            "samples": searcher.samples,
            "seed": config.seed,
            "evaluations": evaluations,
            "births": search.births,
            "distinct": len({line["mask"] for line in self._run.history()}),
            "steps": search.step,
            "reasons": dict(sorted(search.reasons.items())),
            "batch_tokens": searcher.batch * config.data.window,
            "final_tokens": config.text_windows * config.data.window,
            "window": config.data.window,
            "data": config.data.source,
            "calibration": calibration_facts(config.data),
            "dense_cost": table.dense,
            "rest_cost": table.rest,
            "dense": {"heldout": summary(losses["dense"])},
            "baselines": [
                {
                    "name": name,
                    "fitness": compared.get(modes[name].kept) if name in modes else None,
                    "cost": self._cost_of(losses[name], modes.get(name)),
                    "heldout": summary(losses[name]),
                    "winner_minus_this": paired_difference(losses["winner"], losses[name]),
                }
                for name in self._entrants
                if name in losses and name not in ("dense", "winner")
            ],
            "best": {
                "birth": best.birth,
                "step": best.step,
                "fitness": best.fitness,
                "stderr": best.stderr,
                "policy": {"kept": best.kept, **spelled(table.unpacked(best.kept), config.masker, rows)},
                "shape": self._shape_rows(best),
                "cost": self._cost(best.kept),
                "removed": table.dense - self._cost(best.kept),
                "heldout": summary(losses["winner"]),
            },
            "front": [],
        }

    def export(self, run: RunDirectory, result: Mapping[str, Any]) -> None:
        """Write the policy and, where one says it, the shape, and read them back.

        Raises:
            EvopruneError: a file does not give the winner back.
        """
        folder = run.path / "export"
        folder.mkdir(exist_ok=True)
        config, table, identity = self._config, self._table, run.identity
        model, fingerprint = identity["model_class"], identity["model_fingerprint"]
        asked = {"sparsity": config.target.sparsity, "pattern": config.target.pattern}
        target = {name: value for name, value in asked.items() if value is not None}
        target |= {"cost": config.target.cost, "run": run.run_id}
        policy = LearnedPolicy(
            model=model,
            fingerprint=fingerprint,
            table=table,
            mask=table.unpacked(self._best.kept),
            probabilities=self._search.learner.probabilities(),
            calibration=Calibration.of(config.context()),
            target=target,
            origin={"run": run.run_id, "seed": config.seed, "step": self._best.step},
        )
        write_policy(policy, folder / "policy.json")
        if to_json(read_policy(folder / "policy.json")) != to_json(policy):
            raise EvopruneError(f"{folder / 'policy.json'} does not give the policy back")
        if (blocks := self._shape(self._best)) is None or self._costs is None:
            return
        shape = Shape(model, fingerprint, blocks, tuple(self._costs.widths), {"method": "none"}, target)
        write_shape(shape, folder / "shape.json")
        if read_shape(folder / "shape.json") != shape:
            raise EvopruneError(f"{folder / 'shape.json'} does not give the shape back")

    def _cost(self, kept: str) -> int:
        """What the heads and MLPs cost that a mask keeps; of masks of matrices, the weights that stay."""
        mask = self._table.unpacked(kept)
        if self._costs is None:
            pattern = self._config.context().pattern
            assert pattern is not None
            return self._table.dense * pattern[0] // pattern[1]
        return kept_cost(self._table, mask, self._costs)

    def _cost_of(self, losses: Mapping[str, Any], mode: Mode | None) -> int:
        if mode is not None:
            return self._cost(mode.kept)
        assert self._costs is not None
        return self._costs.of([tuple(block) for block in losses["kept"]])

    def _shape(self, mode: Mode) -> Any:
        if self._costs is None:
            return None
        return shape_of(self._table, self._table.unpacked(mode.kept), self._costs.widths)

    def _shape_rows(self, mode: Mode) -> list[list[int]] | None:
        """What every block keeps, as [KV groups, query heads in each, neurons]; None where a shape cannot say it."""
        blocks = self._shape(mode)
        return None if blocks is None else [list(kept_by(block)) for block in blocks]


def unit_rows(table: UnitTable) -> list[dict[str, Any]]:
    """What people want to know of the units of each block and kind, or of each matrix."""
    wanted = ("kind", "block", "name", "count", "of", "size")
    return [{name: getattr(row, name) for name in wanted} for row in table.rows]
