"""Speed and memory of evoprune, as ratios within one run.

    python benchmarks/run.py                 # all but the quality studies and those in `LONG`
    python benchmarks/run.py candidate mask  # some of them

Prints a table and writes benchmarks/out/results.json. Each benchmark lives in a file of its own with a function
``measure() -> Figure`` or a list of figures.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import time
from dataclasses import asdict
from pathlib import Path

from figure import Figure

BENCHMARKS = {
    "candidate": "candidate_cost",
    "mask": "mask_speed",
    "startup": "startup",
    "duplicates": "duplicates",
    "memory": "worker_memory",
    "search": "search_speed",
    "levels": "level_cost",
    "structure": "structure_build",
    "compact": "structure_speed",
    "streaming": "streaming_memory",
}
LONG = {
    "scale": "engine_scale",
    "generations": "generation_cost",
    "evopress": "evopress_speed",
    "controls": "multimodal_controls",
}
"""These take over 5 minutes, or judge methods and not this code, and run only when they are named."""
OUT = Path(__file__).parent / "out"


def main() -> None:
    known = {**BENCHMARKS, **LONG}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"any of {', '.join(known)}; all but {', '.join(LONG)} by default"
    )
    names = parser.parse_args().names or list(BENCHMARKS)
    unknown = sorted(set(names) - set(known))
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(known)}")
    OUT.mkdir(exist_ok=True)
    figures: list[Figure] = []
    for name in names:
        began = time.perf_counter()
        print(f"{name} ...", flush=True)
        measured = importlib.import_module(known[name]).measure()
        figures += measured if isinstance(measured, list) else [measured]
        print(f"  {time.perf_counter() - began:.0f} s")
    width = max(len(figure.what) for figure in figures)
    print(f"\n{'':4} {'what':{width}}  {'measured':>9}  target")
    for figure in figures:
        print(f"{'ok' if figure.met else 'MISS':4} {figure.what:{width}}  {figure.value:9.3g}  {figure.target_text}")
    record = {"machine": platform.processor() or platform.machine(), "figures": [asdict(figure) for figure in figures]}
    (OUT / "results.json").write_text(json.dumps(record, indent=2) + "\n")
    raise SystemExit(0 if all(figure.met for figure in figures) else 1)


if __name__ == "__main__":
    main()
