"""What a policy learns from forward passes alone, beside the released update and the structure search.

    python benchmarks/policy_quality.py                     # all parts: hours on 2 quiet cores
    python benchmarks/policy_quality.py planted pattern     # some of them
    python benchmarks/policy_quality.py structured --seeds 0 --sparsities 0.3

planted: units whose columns of the output matrices are zero, from a flat start: 12 of 32 heads of a small random model,
and KV groups, query heads and blocks of 64 neurons of the reference model; how many the mode of the policy has found
after so many evaluations, beside the released update.
structured: held-out loss of the winner, of the initialisation, of the released update (single neurons and KV groups, as
published) at as many forward passes, and of the structure search at as many tokens, with and without its refit; and of a
policy that starts from its shape.
pattern: 2:4 everywhere, the metric of each matrix learned; beside every metric in all matrices.

A seed draws texts A and B, the policy and what is planted; text C is fixed. Writes benchmarks/out/policy_quality.json.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import evoprune
from evoprune.fitness.models import REFERENCE_FOLDER, load_model
from evoprune.fitness.structure_worker import StructureWorker
from evoprune.fitness.units import find_units
from evoprune.metrics.shape_file import read_shape, write_shape
from evoprune.search.config import resolve_as
from evoprune.search.config_policy import PolicySearchConfig
from evoprune.search.config_structure import StructureSearchConfig
from evoprune.search.result import paired_difference, summary
from evoprune.search.rundir import RunDirectory
from evoprune.search.search_run import generation_plan
from evoprune.search.session import start_search
from evoprune.search.worker_session import Resources

OUT = Path(__file__).parent / "out"
"""Where results go."""
RUNS = OUT / "policy"
PARTS = ("planted", "structured", "pattern")
SEEDS = (0, 1, 2)
SPARSITIES = (0.3, 0.5)
HELDOUT_WINDOWS = 200
PLANTED_SHARE = 0.375
RELEASED = {"searcher.name": "released", "searcher.samples": 2}
"""The published update, with two masks a step."""


def searched(config: Any, label: str) -> RunDirectory:
    """The run of a configuration; one that finished before is read, not repeated."""
    folder = RUNS / label
    if folder.exists():
        run = RunDirectory.open(folder)
        if run.result is not None:
            return run
        shutil.rmtree(folder)
    return start_search(config, Resources(executor="inline"), run_dir=folder)
