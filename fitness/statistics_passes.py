"""Which passes a set of statistics takes, and how they run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from evoprune.fitness.adapters import SiteModule
from evoprune.fitness.amia import TokenChoice
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.samples import Samples, Sequences
from evoprune.fitness.statistics_amia import ChosenSums
from evoprune.fitness.statistics_forward import MODALITY_NORMS, ForwardSums, Results, forward_pass
from evoprune.fitness.statistics_gradient import GradientSums, gradient_pass, loss_scale, regional_pass
from evoprune.fitness.statistics_store import SetWriter, encode
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.records import LANGUAGE

Progress = Callable[[int, int], None]

GRADIENT_NAMES = frozenset({"G_l2", "G_l1", "G_mean"})
REGIONAL_NAMES = frozenset({"G_reg"})
FORWARD_TOKENS = 2048
GRADIENT_TOKENS = 1024
# Activations of a backward pass may take this much, or a quarter of the weights if that is more.
ACTIVATION_BYTES = 1 << 28
# Sums of matrices may take this much, or as much as the model if that is more.
SUM_BYTES = 1 << 29


@dataclass(frozen=True, slots=True)
class PassSettings:
    """How the passes run. They change the last bits of the results, so they are part of a set's identity.

    Attributes:
        mode: ``wanda_fp32`` keeps ``X_ss`` as Wanda's reference code does, bit for bit (one sequence at a time).
        forward_batch: sequences per forward pass; None chooses.
        gradient_batch: sequences per backward pass; None chooses.
        checkpointing: recompute each block's activations in the backward pass; None chooses by size.
        tokens: how the tokens are chosen that statistics of inputs and outputs are of; None takes all.

    Raises:
        InvalidInput: tokens are to be chosen in the mode of Wanda's code, which takes all.
    """

    mode: Literal["standard", "wanda_fp32"] = "standard"
    forward_batch: int | None = None
    gradient_batch: int | None = None
    checkpointing: bool | None = None
    tokens: TokenChoice | None = None

    def __post_init__(self) -> None:
        if self.tokens is not None and self.mode == "wanda_fp32":
            raise InvalidInput("mode wanda_fp32 is of all tokens: choose tokens in mode standard")

    def resolved(self, language_model: LanguageModel, window: int) -> PassSettings:
        """These settings with every None replaced: by what depends on model and window only, never on the machine."""
        forward = self.forward_batch or max(1, FORWARD_TOKENS // window)
        features = sum(bound.site.in_features + bound.site.out_features for bound in language_model.sites)
        # Beside the inputs and outputs of the sites, a block saves about half as much for norms, products, attention.
        per_sequence = int(1.5 * features * language_model.model.dtype.itemsize * window)
        room = max(ACTIVATION_BYTES, _weight_bytes(language_model) // 4) // per_sequence
        return replace(
            self,
            forward_batch=1 if self.mode == "wanda_fp32" else forward,
            gradient_batch=self.gradient_batch or max(1, min(room, GRADIENT_TOKENS // window)),
            checkpointing=room < 1 if self.checkpointing is None else self.checkpointing,
        )


def run_passes(
    language_model: LanguageModel,
    calibration: Sequences,
    stored: frozenset[str],
    settings: PassSettings,
    writer: SetWriter,
    progress: Progress | None,
) -> tuple[dict[str, str], dict[str, int]]:
    """Collect all of `stored` and hand it to `writer`.

    Returns:
        Which site leads each site's input statistics, and how many tokens each site's statistics are of; both are
        empty where no statistic of inputs or outputs is asked for.

    Raises:
        InvalidInput: gradients of a tower are asked for, norms by modality of a tower or of text, or a site never
            runs.
    """
    sequences = len(calibration)
    refuse_undefined(language_model, calibration, stored)
    plan = _plan(language_model, stored)
    done = 0
    leaders: dict[str, str] = {}
    rows: dict[str, int] = {}

    def advance(more: int) -> None:
        nonlocal done
        done += more
        if progress:
            progress(done, len(plan) * sequences)

    for names, group in plan:
        sites = [bound for bound in language_model.sites if bound.site.block in group]
        if names & (GRADIENT_NAMES | REGIONAL_NAMES):
            results = _gradients(language_model, sites, group, names, calibration, settings, advance)
        else:
            sums = forward_sums(language_model, sites, names, settings)
            batch = settings.forward_batch or 1
            forward_pass(language_model.model, sums, calibration, batch, language_model.device, advance)
            results = sums.results(sequences)
            leaders |= sums.leaders
            rows |= sums.rows
        for block in group:
            writer.add(block, encoded(results, [bound for bound in sites if bound.site.block == block]))
    return leaders, rows


def refuse_undefined(language_model: LanguageModel, calibration: Sequences, stored: frozenset[str]) -> None:
    """Refuse statistics that a model or a text does not have.

    Raises:
        InvalidInput: gradients of a tower are asked for, or norms by modality of a tower or of text.
    """
    towers = {bound.site.component for bound in language_model.sites} - {LANGUAGE}
    if towers and (asked := stored & (GRADIENT_NAMES | REGIONAL_NAMES)):
        raise InvalidInput(f"{min(asked)} is a gradient, which {min(towers)} has none of: leave one of them out")
    if asked := stored & MODALITY_NORMS.keys():
        if towers:
            raise InvalidInput(
                f"{min(asked)} is of one modality, which {min(towers)} does not tell apart: leave one of them out"
            )
        if not (isinstance(calibration, Samples) and calibration.visual):
            raise InvalidInput(
                f"{min(asked)} is of one modality, and there is text alone: calibrate a model that reads images on "
                "images with texts, or take X_l2"
            )


def gradient_sum_bytes(names: Iterable[str], prunable: int, weight_bytes: int) -> int:
    """About how much the sums of a gradient pass take, while it lasts, in bytes.

    Args:
        names: statistics that are collected.
        prunable: weights that may be pruned.
        weight_bytes: of the whole model.
    """
    gradients = (frozenset(names) & GRADIENT_NAMES, frozenset(names) & REGIONAL_NAMES)
    return min(4 * prunable * max(map(len, gradients)), _sum_room(weight_bytes))


def _sum_room(weight_bytes: int) -> int:
    return max(SUM_BYTES, weight_bytes)


def forward_sums(
    language_model: LanguageModel, sites: list[SiteModule], names: frozenset[str], settings: PassSettings
) -> ForwardSums:
    """What collects the stored statistics `names` of inputs and outputs of some sites, of all or of chosen tokens."""
    if settings.tokens is None:
        return ForwardSums(sites, names, wanda=settings.mode == "wanda_fp32")
    blocks = dict(enumerate(block for _, block in language_model.blocks()))
    return ChosenSums(sites, names, settings.tokens, blocks, language_model.model)


def _gradients(
    language_model: LanguageModel,
    sites: list[SiteModule],
    group: range,
    names: frozenset[str],
    calibration: Sequences,
    settings: PassSettings,
    advance: Callable[[int], None],
) -> Results:
    scale, device = loss_scale(language_model.model.dtype), language_model.device
    blocks = [block for _, block in language_model.blocks()][group.start :]
    sums = GradientSums(sites, names, scale)
    batch = settings.gradient_batch or 1
    if names <= REGIONAL_NAMES:
        regional_pass(language_model.model, sums, calibration, batch, device, scale, blocks[: len(group)], advance)
    else:
        recompute = bool(settings.checkpointing)
        gradient_pass(language_model.model, sums, calibration, batch, device, scale, blocks, recompute, advance)
    return sums.results(len(calibration))


def _plan(language_model: LanguageModel, stored: frozenset[str]) -> list[tuple[frozenset[str], range]]:
    """The passes to make: what each collects, and for which decoder blocks."""
    room = _sum_room(_weight_bytes(language_model))
    n_blocks = len(language_model.blocks())
    plan = []
    for names in (stored - GRADIENT_NAMES - REGIONAL_NAMES, stored & GRADIENT_NAMES, stored & REGIONAL_NAMES):
        gradients = len(names & (GRADIENT_NAMES | REGIONAL_NAMES))
        grams = not names.isdisjoint({"H", "Hinv", "Hchol2"})
        sizes = [0] * n_blocks
        for bound in language_model.sites:
            sizes[bound.site.block] += 4 * (gradients * bound.site.weights + grams * bound.site.in_features**2)
        start = 0
        while names and start < n_blocks:
            end = start + 1
            while end < n_blocks and sum(sizes[start : end + 1]) <= room:
                end += 1
            plan.append((names, range(start, end)))
            start = end
    return plan


def encoded(results: Results, sites: Iterable[SiteModule]) -> dict[str, Tensor]:
    """What is to be stored for `sites`, taken out of `results` so that memory is freed on the way."""
    encoded: dict[str, Tensor] = {}
    for bound in sites:
        found = results.pop(bound.site.name)
        for name in sorted(found):
            encoded |= encode(f"{bound.site.name}::{name}", found.pop(name))
    return encoded


def _weight_bytes(language_model: LanguageModel) -> int:
    return sum(value.numel() * value.element_size() for value in language_model.model.parameters())
