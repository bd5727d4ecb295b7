"""Every change to the disk, one after another, for tests that end a process at each."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def count_steps(patch: pytest.MonkeyPatch, at_step: Callable[[int, Callable[[], Any] | None], None]) -> list[int]:
    """Call `at_step(number, half)` before and after every change to the disk; `half` does half a write."""
    steps = [0]

    def wrapped(real: Callable[..., Any], is_write: bool) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            half = (lambda: real(arguments[0], arguments[1][: len(arguments[1]) // 2])) if is_write else None
            at_step(steps[0], half)
            steps[0] += 1
            result = real(*arguments, **options)
            at_step(steps[0], None)
            steps[0] += 1
            return result

        return call

    for owner, name in ((os, "write"), (os, "fsync"), (os, "ftruncate"), (Path, "replace"), (Path, "unlink")):
        patch.setattr(owner, name, wrapped(getattr(owner, name), name == "write"))
    return steps
