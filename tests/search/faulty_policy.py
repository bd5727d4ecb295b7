"""A worker of a policy search that misbehaves as files beside the text say: ``faults/infinite`` and so on."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from evoprune.fitness.context import EvaluationContext
from evoprune.fitness.model_worker import Handler
from evoprune.fitness.policy_worker import PolicyWorker
from evoprune.metrics.files import content_hash


class FaultyWorker(PolicyWorker):
    """As files say that stay: losses of some masks are infinite, or take their time; one mask of a step hangs, whoever
    measures it. As files say that are taken away, once: the process leaves, or dies."""

    @property
    def jobs(self) -> Mapping[str, Handler]:
        return {**super().jobs, "mask": self._faulty}

    def _faulty(self, payload: dict[str, Any]) -> dict[str, Any]:
        faults = Path(self.context.data).parent / "faults"
        if self._once(faults / "leave"):
            sys.exit(3)
        if self._once(faults / "die"):
            os._exit(13)
        asked = content_hash([payload["kept"], payload["windows"]])
        if self.context.rungs[0] == len(payload["windows"]) and (stuck := faults / "stuck").exists():
            if not stuck.read_text():
                stuck.write_text(asked)
            if stuck.read_text() == asked:
                time.sleep(600)
        chance = int(asked[:8], 16)
        if chance % 5 == 1 and (faults / "slow").exists():
            time.sleep(0.2)
        if chance % 6 == 0 and (faults / "infinite").exists():
            norm = self.language_model.model.get_submodule("model.norm")
            hook = norm.register_forward_hook(_infinite)
            try:
                return super().jobs["mask"](payload)
            finally:
                hook.remove()
        return super().jobs["mask"](payload)

    @staticmethod
    def _once(fault: Path) -> bool:
        """Whether the file is there, for one worker of all."""
        try:
            fault.unlink()
        except FileNotFoundError:
            return False
        return True


def _infinite(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output * float("inf")


def build(context: dict[str, Any]) -> FaultyWorker:
    """The factory that executors call."""
    return FaultyWorker(EvaluationContext.from_json(context))
