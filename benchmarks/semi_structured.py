"""Is a 2:4 model faster on a GPU? Forward passes with dense layers and with torch's kernels for 2:4.

    python benchmarks/semi_structured.py                             # the reference model
    python benchmarks/semi_structured.py MODEL --rows 4096           # a folder or a Hub id, pruned to 2:4 by magnitude

Every matrix alone on so many rows of inputs, of each size once, then the whole model; medians of turns that both take.
Needs a GPU of compute capability 8.0 or newer, and ends with one line elsewhere. Writes
benchmarks/out/semi_structured.json and prints tables.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import evoprune
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.semi_structured import best_kernels
from evoprune.metrics.errors import InvalidInput

OUT = Path(__file__).parent / "out"
TURNS, WARM = 30, 5


def milliseconds(run: Callable[[], object]) -> float:
    """Of one call, on the device's own clock."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end))


def compared(dense: Callable[[], object], sparse: Callable[[], object]) -> dict[str, float]:
    """Medians of both, in turns, in milliseconds; and how many times as fast the second is."""
    turns: tuple[list[float], list[float]] = ([], [])
    for turn in range(WARM + TURNS):
        times = [milliseconds(run) for run in (dense, sparse)]
        if turn >= WARM:
            for kept, time in zip(turns, times, strict=True):
                kept.append(time)
    medians = [statistics.median(kept) for kept in turns]
    return {"dense": medians[0], "2:4": medians[1], "speedup": medians[0] / medians[1]}


def matrices(dense: LanguageModel, sparse: LanguageModel, converted: set[str], rows: int) -> list[dict[str, Any]]:
    """One row for each size of matrix that was converted."""
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for mine, theirs in zip(dense.sites, sparse.sites, strict=True):
        shape = (mine.site.out_features, mine.site.in_features)
        if mine.site.name in converted and shape not in found:
            inputs = torch.randn(rows, shape[1], dtype=torch.bfloat16, device="cuda")
            layers = mine.module, sparse.model.get_submodule(theirs.site.name)
            times = compared(partial(layers[0], inputs), partial(layers[1], inputs))
            found[shape] = {"matrix": mine.site.kind, "shape": shape, **times}
    return list(found.values())


def logits(model: nn.Module, text: Tensor) -> Tensor:
    found: Tensor = model(input_ids=text, use_cache=False).logits
    return found.float()


@torch.no_grad()
def measure(name: str, rows: int, window: int) -> dict[str, Any]:
    """Everything, for one model."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = evoprune.load_model(name, dtype="bfloat16", device=device)
    dense, sparse = (evoprune.prune(loaded, metric="magnitude", pattern="2:4").language_model for _ in range(2))
    found = evoprune.to_semi_structured(sparse)
    print(found.summary(), file=sys.stderr)
    text = torch.randint(1, dense.model.config.vocab_size, (max(rows // window, 1), window), device="cuda")
    before, after = logits(dense.model, text), logits(sparse.model, text)
    return {
        "model": name,
        "device": torch.cuda.get_device_name(),
        "kernels": best_kernels().__name__,
        "rows": rows,
        "converted": len(found.converted),
        "kept": found.kept,
        "difference": ((after - before).norm() / before.norm()).item(),
        "matrices": matrices(dense, sparse, set(found.converted), rows),
        "whole": compared(lambda: logits(dense.model, text), lambda: logits(sparse.model, text)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="reference")
    parser.add_argument("--rows", type=int, default=4096, help="tokens in a forward pass")
    parser.add_argument("--window", type=int, default=256, help="tokens in a sequence")
    given = parser.parse_args()
    try:
        found = measure(given.model, given.rows, given.window)
    except InvalidInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    OUT.mkdir(exist_ok=True)
    (OUT / "semi_structured.json").write_text(json.dumps(found, indent=2) + "\n")
    print(f"{found['device']}, {found['kernels']}, {found['rows']} rows; logits differ by {found['difference']:.2%}")
    print("| matrix | shape | dense ms | 2:4 ms | speed-up |\n| --- | --- | ---: | ---: | ---: |")
    for row in [*found["matrices"], {"matrix": "whole model", "shape": (), **found["whole"]}]:
        shape = " × ".join(map(str, row["shape"]))
        print(f"| {row['matrix']} | {shape} | {row['dense']:.3f} | {row['2:4']:.3f} | {row['speedup']:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
