"""What a policy learns from forward passes alone, beside the released update and the structure search.

    python benchmarks/policy_quality.py                     # all parts: hours on 2 quiet cores
    python benchmarks/policy_quality.py planted pattern     # some of them
    python benchmarks/policy_quality.py structured --seeds 0 --sparsities 0.3

planted: units whose columns of the output matrices are zero, from a flat start: 12 of 32 heads of a small random model,
and KV groups, query heads and blocks of 64 neurons of the reference model; how many the mode of the policy has found
after so many evaluations, beside the released update; in the small model also with the policy cp.
structured: held-out loss of the winner, of the initialisation, of uniform Wanda-sp, of random search over the same
groups and of the released update (single neurons and KV groups, as published) at as many evaluations, and of the
structure search at as many tokens, with and without its refit; of a policy that starts from its shape; and of both
after a path refit.
pattern: 2:4 everywhere, the metric of each matrix learned; beside every metric in all matrices.

A seed draws texts A and B, the policy and what is planted; text C is fixed. Writes benchmarks/out/policy_quality.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import evoprune
from evoprune import CutModel, Pruned
from evoprune.fitness.adapters import rebind
from evoprune.fitness.mask_units import unit_columns, unit_table
from evoprune.fitness.maskers import ByUnits
from evoprune.fitness.models import LanguageModel, load_model
from evoprune.fitness.units import find_units
from evoprune.metrics.packed import unpacked
from evoprune.search.config import resolve_as
from evoprune.search.config_policy import PolicySearchConfig
from evoprune.search.config_structure import StructureSearchConfig
from evoprune.search.engine.journal import EvaluationLog
from evoprune.search.result import check_measured_alike, paired_difference
from evoprune.search.rundir import RunDirectory
from evoprune.search.search_run import generation_plan
from shared import searched

OUT = Path(__file__).parent / "out"
"""Where results go."""
RUNS = OUT / "policy"
PARTS = ("planted", "structured", "pattern")
SEEDS = (0, 1, 2)
SPARSITIES = (0.2, 0.3, 0.5)
HELDOUT_WINDOWS = 200
PLANTED_KINDS = ("kv-group", "query-head", "neurons:64")
PLANTED_SHARE = 0.375
RANDOM = {"searcher.name": "random", "searcher.options": {"parameters": "grouped"}}
"""A control: vectors of the two numbers of each group around the same start, over and over, the best kept."""
UNIFORM = "wanda-sp"
"""The baseline that takes the same share of heads and of neurons from every block."""
RELEASED = {"searcher.name": "released", "searcher.samples": 2}
"""The published update, with two masks a step."""
SMALL_STEPS = {"rate": 0.5, "kl": 0.032, "estimator": "auto"}
"""Of the small model, whose heads differ so little: by default 10, 12 and 11 of 12 are found on seeds 0, 1 and 2."""
FLAT_RELEASED = {"searcher.options": {"rate": 0.1, "start": "problem"}}


def configured(model: str, seed: int, evaluations: int, heldout: int, **changes: Any) -> PolicySearchConfig:
    options = {
        "model.name": model,
        "seed": seed,
        "evaluations": evaluations,
        "data.heldout_windows": heldout,
        **changes,
    }
    return resolve_as(PolicySearchConfig, overrides=options)


# Planted units


@torch.no_grad()
def planted(base: LanguageModel, units: str, share: float, seed: int, folder: Path) -> np.ndarray:
    """Write a copy of a model some units of which give nothing; which ones, [n] bool, True = dead."""
    model = copy.deepcopy(base.model)
    language_model = replace(base, model=model, sites=rebind(base.sites, model))
    table = unit_table(language_model, ByUnits((units,)))
    dead = np.zeros(table.n, dtype=bool)
    dead[random.Random(seed).sample(range(table.n), round(share * table.n))] = True
    bound = {site.site.name: site for site in language_model.sites}
    for name, columns in unit_columns(table, find_units(language_model)).items():
        weight = bound[name].weight()
        weight[:, torch.from_numpy(dead[columns])] = 0
    model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return dead


def small_model(seed: int) -> LanguageModel:
    """4 layers of 8 heads, hidden size 64, weights of standard deviation 0.2 (mask policies, section 9)."""
    torch.manual_seed(seed)
    reference = load_model("reference")
    config = LlamaConfig(
        vocab_size=reference.model.config.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        reference.tokenizer.save_pretrained(folder)
        return load_model(folder)


def found_of(run: RunDirectory, dead: np.ndarray) -> list[tuple[int, int]]:
    """(evaluations, planted units that the mode removes) whenever the mode was measured."""
    counts = []
    for line in run.history():
        if line["stage"] in ("initialisation", "validation"):
            gone = ~unpacked(line["kept"], len(dead))
            counts.append((line["birth"] + 1, int((gone & dead).sum())))
    best = run.result
    assert best is not None
    gone = ~unpacked(best["best"]["policy"]["kept"], len(dead))
    return [*counts, (best["evaluations"], int((gone & dead).sum()))]


def planted_part(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every kind of unit, seed and learner."""
    rows = []
    for label, units in (("small", "query-head"), *(("reference", kind) for kind in PLANTED_KINDS)):
        for seed in options.seeds:
            base = small_model(seed) if label == "small" else load_model("reference")
            folder = RUNS / f"planted-{label}-{units.replace(':', '')}-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            dead = planted(base, units, PLANTED_SHARE, seed, folder)
            ours = {"searcher.options": SMALL_STEPS} if label == "small" else {}
            learners: dict[str, dict[str, Any]] = {"score-function": ours, "released": RELEASED | FLAT_RELEASED}
            if label == "small":
                learners["cp"] = {"searcher.options": {"policy": "cp"}}
            for learner, changes in learners.items():
                config = configured(
                    str(folder),
                    seed,
                    options.evaluations,
                    2,
                    **{
                        "data.window": 64,
                        "target.units": [units],
                        "target.budget": "kind",
                        "target.sparsity": int(dead.sum()) / len(dead),
                        "searcher.mapping": "flat",
                        "searcher.baselines": [],
                        "searcher.windows": 64,
                        "searcher.batch": 4,
                        "searcher.validation": 16,
                        "searcher.validate_every": 25 if learner == "released" else 6,
                        **changes,
                    },
                )
                run = searched(config, RUNS / f"{folder.name}-{learner}-{options.evaluations}")
                counts = found_of(run, dead)
                first = next((evaluations for evaluations, count in counts if count == dead.sum()), None)
                rows.append(
                    {
                        "model": label,
                        "units": units,
                        "of": len(dead),
                        "planted": int(dead.sum()),
                        "seed": seed,
                        "learner": learner,
                        "found": counts[-1][1],
                        "all after": first,
                    }
                )
                print(rows[-1], flush=True)
    return rows


# Structured


def tokens_of(config: PolicySearchConfig) -> int:
    """That the masks of a search read, about."""
    assert config.evaluations is not None
    return config.evaluations * config.searcher.batch * config.data.window


def structured_part(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every sparsity and seed: the winner beside whoever had as many forward passes, or tokens."""
    rows = []
    for sparsity in options.sparsities:
        for seed in options.seeds:
            name, heldout = f"{100 * sparsity:.0f}-{seed}-{options.evaluations}", options.heldout_windows
            config = configured("reference", seed, options.evaluations, heldout, **{"target.sparsity": sparsity})
            run = searched(config, RUNS / f"ours-{name}")
            structure = resolve_as(
                StructureSearchConfig,
                overrides={
                    "seed": seed,
                    "target.sparsity": sparsity,
                    "data.heldout_windows": heldout,
                    "evaluations": 1,
                },
            )
            each = generation_plan(structure.searcher, structure.data.window).per_candidate
            structure = structure.model_copy(update={"evaluations": max(100, round(tokens_of(config) / each))})
            shapes = searched(structure, RUNS / f"structure-{name}")
            control = configured(
                "reference", seed, options.evaluations, heldout, **RANDOM, **{"target.sparsity": sparsity}
            )
            released = configured(
                "reference",
                seed,
                options.evaluations,
                heldout,
                **{
                    **RELEASED,
                    "target.sparsity": sparsity,
                    "target.units": ["kv-group", "neuron"],
                    "searcher.options": {"rate": options.released_rate},
                    "searcher.validate_every": 80,
                },
            )
            entrants = {
                "policy": run,
                "random": searched(control, RUNS / f"random-{name}"),
                "released": searched(released, RUNS / f"released-{name}"),
                "policy from the shape": searched(
                    config.model_copy(update={"seed_from": str(shapes.path / "export" / "shape.json")}),
                    RUNS / f"seeded-{name}",
                ),
                "structure search": shapes,
            }
            rows.append(compared(entrants, sparsity, seed))
            print(rows[-1], flush=True)
    return rows


def compared(entrants: Mapping[str, RunDirectory], sparsity: float, seed: int) -> dict[str, Any]:
    """Held-out losses, and the first entrant's differences to everybody else."""
    results = {name: run.result or {} for name, run in entrants.items()}
    check_measured_alike(results)
    losses = {name: heldout_of(entrants[name], result["best"]) for name, result in results.items()}
    ours = results["policy"]
    baselines = {f"{row['name']} uniform" if row["name"] == UNIFORM else row["name"]: row for row in ours["baselines"]}
    return {
        "sparsity": sparsity,
        "seed": seed,
        "dense": ours["dense"]["heldout"]["loss"],
        "loss": {
            **{name: result["best"]["heldout"]["loss"] for name, result in results.items()},
            **{name: row["heldout"]["loss"] for name, row in baselines.items()},
        },
        "removed": {name: 1 - result["best"]["cost"] / result["dense_cost"] for name, result in results.items()},
        "evaluations": {name: result["evaluations"] for name, result in results.items()},
        "policy_minus_this": {
            **{name: paired_difference(losses["policy"], found) for name, found in losses.items() if name != "policy"},
            **{name: row["winner_minus_this"] for name, row in baselines.items()},
        },
        "refits": {
            "shape without its refit": shape_loss(entrants["structure search"], "none", ours),
            "shape, path refit": shape_loss(entrants["structure search"], "path-refit", ours),
            "policy, path refit": loss_of(
                evoprune.prune_policy("reference", entrants["policy"].path, refit="path-refit", latency=False), ours
            ),
        },
    }


def heldout_of(run: RunDirectory, entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """Losses of an entry of a result by window, from the run's log."""
    log = EvaluationLog(run.path / "evaluations.wal")
    try:
        for outcome in log.outcomes():
            nll = outcome.values.get("nll")
            if isinstance(nll, list) and abs(sum(nll) / len(nll) - entry["heldout"]["loss"]) < 1e-9:
                return outcome.values
    finally:
        log.close()
    raise SystemExit(f"{run.path} does not hold the held-out losses of its winner")


def shape_loss(run: RunDirectory, refit: str, like: Mapping[str, Any]) -> float:
    """Of the model cut to the shape of a run, with weights made in this way."""
    shape = run.path / "export" / "shape.json"
    return loss_of(evoprune.prune_shape("reference", shape, refit=refit, latency=False), like)


def loss_of(smaller: CutModel | Pruned, like: Mapping[str, Any]) -> float:
    """Of a smaller model, on the held-out text of a result."""
    window = like["window"]
    tokens = like["dense"]["heldout"]["tokens"] // (window - 1) * window
    return evoprune.evaluate(smaller.language_model, window=window, tokens=tokens).loss


# Patterns


def pattern_part(options: argparse.Namespace) -> list[dict[str, Any]]:
    """2:4 everywhere, and every metric by itself."""
    rows = []
    for seed in options.seeds:
        changes = {"target.pattern": "2:4", "searcher.prior": "wanda"}
        config = configured("reference", seed, options.evaluations, options.heldout_windows, **changes)
        result = searched(config, RUNS / f"pattern-{seed}-{options.evaluations}").result
        assert result is not None
        rows.append(
            {
                "seed": seed,
                "dense": result["dense"]["heldout"]["loss"],
                "loss": result["best"]["heldout"]["loss"],
                "fitness": result["best"]["fitness"],
                "policy_minus_this": {entry["name"]: entry["winner_minus_this"] for entry in result["baselines"]},
                "metrics": result["best"]["policy"]["metrics"],
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)}; all by default")
    parser.add_argument("--evaluations", type=int, default=1500)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--sparsities", type=float, nargs="+", default=SPARSITIES)
    parser.add_argument("--heldout-windows", type=int, default=HELDOUT_WINDOWS)
    parser.add_argument(
        "--released-rate", type=float, default=0.02, help="of the released update, which steps so little"
    )
    options = parser.parse_args()
    if unknown := sorted(set(options.parts) - set(PARTS)):
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    OUT.mkdir(exist_ok=True)
    RUNS.mkdir(exist_ok=True)
    file = OUT / "policy_quality.json"
    record: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    parts = {"planted": planted_part, "structured": structured_part, "pattern": pattern_part}
    for part in options.parts or PARTS:
        record[part] = parts[part](options)
        file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
