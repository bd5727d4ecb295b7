"""What does recovery bring? The reference model without 25 and 50 % of its heads and MLPs, before and after training.

    python benchmarks/recovery.py                    # a quarter of an hour on 2 quiet cores
    python benchmarks/recovery.py --tokens 100000

Units go by the scores of Wanda-sp, the same fraction in every block, weights as they were. Each recovery learns, with
its defaults, from the dense model and from the text alone. Loss and KL are on text C, with the seconds that training
took. Writes benchmarks/out/recovery.json and a line for each.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import evoprune
from evoprune.api import own_copy
from evoprune.calibration import HELD_OUT_TOKENS, TEXT
from evoprune.fitness.evaluation import evaluate_language_model
from evoprune.fitness.forms import cut_model
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.recoveries import RECOVERIES
from evoprune.fitness.recovery import LOSSES, recover, training_windows
from evoprune.fitness.text import token_windows
from evoprune.fitness.unit_choice import choose_units
from evoprune.fitness.unit_costs import unit_costs
from evoprune.fitness.unit_criteria import UNIT_CRITERIA, score_units
from evoprune.metrics.shape import BlockShape
from evoprune.recoveries import DEFAULT_TOKENS

OUT = Path(__file__).parent / "out"
SPARSITIES = (0.25, 0.5)


def rows(dense: LanguageModel, tokens: int) -> Iterator[dict[str, Any]]:
    """Everything measured, one row after another."""
    held_out = token_windows(dense.tokenizer, "corpus", "C", window=TEXT.window)[: HELD_OUT_TOKENS // TEXT.window]
    yield {"model": "dense", **evaluate_language_model(dense.model, held_out).summary()}
    criterion = UNIT_CRITERIA["wanda-sp"]
    scores = score_units(dense, criterion, evoprune.collect_statistics(dense, criterion.needs))
    for sparsity in SPARSITIES:
        shape = choose_units(scores, unit_costs(dense), sparsity)
        cut = smaller(dense, shape)
        before = evaluate_language_model(cut.model, held_out, dense=dense.model)
        yield {"model": f"without {sparsity:.0%}", **before.summary()}
        for name in RECOVERIES:
            for loss in LOSSES:
                cut = smaller(dense, shape)
                windows = training_windows(cut, "corpus", tokens, seed=0)
                began, processor = time.perf_counter(), time.process_time()
                teacher = dense.model if loss == "distill" else None
                done = recover(cut, RECOVERIES[name], windows, dense=teacher)
                seconds = {"seconds": time.perf_counter() - began, "of_processor": time.process_time() - processor}
                after = evaluate_language_model(cut.model, held_out, dense=dense.model).summary()
                what = {"model": f"without {sparsity:.0%}, {name}, {loss}", "trained_on": done.tokens}
                yield {**what, "learning_rate": done.learning_rate, **seconds, **after}


def smaller(dense: LanguageModel, shape: list[BlockShape]) -> LanguageModel:
    return cut_model(own_copy(dense), shape)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=DEFAULT_TOKENS, help="budget of each training")
    options = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    found = []
    for row in rows(evoprune.load_model("reference"), options.tokens):
        found.append(row)
        (OUT / "recovery.json").write_text(json.dumps(found, indent=2) + "\n")
        kl = "" if row["kl"] is None else f"   KL {row['kl']:.4f}"
        took = f"   {row['seconds']:.0f} s" if "seconds" in row else ""
        print(f"{row['model']:32}   loss {row['loss']:.4f}   perplexity {row['perplexity']:8.2f}{kl}{took}", flush=True)


if __name__ == "__main__":
    main()
