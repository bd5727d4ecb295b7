"""What work takes, against work of which it is known."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from evoprune.fitness import footprint as module
from evoprune.fitness.footprint import footprint

CPU = torch.device("cpu")
LARGE = 1 << 26


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc")
def test_a_peak_that_is_over_is_seen_and_not_seen_again() -> None:
    with footprint(CPU) as small:
        torch.ones(10)
    with footprint(CPU) as large:
        torch.ones(LARGE, dtype=torch.uint8)
    with footprint(CPU) as after:
        torch.ones(10)
    assert small.peak_bytes is not None and large.peak_bytes is not None and after.peak_bytes is not None
    assert large.peak_bytes > small.peak_bytes + 0.9 * LARGE
    assert after.peak_bytes < small.peak_bytes + 0.5 * LARGE


def test_time_is_that_of_the_block() -> None:
    with footprint(CPU) as took:
        time.sleep(0.02)
    assert took.seconds is not None and 0.02 <= took.seconds < 5


def test_where_the_system_does_not_say_there_is_no_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "_CLEAR", tmp_path / "nowhere" / "clear_refs")
    with footprint(CPU) as took:
        pass
    assert took.peak_bytes is None and took.seconds is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_it_is_what_tensors_took_there() -> None:
    gpu = torch.device("cuda")
    with footprint(gpu) as took:
        torch.ones(LARGE, dtype=torch.uint8, device=gpu)
    assert took.peak_bytes is not None and took.peak_bytes >= LARGE
