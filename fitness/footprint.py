"""What a piece of work takes: time, and memory at its peak."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
# proc(5): sets the peak resident size of the process back to what it is now.
_RESET_PEAK = "5"


@dataclass
class Footprint:
    """Filled in when the work is done.

    Attributes:
        seconds: of wall-clock time.
        peak_bytes: memory at the peak: on a GPU what tensors took of it, elsewhere what the whole process took, model
            included; None where the system does not say (macOS, or a sandbox without ``/proc``).
    """

    seconds: float | None = None
    peak_bytes: int | None = None


@contextmanager
def footprint(device: torch.device) -> Iterator[Footprint]:
    """Measure what the block takes on `device`."""
    found = Footprint()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    resets = not on_gpu and _reset_peak()
    began = time.perf_counter()
    yield found
    if on_gpu:
        torch.cuda.synchronize(device)
        found.peak_bytes = torch.cuda.max_memory_allocated(device)
    found.seconds = time.perf_counter() - began
    if resets:
        found.peak_bytes = _peak_resident()


def _reset_peak() -> bool:
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _peak_resident() -> int | None:
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else int(found[1]) << 10
