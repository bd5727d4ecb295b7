"""What candidates share, computed once and cached as files: tokens, teacher, dense weights, statistics, probe."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from evoprune.fitness.cache import cache_folder, disk_errors
from evoprune.fitness.context import EvaluationContext
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.objectives import OBJECTIVES
from evoprune.fitness.statistics import Statistics, statistics_for
from evoprune.fitness.teacher import Teacher, build_teacher, linear_head, window_losses
from evoprune.fitness.text import token_windows
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.files import content_hash
from evoprune.metrics.interpreter import free_inputs
from evoprune.metrics.mask import check_pattern
from evoprune.metrics.probe import Probe, spread_sites
from evoprune.metrics.records import Site
from evoprune.metrics.terminals import STATISTICS

FORMAT = "evoprune-prepared/1"


@dataclass(frozen=True)
class Prepared:
    """Where the shared files are, and what the driver wants to know of them.

    Attributes:
        folder: holds ``prepared.json``, ``search.safetensors``, ``heldout.safetensors`` and ``probe.safetensors``.
        facts: the content of ``prepared.json``: sites, hashes, sizes, measured times.
    """

    folder: Path
    facts: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> Prepared:
        """The prepared set in `folder`."""
        return cls(folder, json.loads((folder / "prepared.json").read_text()))

    @property
    def sites(self) -> list[Site]:
        """The prunable matrices."""
        return [Site(**site) for site in self.facts["sites"]]

    @property
    def dense(self) -> Path:
        """File of the dense site weights."""
        return Path(self.facts["dense"])

    def statistics(self) -> Statistics:
        """The calibration statistics."""
        return Statistics.open(self.facts["statistics"], fingerprint=self.facts["fingerprint"])

    def text(self, side: str) -> tuple[Tensor, Teacher]:
        """([n, w] token ids, their teacher) of ``search`` (text B) or ``heldout`` (text C)."""
        tensors = load_file(self.folder / f"{side}.safetensors")
        windows = tensors.pop("windows")
        return windows, Teacher(**tensors)

    def probe(self) -> Probe:
        """Slices of real weights and statistics, for rank signatures."""
        return Probe.load(self.folder / "probe.safetensors")


def prepare(
    language_model: LanguageModel,
    context: EvaluationContext,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Prepared:
    """Compute what `context` needs, or find it in the cache.

    Args:
        progress: told what runs, how much of it is done and how much there is.

    Raises:
        InvalidInput: a text is too short, a statistic does not exist, the width does not fit the pattern, or the disk
            is full or read-only.
    """
    tokenizer = language_model.tokenizer
    check_widths(language_model, context)
    windows = {
        "search": token_windows(
            tokenizer, context.data, "B", window=context.window, count=context.rungs[-1], seed=context.seed
        ),
        "heldout": token_windows(tokenizer, context.data, "C", window=context.window, count=context.heldout_windows),
    }
    calibration = token_windows(
        tokenizer,
        context.calibration,
        "A",
        window=context.calibration_window,
        count=context.calibration_sequences,
        seed=context.seed,
    )
    needs = (frozenset(context.statistics) & STATISTICS) | OBJECTIVES[context.objective].needs
    statistics = statistics_for(
        language_model, calibration, needs, progress=lambda done, total: progress("statistics", done, total)
    )
    with disk_errors(cache_folder()):
        return _prepared(language_model, context, windows, statistics, needs, progress)


def _prepared(
    language_model: LanguageModel,
    context: EvaluationContext,
    windows: dict[str, Tensor],
    statistics: Statistics,
    needs: frozenset[str],
    progress: Callable[[str, int, int], None],
) -> Prepared:
    """The set of these inputs: the one in the cache, or a new one."""
    dense = _dense_file(language_model)
    identity = {
        "format": FORMAT,
        "fingerprint": language_model.fingerprint,
        "dtype": str(language_model.model.dtype),
        "threads": torch.get_num_threads(),
        "statistics": statistics.folder.name,
        "windows": {side: content_hash(tokens.tolist()) for side, tokens in windows.items()},
        "probe": sorted(needs),
        "sparsity": context.rule.fraction,
    }
    folder = cache_folder() / "prepared" / content_hash(identity)[:32]
    if (folder / "prepared.json").exists():
        return Prepared.open(folder)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}")
    partial.mkdir(parents=True)
    try:
        head = linear_head(language_model.model, windows["search"][:1, :8].to(language_model.device))
        for side, tokens in windows.items():
            progress(f"teacher on {side} text", 0, len(tokens))
            teacher = build_teacher(language_model.model, head, tokens)
            save_file({"windows": tokens, **teacher.tensors()}, partial / f"{side}.safetensors")
        timed = windows["search"][: context.rungs[0]]
        began = time.perf_counter()
        window_losses(language_model.model, head, timed, None)
        seconds_per_token = (time.perf_counter() - began) / timed.numel()
        _build_probe(language_model, statistics, needs, context).save(partial / "probe.safetensors")
        facts = {
            "identity": identity,
            "fingerprint": language_model.fingerprint,
            "statistics": str(statistics.folder),
            "dense": str(dense),
            "parameters": language_model.model.num_parameters(),
            "prunable": sum(bound.site.weights for bound in language_model.sites),
            "model_bytes": sum(p.numel() * p.element_size() for p in language_model.model.parameters()),
            "statistics_bytes": sum(file.stat().st_size for file in statistics.folder.iterdir()),
            "teacher_bytes": (partial / "search.safetensors").stat().st_size,
            "seconds_per_token": seconds_per_token,
            "heldout_windows": len(windows["heldout"]),
            "sites": [_site_facts(bound.site) for bound in language_model.sites],
        }
        (partial / "prepared.json").write_text(json.dumps(facts, indent=1))
        try:
            partial.rename(folder)
        except OSError:
            # Another process finished the same set first.
            if not (folder / "prepared.json").exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Prepared.open(folder)


def check_widths(language_model: LanguageModel, context: EvaluationContext) -> None:
    """Refuse what the model's shape cannot do.

    Raises:
        InvalidInput: a pattern whose M does not divide a width; a window longer than the model's context.
    """
    if context.pattern is not None:
        for bound in language_model.sites:
            check_pattern(context.pattern, bound.site.in_features, bound.site.name)
    longest = language_model.context
    if longest is not None and max(context.window, context.calibration_window) > longest:
        raise InvalidInput(
            f"the windows have {context.window} tokens, those of the calibration {context.calibration_window}, and "
            f"this model reads at most {longest}: give --set data.window={min(context.window, longest)} "
            f"--calibration-window {min(context.calibration_window, longest)}"
        )


def _site_facts(site: Site) -> dict[str, Any]:
    return {name: getattr(site, name) for name in Site.__slots__}


def _dense_file(language_model: LanguageModel) -> Path:
    """The model's site weights in the run's dtype, written once per model and node."""
    dtype = str(language_model.model.dtype).removeprefix("torch.")
    path = cache_folder() / "dense" / f"{language_model.fingerprint[:32]}-{dtype}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        try:
            save_file({bound.site.name: bound.weight().contiguous().cpu() for bound in language_model.sites}, partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    with safe_open(path, framework="pt") as file:
        if set(file.keys()) != {bound.site.name for bound in language_model.sites}:
            raise InvalidInput(f"{path} does not hold this model's weights: delete it")
    return path


def _build_probe(
    language_model: LanguageModel, statistics: Statistics, needs: frozenset[str], context: EvaluationContext
) -> Probe:
    chosen = {site.name for site in spread_sites([bound.site for bound in language_model.sites])}
    sites = [
        (
            bound.site,
            {
                **free_inputs(bound.site, bound.weight().cpu(), context.rule.fraction),
                **statistics.site_statistics(bound.site.name, needs & STATISTICS),
            },
        )
        for bound in language_model.sites
        if bound.site.name in chosen
    ]
    return Probe.build(sites)
