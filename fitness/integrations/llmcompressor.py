"""Metrics as modifiers of llm-compressor, whose recipes go on to quantise what is left.

Source: the life cycle of `llmcompressor.modifiers.Modifier`, version 0.14.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from evoprune.fitness.adapters import SiteModule, list_sites
from evoprune.fitness.pruning import mask_rule, site_scores
from evoprune.fitness.statistics_forward import MODALITY_NORMS, InputSums
from evoprune.fitness.statistics_store import SQUARE_ROOTS, stored_names
from evoprune.metrics.criterion import CRITERIA, Criterion, Metric
from evoprune.metrics.errors import EvopruneError, InvalidInput
from evoprune.metrics.exported import load_metric
from evoprune.metrics.mask import check_pattern, mask
from evoprune.metrics.records import MaskRule
from evoprune.metrics.terminals import STATISTICS


def metric_modifier(
    metric: str, *, sparsity: float | None = None, pattern: str | None = None, group: str | None = None
) -> Any:
    """A modifier that `llmcompressor.oneshot` takes as its recipe, or as a part of it.

    It prunes the matrices that `evoprune prune` would, and no others: embeddings, the output head, norms and routers
    stay. Statistics are of the inputs that the pipeline lets the layers see: with `pipeline="basic"` those of the dense
    model, as in `evoprune prune`, with the sequential pipeline those behind layers that are pruned already.

    Args:
        metric: a name of the criteria, an expression, or an exported ``.json`` or ``.py`` (read, never executed). Of a
            file the recipe that llm-compressor stores says the expression.
        sparsity: fraction to remove, in [0, 1); 0.5 unless `pattern` is given.
        pattern: ``N:M``, N kept of every M consecutive inputs; llm-compressor's ``mask_structure`` says how many go.
        group: compare scores within a ``row`` or a ``layer``; None takes the criterion's own.

    Raises:
        InvalidInput: llm-compressor is not installed, there is no such metric, or it reads what llm-compressor does not
            collect, such as gradients.
    """
    return _modifier_class()(metric=metric, sparsity=sparsity, pattern=pattern, within=group)


class HeardPruning:
    """Prunes sites by a metric of what it has heard of their inputs.

    Args:
        criterion: gives the scores, low = removed first.
        rule: how many weights go, within a row or a matrix.

    Raises:
        InvalidInput: the criterion reads more than inputs, or compares across the model.
    """

    def __init__(self, criterion: Criterion, rule: MaskRule) -> None:
        self.names = criterion.needs & STATISTICS
        others = {name for name in self.names if name.startswith(("G_", "Y_"))} | (self.names & MODALITY_NORMS.keys())
        if others:
            raise InvalidInput(
                f"this metric reads {min(others)}, which llm-compressor does not collect: `evoprune prune` does, or "
                "give a metric of weights and inputs such as wanda"
            )
        if rule.group == "global":
            raise InvalidInput("llm-compressor prunes layer by layer, and global scores are of all: give row or layer")
        self._criterion, self._rule = criterion, rule
        self._sums: dict[str, InputSums] = {}
        self._sequences: dict[str, int] = {}

    def hear(self, bound: SiteModule, inputs: Tensor) -> None:
        """Take in the inputs of a site: [sequences, tokens, in], or [tokens, in] of one sequence."""
        site = bound.site
        if site.name not in self._sums:
            self._sums[site.name] = InputSums(site.in_features, inputs.device, stored_names(self.names))
            self._sequences[site.name] = 0
        self._sums[site.name].add(inputs.detach().reshape(-1, site.in_features))
        self._sequences[site.name] += inputs.shape[0] if inputs.dim() == 3 else 1

    def site_statistics(self, site: str, names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """What was heard of a site, given away: see `SiteReader`."""
        wanted = sorted(set(names) & STATISTICS)
        if not wanted:
            return {}
        if site not in self._sums:
            raise EvopruneError(f"{site} was not run: the calibration of llm-compressor never reached it")
        stored = self._sums.pop(site).results(self._sequences.pop(site))
        return {
            name: (stored[SQUARE_ROOTS[name]].sqrt() if name in SQUARE_ROOTS else stored[name]).to(device)
            for name in wanted
        }

    @torch.no_grad()
    def pruned(self, bound: SiteModule) -> Tensor:
        """The weight of a site's layer with zeros where its lowest scores are, stored as the layer stores it.

        Raises:
            InvalidInput: the criterion cannot score it, or the pattern does not fit its width.
        """
        if self._rule.pattern is not None:
            check_pattern(self._rule.pattern, bound.site.in_features, bound.site.name)
        keep = mask(site_scores(bound, self._criterion, self._rule, self), self._rule)
        new = bound.weight().masked_fill(~keep, 0)
        return new.T if bound.transposed else new


@cache
def _modifier_class() -> Any:
    """The class, made when llm-compressor is there.

    Raises:
        InvalidInput: it is not.
    """
    try:
        modifiers: Any = import_module("llmcompressor.modifiers")
        offload: Any = import_module("compressed_tensors.utils")
        pydantic: Any = import_module("pydantic")
    except ImportError:
        raise InvalidInput(
            "modifiers need llm-compressor: pip install 'evoprune[llmcompressor]', in an environment of its own, since "
            "it wants an older transformers"
        ) from None

    class MetricPruningModifier(modifiers.Modifier):
        """Prune by a metric of evoprune; see `metric_modifier`."""

        metric: str
        sparsity: float | None = None
        pattern: str | None = None
        # Its own `group` is one of modifiers.
        within: str | None = None

        _pruning: HeardPruning = pydantic.PrivateAttr()
        _left: dict[nn.Module, SiteModule] = pydantic.PrivateAttr(default_factory=dict)

        def model_post_init(self, context: Any) -> None:
            super().model_post_init(context)
            criterion = load_metric(self.metric)
            rule = mask_rule(criterion, self.sparsity, self.pattern, self.within)
            self._pruning = HeardPruning(criterion, rule)
            if isinstance(criterion, Metric) and self.metric.strip() not in CRITERIA:
                self.metric = criterion.expression.text
            self.within = rule.group
            self.requires_calibration_data = bool(self._pruning.names)

        def on_initialize(self, state: Any, **kwargs: Any) -> bool:
            model: PreTrainedModel = state.model
            self._left = {bound.module: bound for bound in list_sites(model)}
            return True

        def on_calibration_start(self, state: Any, event: Any, **kwargs: Any) -> None:
            for bound in self._left.values() if self._pruning.names else ():
                self.register_hook(bound.module, partial(self._heard, bound), "forward")

        def on_sequential_epoch_end(self, state: Any, event: Any, modules: Iterable[nn.Module], **kwargs: Any) -> None:
            for module in [module for module in modules if module in self._left]:
                with offload.align_module_device(module):
                    new = self._pruning.pruned(self._left.pop(module))
                offload.update_offload_parameter(module, "weight", new)

        def on_calibration_end(self, state: Any, event: Any, **kwargs: Any) -> None:
            self.remove_hooks()

        def on_finalize(self, state: Any, **kwargs: Any) -> bool:
            if self._left:
                first = next(iter(self._left.values())).site.name
                raise EvopruneError(
                    f"{len(self._left)} matrices were not pruned, such as {first}: no pipeline ran them"
                )
            return True

        def _heard(self, bound: SiteModule, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self._pruning.hear(bound, args[0])

    return MetricPruningModifier
