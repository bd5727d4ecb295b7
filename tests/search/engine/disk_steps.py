"""Every change to the disk, one after another, for tests that end a process at each."""

from __future__ import annotations

import contextlib
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


def ends_at_step(fatal: int, prepare: Callable[[], Callable[[], object]]) -> None:
    """Work in a child process that ends at step `fatal`, in the middle of it if that is a write.

    Args:
        fatal: a step that `count_steps` counts.
        prepare: called in the child before steps count; returns the work.
    """

    def end(step: int, half: Callable[[], Any] | None) -> None:
        if step == fatal:
            if half is not None:
                half()
            os._exit(9)

    child = os.fork()
    if child == 0:
        # Whatever goes wrong in it, the child must not come back as a second test session.
        with contextlib.suppress(BaseException):
            work = prepare()
            with pytest.MonkeyPatch.context() as patch:
                count_steps(patch, end)
                work()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
