"""Policy searches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evoprune.metrics.errors import InvalidInput, UnknownName
from evoprune.search.engine.trial_record import Range
from evoprune.search.kinds import BoardKind, files_of
from evoprune.search.trials_policy import PolicyTrials

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from evoprune.search.config_policy import PolicySearchConfig
    from evoprune.search.kinds import Session
    from evoprune.search.policy_search import PolicySearch
    from evoprune.search.rundir import RunDirectory


class PolicyKind:
    """Which units stay, by a distribution over masks."""

    name = "policy"
    winner = "policy"
    endings: tuple[str, ...] = (".json",)
    descriptors: Mapping[str, Range] = PolicyTrials.ranges

    def session(self, config: PolicySearchConfig) -> type[Session]:
        from evoprune.search.policy_run import PolicyRun

        return PolicyRun

    def steps(self, run: RunDirectory) -> list[RunDirectory]:
        return []

    def prices(self, config: PolicySearchConfig) -> Sequence[str]:
        return ("step",)

    def trials(self, config: PolicySearchConfig) -> PolicyTrials:
        return PolicyTrials()

    def counters(self, search: PolicySearch, evaluations: int, steps: Sequence[int]) -> dict[str, int | str]:
        return {"step": search.step}

    def searching_note(
        self, config: PolicySearchConfig, search: PolicySearch, evaluations: int, steps: Sequence[int]
    ) -> str:
        from evoprune.search.board_note import searching_policy_note

        return searching_policy_note(config, search, evaluations)

    def finished_note(self, result: Mapping[str, Any], artifacts: Sequence[str]) -> str:
        from evoprune.search.board_note import finished_policy_note

        return finished_policy_note(result, artifacts)

    def artifacts(self, folder: Path, result: Mapping[str, Any]) -> Iterator[Path]:
        return files_of(folder, "*")

    def progress_of(self, run: RunDirectory) -> dict[str, Any]:
        history = list(run.history())
        best, state = None, run.peek()
        if state is not None and (mode := state["search"]["best"]) is not None:
            from evoprune.metrics.packed import unpacked
            from evoprune.search.config import validated_as
            from evoprune.search.config_policy import PolicySearchConfig
            from evoprune.search.mask_words import spelled

            rows, masker = run.identity["unit_rows"], validated_as(PolicySearchConfig, run.config).masker
            mask = unpacked(mode["kept"], sum(row["count"] for row in rows))
            best = {
                "birth": mode["birth"],
                "step": mode["step"],
                "fitness": mode["fitness"],
                "stderr": mode["stderr"],
                "policy": {"kept": mode["kept"], **spelled(mask, masker, rows)},
                "heldout": None,
            }
        return {
            "evaluations": sum(line["counted"] for line in history),
            "distinct": len({line["mask"] for line in history}),
            "best": best,
        }

    def words(self, best: Mapping[str, Any]) -> str:
        from evoprune.search.tables_policy import policy_text

        return policy_text(best)

    def table(self, result: Mapping[str, Any]) -> Table:
        from evoprune.search.tables import heldout_table

        return heldout_table(result)

    def result_view(self, result: Mapping[str, Any], run: Path) -> list[RenderableType]:
        from evoprune.search import tables_policy

        return tables_policy.result_view(result, run)

    def unfinished_facts(
        self, config: PolicySearchConfig, document: Mapping[str, Any], history: Sequence[Mapping[str, Any]]
    ) -> dict[str, RenderableType]:
        from evoprune.search.tables_policy import unfinished_facts

        return unfinished_facts(config, document, history)

    def exported(self, target: Path) -> str:
        return f"shape{target.suffix}" if target.name.startswith("shape") else f"{self.winner}{target.suffix}"

    def check_export(self, file: Path, result: Mapping[str, Any]) -> None:
        if not file.exists():
            raise InvalidInput(
                "no shape says what this policy keeps, such as different numbers of query heads in the KV groups of a "
                "block: export it under another name, as a policy"
            )
        if file.name == "shape.json":
            from evoprune.fitness.unit_costs import kept_by
            from evoprune.metrics.shape_file import read_shape

            held = [list(kept_by(block)) for block in read_shape(file).blocks] == result["best"]["shape"]
        else:
            from evoprune.fitness.policy_file import read_policy

            policy = read_policy(file)
            held = policy.table.packed(policy.mask) == result["best"]["policy"]["kept"]
        if not held:
            raise InvalidInput(f"{file} does not hold the run's winner: it was changed")

    def write_report(self, run: RunDirectory) -> Path:
        from evoprune.search.report import policy_page

        return policy_page.write_page(run)

    def check_names(self, config: PolicySearchConfig) -> None:
        from evoprune.fitness.maskers import masker_from
        from evoprune.fitness.unit_criteria import UNIT_CRITERIA
        from evoprune.metrics.exported import load_metric
        from evoprune.search.learner_options import learner_options
        from evoprune.search.learners import configured
        from evoprune.search.policies.start import MAPPINGS
        from evoprune.search.policy_start import given_start

        for name in config.searcher.baselines:
            _ = UNIT_CRITERIA[name]
        if config.prior_criterion is None and config.target.pattern is None:
            load_metric(config.searcher.prior)
        for name in config.target.metrics if config.target.pattern is not None else ():
            load_metric(name)
        configured(config.searcher.name, learner_options(config.searcher))
        masker_from(config.masker)
        if config.searcher.mapping not in MAPPINGS:
            raise UnknownName("mapping", config.searcher.mapping, MAPPINGS)
        given_start(config.seed_from)


KIND: BoardKind = PolicyKind()
