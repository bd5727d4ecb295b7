"""Is it the diversity of tokens that helps? TAMP's allocator against its controls, on a model that reads images.

    python benchmarks/run.py controls

The controls are the same diversities dealt out at random, and keys and values kept dense: much of what the published
rule does on grouped queries follows from sizes alone. All lose half of the weights by Wanda, on three seeds, which
draw the model, the samples and the dealing. The model is tiny and random: what it shows of trained ones is little.
Source: multimodal allocation chapter, sections 1.2 and 7.12.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from evoprune.fitness.adapters import list_sites
from evoprune.fitness.allocating import allocate_model
from evoprune.fitness.allocators import configured
from evoprune.fitness.evaluation import evaluate_language_model
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.pruning import prune_model
from evoprune.fitness.samples import Samples
from evoprune.fitness.statistics import Statistics, collect_statistics
from evoprune.metrics.criterion import CRITERIA
from evoprune.metrics.records import MaskRule
from figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.multimodal import encoded, multimodal_tokenizer, tiny_multimodal

SEEDS = (0, 1, 2)
WINS = 2
DEALINGS = 8
CALIBRATION, HELDOUT = 16, 64
WORDS = 24
SPARSITY, CRITERION = 0.5, CRITERIA["wanda"]
PROTECTED = {"dense": "*.k_proj,*.v_proj"}


def model_of(seed: int) -> LanguageModel:
    """A dense model of its own."""
    model = tiny_multimodal(seed=seed)
    return LanguageModel(model, multimodal_tokenizer(), tuple(list_sites(model)), "tiny LLaVA", f"tiny-llava-{seed}")


def samples_of(model: LanguageModel, seed: int, first: int, count: int) -> Samples:
    """Samples of an image and random text that no other seed or place has."""
    batches = [encoded("llava", (1000 * seed + first + place,), words=WORDS) for place in range(count)]
    return Samples(batches, model.model.config)


def divergence(
    seed: int, dense: LanguageModel, collected: Statistics, name: str, parameters: Mapping[str, Any]
) -> float:
    """KL from the dense model, in nats a token, of one pruned as an allocator says."""
    pruned = model_of(seed)
    calibration, heldout = (
        samples_of(dense, seed, 0, CALIBRATION),
        samples_of(dense, seed, CALIBRATION, HELDOUT),
    )
    allocator = configured(name, parameters)
    given: dict[str, Any] = {"criterion": CRITERION, "statistics": collected}
    allocation = allocate_model(pruned, name, allocator, SPARSITY, calibration=calibration, **given)
    prune_model(pruned, CRITERION, MaskRule(SPARSITY), statistics=collected, allocation=allocation)
    found = evaluate_language_model(pruned.model, heldout, dense=dense.model).kl
    assert found is not None
    return found


def compared(seed: int) -> dict[str, float]:
    """KL by what allocates, on one seed; dealt-out diversities are means over `DEALINGS`, of which some are beaten."""
    dense = model_of(seed)
    with tempfile.TemporaryDirectory() as scratch:
        calibration = samples_of(dense, seed, 0, CALIBRATION)
        collected = collect_statistics(dense, calibration, CRITERION.needs, folder=Path(scratch) / "set")
        row = {
            "uniform": divergence(seed, dense, collected, "uniform", {}),
            "K and V dense": divergence(seed, dense, collected, "uniform+", PROTECTED),
        }
        for label, omega in (("DAS", 0), ("size-fair DAS", 1)):
            row[label] = divergence(seed, dense, collected, "das", {"omega": omega})
            dealt = [
                divergence(seed, dense, collected, "das", {"omega": omega, "shuffle": DEALINGS * seed + dealing})
                for dealing in range(1, DEALINGS + 1)
            ]
            row[f"{label}, dealt out"] = statistics.mean(dealt)
            row[f"{label}, of {DEALINGS} beaten"] = sum(row[label] < other for other in dealt)
    return row


def measure() -> list[Figure]:
    torch.set_num_threads(1)
    rows = {seed: compared(seed) for seed in SEEDS}
    width = max(len(label) for label in rows[SEEDS[0]])
    print(f"  {'KL, nats a token':{width}}" + "".join(f"  {f'seed {seed}':>8}" for seed in SEEDS))
    for label in rows[SEEDS[0]]:
        print(f"  {label:{width}}" + "".join(f"  {rows[seed][label]:8.4f}" for seed in SEEDS))
    figures = []
    for label in ("DAS", "size-fair DAS"):
        controls = (f"{label}, dealt out", "K and V dense")
        wins = sum(all(row[label] < row[control] for control in controls) for row in rows.values())
        said = "as many as a claim needs" if wins >= WINS else "no claim"
        print(f"  {label} is ahead of both controls on {wins} of {len(SEEDS)} seeds: {said}")
        details = {str(seed): row for seed, row in rows.items()}
        figures.append(Figure(f"seeds of 3 on which {label} beats its controls", wins, WINS, False, details))
    return figures
