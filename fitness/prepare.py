"""What candidates share, computed once and cached as files: tokens, teacher, dense weights, statistics, probe."""

from __future__ import annotations

import base64
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from evoprune.fitness.cache import cache_folder, disk_errors
from evoprune.fitness.compressors import compressor_of
from evoprune.fitness.context import EvaluationContext
from evoprune.fitness.examples import read_side, reads_images
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.objectives import OBJECTIVES
from evoprune.fitness.parcels import find, link, packing, require
from evoprune.fitness.pruning import check_allocation, check_rule
from evoprune.fitness.samples import Samples, Sequences, n_predictions, n_tokens
from evoprune.fitness.statistics import Statistics, statistics_for, statistics_key
from evoprune.fitness.statistics_store import KNOWN, stored_names
from evoprune.fitness.teacher import Teacher, build_teacher, check_teacher, check_top_k, linear_head, window_losses
from evoprune.metrics.allocation_file import from_json
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.files import content_hash
from evoprune.metrics.interpreter import free_inputs
from evoprune.metrics.probe import Probe, spread_sites
from evoprune.metrics.records import Site
from evoprune.metrics.terminals import STATISTICS

FORMAT = "evoprune-prepared/4"


@dataclass(frozen=True)
class Prepared:
    """The shared files of a search on this node: a parcel.

    Attributes:
        folder: holds ``prepared.json``, ``search.safetensors``, ``heldout.safetensors`` and their teachers,
            ``probe.safetensors``, ``dense.safetensors`` and ``statistics``.
        facts: the content of ``prepared.json``: sites, hashes, sizes.
    """

    folder: Path
    facts: dict[str, Any]

    @classmethod
    def open(cls, name: str) -> Prepared:
        """The prepared set of this name, fetched from the cluster if this node lacks it."""
        folder = require(name)
        return cls(folder, json.loads((folder / "prepared.json").read_text()))

    @property
    def name(self) -> str:
        """Names the content, on every node."""
        return self.folder.name

    @property
    def sites(self) -> list[Site]:
        """The prunable matrices."""
        return [Site(**site) for site in self.facts["sites"]]

    @property
    def dense(self) -> Path:
        """File of the dense site weights."""
        return self.folder / "dense.safetensors"

    def statistics(self) -> Statistics:
        """The calibration statistics."""
        return Statistics.open(self.folder / "statistics", fingerprint=self.facts["fingerprint"])

    def text(self, side: str) -> tuple[Sequences, Teacher]:
        """(windows or samples, their teacher) of ``search`` (text B) or ``heldout`` (text C)."""
        teacher = Teacher(**load_file(self.folder / f"{side}-teacher.safetensors"))
        return self._sequences(side)[: len(teacher.negative_entropy)], teacher

    def final_windows(self) -> Sequences:
        """All of text B: what is for the search, and behind it what only finalists see."""
        return self._sequences("search")

    def _sequences(self, side: str) -> Sequences:
        tensors = load_file(self.folder / f"{side}.safetensors")
        return tensors["windows"] if "windows" in tensors else Samples.from_tensors(tensors)

    def probe(self) -> Probe:
        """Slices of real weights and statistics, for rank signatures."""
        return Probe.load(self.folder / "probe.safetensors")

    def summary(self) -> dict[str, Any]:
        """What the driver, which may lack these files, wants to know of them, as JSON values; see `Summary`."""
        probe = (self.folder / "probe.safetensors").read_bytes()
        return {"name": self.name, "facts": self.facts, "probe": base64.b64encode(probe).decode()}


@dataclass(frozen=True)
class Summary:
    """What the driver knows of a prepared set.

    Attributes:
        name: of the set, for jobs.
        facts: see `Prepared`.
        probe: slices of real weights and statistics, for rank signatures.
    """

    name: str
    facts: dict[str, Any]
    probe: Probe

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Summary:
        """What `Prepared.summary` gave."""
        return cls(values["name"], values["facts"], Probe.from_bytes(base64.b64decode(values["probe"])))


def prepare(
    language_model: LanguageModel,
    context: EvaluationContext,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Prepared:
    """Compute what `context` needs, or find it in the cache of this node or in the cluster.

    Args:
        progress: told what runs, how much of it is done and how much there is.

    Raises:
        InvalidInput: a text is too short, a statistic does not exist, the width does not fit the pattern, the
            allocation is of another model, `top_k` exceeds the vocabulary, or the disk is full or read-only.
    """
    check_widths(language_model, context)
    windows = {
        "search": _evaluated(language_model, context, "B", context.rungs[-1], context.seed, context.final_windows),
        "heldout": _evaluated(language_model, context, "C", context.heldout_windows),
    }
    calibration = calibration_windows(language_model, context)
    needs = frozenset(context.statistics) & KNOWN
    needs |= OBJECTIVES[context.objective].needs | compressor_of(context.compressor).needs
    identity = {
        "format": FORMAT,
        "fingerprint": language_model.fingerprint,
        "dtype": str(language_model.model.dtype),
        "threads": torch.get_num_threads(),
        "statistics": [statistics_key(language_model, calibration), *sorted(stored_names(needs))],
        "windows": {side: _content(sequences) for side, sequences in windows.items()},
        "probe": sorted(needs),
        "sparsity": context.rule.fraction,
        **({} if context.top_k is None else {"top_k": context.top_k}),
    }
    prefix = f"prepared-{content_hash(identity)[:24]}"
    known = find(prefix)
    if known is not None:
        return Prepared.open(known)
    statistics = statistics_for(
        language_model, calibration, needs, progress=lambda done, total: progress("statistics", done, total)
    )
    with disk_errors(cache_folder()), packing(prefix) as packed:
        folder = packed.folder
        taught = {"search": context.rungs[-1], "heldout": None}  # finalists are compared by loss, without a teacher
        most_likely = {"search": context.top_k, "heldout": None}  # what is reported is comparable between runs
        head = linear_head(language_model.model, windows["search"])
        _check_teachers(language_model, head, windows["search"][: taught["search"]], windows["heldout"], context.top_k)
        for side, sequences in windows.items():
            progress(f"teacher on {side} text", 0, len(sequences))
            teacher = build_teacher(language_model.model, head, sequences[: taught[side]], top_k=most_likely[side])
            save_file(teacher.tensors(), folder / f"{side}-teacher.safetensors")
            tensors = sequences.tensors() if isinstance(sequences, Samples) else {"windows": sequences}
            save_file(tensors, folder / f"{side}.safetensors")
        _build_probe(language_model, statistics, needs, context).save(folder / "probe.safetensors")
        link(_dense_file(language_model), folder / "dense.safetensors")
        for file in statistics.folder.iterdir():
            link(file, folder / "statistics" / file.name)
        facts = {
            "identity": identity,
            "fingerprint": language_model.fingerprint,
            "model_class": type(language_model.model).__name__,
            "parameters": language_model.model.num_parameters(),
            "prunable": sum(bound.site.weights for bound in language_model.sites),
            "model_bytes": sum(p.numel() * p.element_size() for p in language_model.model.parameters()),
            "statistics_bytes": sum(file.stat().st_size for file in statistics.folder.iterdir()),
            "teacher_bytes": (folder / "search-teacher.safetensors").stat().st_size,
            "window": round(n_tokens(windows["search"]) / len(windows["search"])),
            "images": isinstance(windows["search"], Samples),
            "final_windows": len(windows["search"]),
            "heldout_windows": len(windows["heldout"]),
            "dead": sorted(statistics.dead()),
            "sites": [_site_facts(bound.site) for bound in language_model.sites],
        }
        (folder / "prepared.json").write_text(json.dumps(facts, indent=1))
    return Prepared.open(packed.name)


def _check_teachers(
    language_model: LanguageModel, head: nn.Linear | None, search: Sequences, heldout: Sequences, top_k: int | None
) -> None:
    """Refuse, before either is built, a teacher of text B or C that takes too much memory.

    Raises:
        InvalidInput: it does; says what would take less.
    """
    fewer = "or top_k=512" if top_k is None else "or a smaller top_k"
    for text, sequences, most, way_out in (
        ("B", search, top_k, fewer),
        ("C", heldout, None, "such as data.heldout_windows=30"),
    ):
        try:
            check_teacher(language_model.model, head, sequences, most)
        except InvalidInput as error:
            raise InvalidInput(f"text {text}: {error}, {way_out}") from None


def _evaluated(
    language_model: LanguageModel,
    context: EvaluationContext,
    side: str,
    count: int | None,
    seed: int | None = None,
    spare: int = 0,
) -> Sequences:
    """What candidates are measured on: `count` windows or examples, and up to `spare` more.

    Raises:
        InvalidInput: there are fewer, or an example has no text to predict.
    """
    found = read_side(
        language_model,
        context.place(context.data),
        side,
        window=context.window,
        count=count,
        seed=seed,
        spare=spare,
    )
    if count is not None and len(found) < count:
        raise InvalidInput(
            f"side {side} of {context.data!r} has {len(found)} examples, {count} are needed: give more, or search on "
            f"fewer (searcher.windows of an allocation, racing.rungs of a metric, data.heldout_windows)"
        )
    if not n_predictions(found).all():
        raise InvalidInput(f"an example of {context.data!r} has no text to predict: give each two words or more")
    return found


def _content(sequences: Sequences) -> str:
    return sequences.digest() if isinstance(sequences, Samples) else content_hash(sequences.tolist())


def calibration_windows(language_model: LanguageModel, context: EvaluationContext) -> Sequences:
    """Text A: [calibration_sequences, calibration_window] int64, or up to so many examples.

    Raises:
        InvalidInput: the text is too short, or nowhere.
    """
    return read_side(
        language_model,
        context.place(context.calibration),
        "A",
        window=context.calibration_window,
        count=context.calibration_sequences,
        seed=context.seed,
    )


def seconds_per_token(language_model: LanguageModel, windows: Sequences) -> float:
    """How long this worker needs for a token of what it is measured on: no part of what is prepared."""
    head = linear_head(language_model.model, windows)
    began = time.perf_counter()
    window_losses(language_model.model, head, windows, None)
    return (time.perf_counter() - began) / n_tokens(windows)


def check_widths(language_model: LanguageModel, context: EvaluationContext) -> None:
    """Refuse what the model's shape cannot do.

    Raises:
        InvalidInput: see `check_rule` and `check_top_k`; an allocation of another model; a window longer than the
            model's context.
    """
    check_rule(language_model, context.rule, context.compressor)
    check_top_k(language_model.model, context.top_k)
    if context.allocation is not None:
        check_allocation(language_model, from_json(context.allocation))
    longest = language_model.context
    windows = [
        window
        for source, window in ((context.data, context.window), (context.calibration, context.calibration_window))
        if not reads_images(language_model, context.place(source))
    ]
    if longest is not None and max(windows, default=0) > longest:
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
