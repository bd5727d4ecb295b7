"""(b) 300 births of a search, over the time of a naive search with the same births, seeds 0 to 2.

The search is the default one. The naive search also keeps model, statistics and teacher resident. It differs by a full
sort for every mask, a reload of the model's weights after every candidate, no duplicate detection and no racing: every
valid birth sees all tokens. That would take hours, so only the best quarter by the first tokens is run to the end: it
holds the best of all, and a token takes as long for the others. Both run in this process on one thread. Times are of
the processor, not of the clock: what else runs on the machine does not count.
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
from evoprune.search.loop import Budget
from evoprune.search.metric_run import MetricRun
from evoprune.search.progress import Progress
from evoprune.search.rundir import RunDirectory
from evoprune.search.worker_session import Resources
from figure import Figure
from shared import Resident, reference_worker

SEEDS = (0, 1, 2)
BIRTHS = 300
FIRST = 48
"""Windows that every birth of the naive search is run on."""
SPARSITY = 0.6


def measure() -> list[Figure]:
    ratios, gaps, details = [], [], []
    for seed in SEEDS:
        config = resolve(overrides={"seed": seed, "data.heldout_windows": 16, "evaluations": 10_000})
        rungs = config.racing.rungs
        worker, evaluator, prepared = reference_worker(seed=seed, rungs=rungs, statistics=config.statistics)
        births, seconds, best = _search(config, worker, prepared)
        naive_seconds, naive = _naive(births, evaluator, rungs[-1])
        naive_best = min(naive, key=lambda losses: losses.mean().item())
        evaluator.apply(Metric(best))
        ours = _divergence(evaluator, 0, rungs[-1])
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
                executor = Resident(worker)
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


def _nothing_asked(jobs: Sequence[Job], *, limited: bool = True, alone: bool = False) -> list[Outcome]:
    """A metric search begins without a job."""
    return []


def _naive(births: list[Expression], evaluator: Evaluator, windows: int) -> tuple[float, list[torch.Tensor]]:
    """(seconds, KL by window of the best quarter of the births)."""
    evaluator.restore()  # the search has left its last candidate in the model
    model = evaluator.language_model.model
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    screened = []
    began = time.process_time()
    for expression in births:
        try:
            _prune(evaluator, expression)
            kl = _divergence(evaluator, 0, FIRST)
            if torch.isfinite(kl).all():
                screened.append((kl.mean().item(), kl, expression))
        except InvalidCandidate:
            pass
        model.load_state_dict(saved)
    seconds = time.process_time() - began
    screened.sort(key=lambda entry: entry[0])
    quarter = screened[: len(screened) // 4]
    losses, to_the_end = [], 0.0
    for _, kl, expression in quarter:
        _prune(evaluator, expression)
        began = time.process_time()
        losses.append(torch.cat([kl, _divergence(evaluator, FIRST, windows)]))
        to_the_end += time.process_time() - began
        model.load_state_dict(saved)
    return seconds + to_the_end * len(screened) / len(quarter), losses


@torch.no_grad()
def _prune(evaluator: Evaluator, expression: Expression) -> None:
    for bound in evaluator.language_model.sites:
        scores = evaluate(expression, evaluator.inputs(bound.site, expression.statistics))
        order = scores.argsort(dim=1, stable=True)[:, : removed_count(SPARSITY, scores.shape[1])]
        bound.weight().scatter_(1, order, 0.0)


def _divergence(evaluator: Evaluator, first: int, last: int) -> torch.Tensor:
    """KL by window of the model as it stands."""
    kl = evaluator.losses(first, last).kl
    assert kl is not None
    return kl
