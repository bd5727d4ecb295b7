"""An operator and a criterion that write into what they are given, and a worker that watches its statistics meanwhile.

Importing this registers the operator, as a plug-in would, in the driver and in the workers; so no test imports it.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evoprune.fitness.context import EvaluationContext
from evoprune.fitness.evaluator import Evaluator
from evoprune.fitness.worker import MetricWorker
from evoprune.metrics.criterion import CRITERIA, Metric
from evoprune.metrics.expression import parse
from evoprune.metrics.files import content_hash
from evoprune.metrics.operators import Operator, define
from evoprune.metrics.records import Site


def halve(x: Tensor) -> Tensor:
    return x.mul_(0.5)


define(Operator("halve", halve, "elementwise", 1, lambda x: x, lambda x: f"\\operatorname{{halve}}({x})"))


CRITERIA.add("halved", Metric(parse("mul(halve(abs(W)),powc(X_l2,0.8))")))  # a seed, as every criterion is


class Spoiler(Metric):
    """Wanda's scores, after which nothing is left of its inputs."""

    def score(self, site: Site, inputs: Mapping[str, Tensor]) -> Tensor:
        scores = super().score(site, inputs).clone()
        for tensor in inputs.values():
            tensor.fill_(7.0)
        return scores


SPOILER = Spoiler(parse("mul(abs(W),X_l2)"))


class WatchedWorker(MetricWorker):
    """Before each evaluation another metric has spoilt all that it was given; after it the checksum is noted."""

    def handle(self, kind: str, payload: dict[str, Any]) -> dict[str, Any]:
        if kind != "evaluate":
            return super().handle(kind, payload)
        wait_for_both()
        evaluator = self.evaluator(payload["prepared"])
        for _ in evaluator.masks(SPOILER):
            pass
        values = super().handle(kind, payload)
        seen = {"pid": os.getpid(), "job": content_hash(payload), "checksum": checksum(evaluator)}
        with Path(os.environ["TEST_CHECKSUMS"]).open("ab", buffering=0) as file:
            file.write(f"{json.dumps(seen)}\n".encode())
        return values


def checksum(evaluator: Evaluator) -> str:
    """sha256 of every statistic and of every dense weight, as this process reads them."""
    digest = hashlib.sha256()
    for site in evaluator.sites:
        names = evaluator.statistics.names
        tensors = evaluator.inputs(site, names)
        for name in sorted(tensors):
            digest.update(f"{site.name}/{name}".encode())
            digest.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def wait_for_both(seconds: float = 120.0) -> None:
    """Until both workers are made: on a busy machine one would have done it all before the other was there."""
    log, began = Path(os.environ["TEST_CHECKSUMS"]), time.monotonic()
    while len(list(log.parent.glob(f"{log.name}.worker-*"))) < 2 and time.monotonic() - began < seconds:
        time.sleep(0.1)


def build(context: dict[str, Any]) -> WatchedWorker:
    """The factory that executors call."""
    Path(f"{os.environ['TEST_CHECKSUMS']}.worker-{os.getpid()}").touch()
    return WatchedWorker(EvaluationContext.from_json(context))
