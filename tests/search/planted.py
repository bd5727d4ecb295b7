"""A worker whose fitness is the distance of a candidate's masks from those of a hidden metric, on synthetic layers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from evoprune.metrics.criterion import CRITERIA, Metric
from evoprune.metrics.expression import Expression, from_json, parse
from evoprune.metrics.interpreter import evaluate, free_inputs
from evoprune.metrics.mask import mask
from evoprune.metrics.probe import Probe
from evoprune.metrics.records import MaskRule, Site
from evoprune.search.archive import Archive
from evoprune.search.engine.executor import Executor
from evoprune.search.engine.inline import InlineExecutor
from evoprune.search.engine.journal import EvaluationLog
from evoprune.search.loop import BirthLoop, Budget
from evoprune.search.metric_search import MetricSearch
from evoprune.search.racing.halving import SuccessiveHalving
from evoprune.search.rundir import RunDirectory
from evoprune.search.searchers import SEARCHERS
from evoprune.search.spaces.symbolic import MetricSpace

HIDDEN = "mul(abs(W),mul(powc(X_l2,0.7),powc(G_l2,0.3)))"
RULE = MaskRule(0.5)


def layers(seed: int = 0) -> list[tuple[Site, dict[str, torch.Tensor]]]:
    """Four layers of 48 x 64 with every statistic that the search may read."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for block in range(4):
        site = Site(f"block.{block}.linear", "linear", block, 4, 48, 64)
        weight = torch.randn(48, 64, generator=generator)
        norm = (1.2 * torch.randn(1, 64, generator=generator)).exp()
        gradient = 1e-3 * (torch.randn(48, 64, generator=generator)).exp()
        made.append(
            (
                site,
                {
                    **free_inputs(site, weight, 0.5),
                    "X_l2": norm,
                    "X_ss": norm.square(),
                    "X_max": norm * (0.5 * torch.randn(1, 64, generator=generator)).exp(),
                    "G_l2": gradient,
                    "G_mean": gradient * torch.randn(48, 64, generator=generator),
                },
            )
        )
    return made


def probe() -> Probe:
    """The same layers as a probe."""
    return Probe.build(layers())


class PlantedWorker:
    """Answers ``evaluate`` jobs; a rung shows one layer more.

    Args:
        hidden: the metric to find.
    """

    def __init__(self, hidden: str = HIDDEN) -> None:
        self._layers = layers()
        self._wanted = [mask(evaluate(parse(hidden), inputs), RULE) for _, inputs in self._layers]

    def handle(self, kind: str, payload: dict[str, Any]) -> dict[str, Any]:
        values = self.distances(from_json(payload["criterion"]["expression"]))
        rungs = []
        for rung, last in enumerate((2, 4)):
            rungs.append(sum(values[:last]) / last)
            thresholds = payload["thresholds"]
            if rung < len(thresholds) and thresholds[rung] is not None and rungs[-1] > thresholds[rung]:
                break
        return {"rungs": rungs, "stderr": 0.0, "removed": 0}

    def distances(self, expression: Expression) -> list[float]:
        """Per layer, 1 - intersection over union of the pruned sets."""
        found = []
        for (_, inputs), wanted in zip(self._layers, self._wanted, strict=True):
            keep = mask(evaluate(expression, inputs), RULE)
            both, either = (~keep & ~wanted).sum().item(), (~keep | ~wanted).sum().item()
            found.append(1 - both / either)
        return found


def build(context: dict[str, Any]) -> PlantedWorker:
    """The factory that executors call."""
    return PlantedWorker(context.get("hidden", HIDDEN))


TERMINALS = frozenset({"W", "X_l2", "X_ss", "X_max", "G_l2", "G_mean"})
SEEDS = {
    name: criterion.expression
    for name in CRITERIA
    if isinstance(criterion := CRITERIA[name], Metric) and criterion.needs <= TERMINALS
}


class Session:
    """A search on the planted target in a run folder.

    Args:
        search: `simplify` of the space; `probe` and `dead` of the search.
    """

    def __init__(
        self,
        folder: Path,
        seed: int = 0,
        searcher: str = "evolution",
        window: int = 16,
        executor: Executor | None = None,
        hidden: str = HIDDEN,
        **search: Any,
    ) -> None:
        self.hidden = hidden
        seen = search.pop("probe", None) or probe()
        space = MetricSpace(TERMINALS, simplify=search.pop("simplify", "canonical"), typical=seen.typical)
        archive = Archive()
        options: dict[str, Any] = {} if searcher == "random" else {"power_budget": 0, "population": 64}
        self.search = MetricSearch(
            space,
            SEARCHERS[searcher](space, archive, {"wanda": SEEDS["wanda"], "magnitude": SEEDS["magnitude"]}, **options),
            archive,
            SuccessiveHalving(2),
            seen,
            RULE,
            seed=seed,
            prepared="",
            identity="planted",
            full_ladder=frozenset({"wanda", "random"}),
            **search,
        )
        exists = (folder / "run.json").exists()
        self.run = RunDirectory.open(folder) if exists else RunDirectory.create("metric", {}, {}, run_dir=folder)
        if exists:
            self.run.lock()
        self.log = EvaluationLog(folder / "evaluations.wal")
        self.executor = executor or InlineExecutor("tests.search.planted:build", {"hidden": hidden}, threads=1)
        self.executor.start()
        self.loop = BirthLoop(self.search, self.executor, self.log, self.run, window=window)
        self.loop.restore()

    def go(self, evaluations: int, stop_after: int | None = None, stopping: Callable[[], bool] = lambda: False) -> None:
        """Run; with `stop_after`, ask to stop after so many polls."""
        if stop_after is not None:
            polls = itertools.count()
            stopping = lambda: next(polls) >= stop_after  # noqa: E731
        try:
            self.loop.run(Budget(evaluations, stopping=stopping))
        finally:
            self.executor.close()
            self.log.close()
            self.run.close()

    @property
    def history(self) -> bytes:
        return (self.run.path / "history.jsonl").read_bytes()

    def overlap(self) -> float:
        """Mean intersection over union of the best candidate's pruned sets with the hidden metric's."""
        best = self.search.archive.best
        assert best is not None
        values = PlantedWorker(self.hidden).distances(best.expression)
        return 1 - sum(values) / len(values)


def sign_flip_p(differences: Sequence[float]) -> float:
    """One-sided p-value of a positive mean, by the exact paired sign-flip test over all 2^n sign patterns."""
    flipped = [
        sum(sign * difference for sign, difference in zip(signs, differences, strict=True))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return sum(total >= sum(differences) - 1e-12 for total in flipped) / len(flipped)
