"""(f) Seconds of `import evoprune` and of `evoprune --help`, whole processes, median of five."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from figure import Figure


def measure() -> list[Figure]:
    commands = {
        "import evoprune": [sys.executable, "-c", "import evoprune"],
        "evoprune --help": [sys.executable, "-m", "evoprune", "--help"],
    }
    figures = []
    for name, command in commands.items():
        seconds = []
        for _ in range(6):
            began = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds.append(time.perf_counter() - began)
        figures.append(
            Figure(f"(f) {name}, seconds", statistics.median(seconds[1:]), 1.0, details={"seconds": seconds})
        )
    return figures
