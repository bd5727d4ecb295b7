"""(c) How many births need no forward pass: of 5,000 from Pruner-Zero's published generator, and of a search.

The search has every default but short rungs and few evaluations. Its answers are checked on the whole model: births
that are called duplicates have the masks of the birth that they are said to be like, all others masks of their own.
"""

from __future__ import annotations

import hashlib
import random
import tempfile
from collections import Counter
from pathlib import Path

from evoprune.fitness.evaluator import Evaluator
from evoprune.fitness.prepare import Prepared
from evoprune.metrics.canonical import canonicalise, metric_key
from evoprune.metrics.criterion import Metric
from evoprune.metrics.filters import Limits, reject_reason
from evoprune.metrics.pruner_zero import published_generator, to_core
from evoprune.metrics.records import MaskRule
from evoprune.metrics.signature import rank_signature
from evoprune.search.config import resolve
from evoprune.search.session import start_search
from evoprune.search.worker_session import Resources
from figure import Figure
from shared import reference_worker

BIRTHS = 5000
# The published trees may be larger than what our own search breeds.
LIMITS = Limits(height=32, size=256)
EVALUATIONS = 60
RUNGS = (1, 2)


def measure() -> list[Figure]:
    return [_published(), _searched()]


def _published() -> Figure:
    _, _, prepared = reference_worker(statistics=("X_ss", "X_l2", "G_l2"), rungs=(2,))
    probe = Prepared.open(prepared).probe()
    rng = random.Random(0)
    outcomes: Counter[str] = Counter()
    keys: set[str] = set()
    signatures: set[str] = set()
    for _ in range(BIRTHS):
        expression = canonicalise(to_core(published_generator(rng)), "row")
        key = metric_key(expression, "row")
        if key in keys:
            outcomes["DUP_KEY"] += 1
            continue
        keys.add(key)
        reason = reject_reason(expression, allowed_terminals=probe.terminals, limits=LIMITS)
        if reason is None:
            signature = rank_signature(expression, probe, MaskRule(0.6))
            reason = signature.reason or ("DUP_SIG" if signature.digest in signatures else None)
            signatures.add(signature.digest)
        outcomes[reason or "forward pass"] += 1
    share = 1 - outcomes["forward pass"] / BIRTHS
    return Figure(
        "(c) share of 5,000 published births answered without a forward pass", share, 0.70, False, dict(outcomes)
    )


def _searched() -> Figure:
    """Whether the answers are right decides; how many there are depends on what is bred, and stands in the details."""
    short = {"racing.rungs": list(RUNGS), "racing.final_windows": 0, "data.heldout_windows": 4}
    config = resolve(overrides={"evaluations": EVALUATIONS, **short})
    with tempfile.TemporaryDirectory() as scratch:
        run = start_search(config, Resources(executor="inline"), run_dir=Path(scratch) / "run")
        births = list(run.history())
    _, evaluator, _ = reference_worker(rungs=RUNGS, statistics=config.statistics, heldout_windows=4)
    masks: dict[int, str] = {}
    outcomes: Counter[str] = Counter()
    wrong = []
    for birth in births:
        number, like = birth["birth"], birth.get("same_as")
        outcomes[(birth["reason"] or "") if "same_as" in birth else "forward pass"] += 1
        if "rungs" not in birth and like not in masks:  # it has no masks, and neither has what it is like
            continue
        found = _masks(evaluator, birth["expression"])
        if (masks[like] != found) if like is not None else (found in masks.values()):
            wrong.append(number)
        masks.setdefault(number, found)
    spared = 1 - outcomes["forward pass"] / len(births)
    return Figure(
        f"(c) births whose masks are not as said, of {len(births)} of a search ({spared:.0%} without a forward pass)",
        len(wrong) / len(births),
        0.0,
        details={"outcomes": dict(outcomes), "spared": spared, "wrong": wrong},
    )


def _masks(evaluator: Evaluator, expression: str) -> str:
    digest = hashlib.sha256()
    for _, keep in evaluator.masks(Metric.from_text(expression)):
        digest.update(keep.numpy().tobytes())
    return digest.hexdigest()
