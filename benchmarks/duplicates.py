"""(c) How many births need no forward pass: of 5,000 from Pruner-Zero's published generator, and of a default run."""

from __future__ import annotations

import random
from collections import Counter

from evoprune.fitness.prepare import Prepared
from evoprune.metrics.canonical import canonicalise, metric_key
from evoprune.metrics.filters import Limits, reject_reason
from evoprune.metrics.pruner_zero import published_generator, to_core
from evoprune.metrics.records import MaskRule
from evoprune.metrics.signature import rank_signature
from figure import Figure
from shared import reference_worker

BIRTHS = 5000
# The published trees may be larger than what our own search breeds.
LIMITS = Limits(height=32, size=256)


def measure() -> Figure:
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
