"""(b) 300 births of a search, over the time of a naive search with the same births, seeds 0 to 2.

The naive search also keeps model, statistics and teacher resident. It differs by a full sort for every mask, a reload
of the model's weights after every candidate, no duplicate detection and no racing: every valid birth sees all tokens.
Both run in this process on one thread. Times are of the processor, not of the clock: what else runs on the machine does
not count.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from evoprune.fitness.evaluator import Evaluator
from evoprune.fitness.prepare import Prepared, Summary
from evoprune.metrics.criterion import Metric
from evoprune.metrics.errors import InvalidCandidate
from evoprune.metrics.expression import Expression, parse
from evoprune.metrics.interpreter import evaluate
from evoprune.metrics.records import removed_count
from evoprune.search.config import resolve
from evoprune.search.config_metric import MetricSearchConfig
from evoprune.search.engine.executor import Job, Outcome
from evoprune.search.engine.inline import InlineExecutor
from evoprune.search.loop import Budget
from evoprune.search.metric_run import MetricRun
from evoprune.search.progress import Progress
from evoprune.search.rundir import RunDirectory
from evoprune.search.search_run import Resources
from figure import Figure
from shared import reference_worker

BIRTHS = 300
RUNGS = (4, 16, 48)
SPARSITY = 0.6


def measure() -> list[Figure]:
    ratios, gaps, details = [], [], []
    for seed in (0, 1, 2):
        config = resolve(
            overrides={"seed": seed, "racing.rungs": RUNGS, "data.heldout_windows": 16, "evaluations": 10_000}
        )
        worker, evaluator, prepared = reference_worker(seed=seed, rungs=RUNGS, statistics=config.statistics)
        births, seconds, best = _search(config, worker, prepared)
        naive_seconds, naive = _naive(births, evaluator)
        naive_best = min(naive, key=lambda losses: losses.mean().item())
        ours = evaluator_losses(evaluator, best)
        gap = (ours - naive_best).mean().item()
        error = ((ours - naive_best).std() / len(ours) ** 0.5).item()
        ratios.append(seconds / naive_seconds)
        gaps.append(gap / error if error else 0.0)
        details.append({"seed": seed, "seconds": seconds, "naive_seconds": naive_seconds, "gap": gap, "stderr": error})
    return [
        Figure(
            "(b) time of 300 births / naive search, mean of 3 seeds",
            statistics.mean(ratios),
            0.25,
            True,
            {"runs": details},
        ),
        Figure("(b) best fitness minus naive best, in paired standard errors, worst seed", max(gaps), 1.0),
    ]


def _search(config: MetricSearchConfig, worker: object, prepared: str) -> tuple[list[Expression], float, Expression]:
    """(expressions of all births, seconds, the best) of a real search, in this process, stopped after `BIRTHS`."""
    with tempfile.TemporaryDirectory() as scratch:
        run = RunDirectory.create("metric", config.model_dump(mode="json"), {}, run_dir=Path(scratch) / "run")
        try:
            with Progress(title="") as progress:
                session = MetricRun(run, config, Resources(executor="inline"), progress)
                executor = _Resident(worker)
                summary = Summary.from_json(Prepared.open(prepared).summary())
                search = session.build_search(session.identify(summary), _nothing_asked)
                loop = session.build_loop(search, executor)
                began = time.process_time()
                loop.run(Budget(None, expired=lambda: search.births >= BIRTHS))
                seconds = time.process_time() - began
            expressions = [parse(line["expression"]) for line in run.history() if line["expression"]]
            best = search.archive.best
            assert best is not None
            return expressions, seconds, best.expression
        finally:
            run.close()


def _nothing_asked(jobs: Sequence[Job], *, limited: bool = True) -> list[Outcome]:
    """A metric search begins without a job."""
    return []


class _Resident(InlineExecutor):
    """The worker that exists already."""

    def __init__(self, worker: object) -> None:
        super().__init__("", {})
        self._worker = worker  # type: ignore[assignment]


def evaluator_losses(evaluator: Evaluator, expression: Expression) -> torch.Tensor:
    """KL by window at the top rung."""
    evaluator.apply(Metric(expression))
    kl = evaluator.losses(0, RUNGS[-1]).kl
    assert kl is not None
    return kl


def _naive(births: list[Expression], evaluator: Evaluator) -> tuple[float, list[torch.Tensor]]:
    """(seconds, KL by window of every birth that has one)."""
    model = evaluator.language_model.model
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = []
    began = time.process_time()
    for expression in births:
        try:
            for bound in evaluator.language_model.sites:
                inputs = evaluator.inputs(bound.site, expression.statistics)
                scores = evaluate(expression, inputs)
                removed = removed_count(SPARSITY, scores.shape[1])
                order = scores.argsort(dim=1, stable=True)[:, :removed]
                bound.weight().scatter_(1, order, 0.0)
            kl = evaluator.losses(0, RUNGS[-1]).kl
            assert kl is not None
            if torch.isfinite(kl).all():
                losses.append(kl)
        except InvalidCandidate:
            pass
        model.load_state_dict(saved)
    return time.process_time() - began, losses
