"""What pruning and evaluating a model give back, in Python and as the JSON of the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from evoprune.fitness.activations import Thresholded
from evoprune.fitness.card import PassTimes, public_name
from evoprune.fitness.classifiers import ImageClassifier
from evoprune.fitness.continuations import Continuation
from evoprune.fitness.evaluation import HeldOut, evaluate_language_model
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.pipelines import Pipeline
from evoprune.fitness.pruning import PrunedLayer
from evoprune.fitness.recovery import Recovered
from evoprune.fitness.samples import Sequences, n_tokens
from evoprune.fitness.tasks import TaskScores
from evoprune.metrics.allocation import Allocation
from evoprune.metrics.criterion import CRITERIA, Criterion, Metric
from evoprune.metrics.records import MaskRule
from evoprune.metrics.shape import Shape
from evoprune.recipe_file import StoredRecipe

# What `sparsity_report.json` says of the whole model, of what is known.
_OF_MODEL = ("sparsity", "removed", "prunable", "criterion", "compressor", "accumulation", "bits", "stored_bits")


def measured_summary(
    language_model: LanguageModel, windows: Sequences, dense: PreTrainedModel | None = None
) -> dict[str, Any]:
    """A model on held-out text: `HeldOut.summary`, with the length of windows and the dtype that it ran in.

    Args:
        windows: of text C.
        dense: the model before pruning, for the KL divergence.
    """
    found = evaluate_language_model(language_model.model, windows, dense=dense)
    return {
        **found.summary(),
        "window": round(n_tokens(windows) / len(windows)),
        "dtype": str(language_model.model.dtype).removeprefix("torch."),
    }


@dataclass(frozen=True)
class MeasuredRecovery:
    """How what is left of a model was trained, and what that brought.

    Attributes:
        method: name of the recovery.
        loss: ``distill`` or ``lm``.
        done: tokens, steps, and where the training began.
        before, after: `measured_summary` of the pruned model, and of the recovered one.
    """

    method: str
    loss: str
    done: Recovered
    before: dict[str, Any]
    after: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """What `evoprune prune --json` and a checkpoint say of it: the same, however often it was interrupted."""
        return {
            "method": self.method,
            "loss": self.loss,
            "tokens": self.done.tokens,
            "steps": self.done.steps,
            "parameters": self.done.parameters,
            "before": self.before,
            "after": self.after,
        }


@dataclass(frozen=True)
class MeasuredRefit:
    """What refitted output matrices brought.

    Attributes:
        method: one of `evoprune.fitness.structure_weights.METHODS`.
        text: source of the text C that it was measured on.
        before, after: `measured_summary` with the weights as they were, and refitted.
    """

    method: str
    text: str
    before: dict[str, Any]
    after: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """What `evoprune prune --json` and a checkpoint say of it."""
        return {"method": self.method, "text": public_name(self.text), "before": self.before, "after": self.after}


@dataclass(frozen=True, kw_only=True)
class Smaller:
    """What went, matrix by matrix.

    Attributes:
        layers: one entry per matrix, in model order.
        recovery: how what is left was trained; None if it was not.
        policy: the summary of the mask policy that said what goes; None if something else did.
        out: folder of the checkpoint; None if none was asked for.
        doubt: why an allocation, a policy or a recipe may not suit the model; None if it does, or nobody knows.
        recipe: what makes it again; None if only Python knows the criterion.
    """

    layers: tuple[PrunedLayer, ...]
    recovery: MeasuredRecovery | None = None
    policy: Mapping[str, Any] | None = None
    out: Path | None = None
    doubt: str | None = None
    recipe: StoredRecipe | None = None

    @property
    def removed(self) -> int:
        """Weights removed."""
        return sum(layer.removed for layer in self.layers)

    @property
    def prunable(self) -> int:
        """Weights that could have been removed: those of the linear layers inside decoder blocks."""
        return sum(layer.weights for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Fraction of the prunable weights that was removed."""
        return self.removed / max(self.prunable, 1)

    def to_json(self) -> dict[str, Any]:
        """What `evoprune prune --json` prints."""
        return {
            "out": None if self.out is None else str(self.out),
            "sparsity": self.sparsity,
            "removed": self.removed,
            "prunable": self.prunable,
            "pattern": None,
            "criterion": None,
            "compressor": None,
            "allocation": None,
            "recovery": None if self.recovery is None else self.recovery.to_json(),
            **({} if self.policy is None else {"policy": dict(self.policy)}),
            "layers": [_of_layer(layer) for layer in self.layers],
        }

    def sparsity_report(self) -> dict[str, Any]:
        """What `sparsity_report.json` of a checkpoint says: `to_json` by matrix, and what each took.

        ``pattern`` is N:M or null; ``error`` is the relative output error right after the compressor, before a
        recovery, and ``path_error``, where there is one, the same behind pruned blocks; ``seconds`` and ``peak_bytes``
        are of the compressor and differ from run to run, so that no other file has them.
        """
        told = self.to_json()
        return {
            "format": "evoprune-sparsity-report/1",
            **{name: told[name] for name in _OF_MODEL if name in told},
            "layers": [
                {
                    **_of_layer(layer),
                    "pattern": told["pattern"],
                    "removed": layer.removed,
                    "seconds": layer.seconds,
                    "peak_bytes": layer.peak_bytes,
                }
                for layer in self.layers
            ],
        }


@dataclass(frozen=True, kw_only=True)
class Removal(Smaller):
    """What a mask or a compressor did to a model.

    Attributes:
        criterion: the name of the criterion, or its expression; None if the compressor read none.
        rule: how many weights went, and what their scores were compared within.
        compressor: what happened to the weights that stayed.
        accumulation: what the text of the statistics had gone through, ``dense`` blocks or pruned ones, ``path``; None
            if no statistics were read.
        allocation: the sparsity of each matrix; None if all had the same.
        merged: sparse cores and their wrappers were multiplied out, so that nothing is zero.
        thresholds: of layers whose inputs are let go at run time.
    """

    criterion: str | None
    rule: MaskRule
    compressor: str
    accumulation: str | None = None
    allocation: Allocation | None = None
    merged: bool = False
    thresholds: tuple[Thresholded, ...] = ()

    @property
    def mean_bits(self) -> float | None:
        """Of a weight that stayed, as the allocation says; None without bits."""
        if self.allocation is None or self.allocation.bits is None:
            return None
        return self.allocation.stored_bits / max(self.allocation.weights - self.allocation.removed, 1)

    def to_json(self) -> dict[str, Any]:
        """What `evoprune prune --json` prints."""
        own = self.allocation
        return super().to_json() | {
            "pattern": str(self.rule) if self.rule.pattern else None,
            "criterion": self.criterion,
            "compressor": self.compressor,
            "accumulation": self.accumulation,
            "allocation": None if own is None else own.summary(),
            **({} if self.mean_bits is None else {"bits": self.mean_bits}),
            **({} if own is None or own.bits is None else {"stored_bits": own.stored_bits}),
            **({"thresholds": [_said(found) for found in self.thresholds]} if self.thresholds else {}),
        }


def _of_layer(layer: PrunedLayer) -> dict[str, Any]:
    return {
        "name": layer.name,
        "shape": list(layer.shape),
        "sparsity": layer.sparsity,
        **({} if layer.bits is None else {"bits": layer.bits}),
        "error": layer.error,
        **({} if layer.path_error is None else {"path_error": layer.path_error}),
    }


def _said(found: Thresholded) -> dict[str, Any]:
    return {
        "name": found.name,
        "mode": found.threshold.mode,
        "threshold": found.threshold.threshold,
        "sparsity": found.sparsity,
        "error": found.error,
    }


@dataclass(frozen=True, kw_only=True)
class Pruned(Removal):
    """A pruned model and what was done to it.

    Attributes:
        language_model: with the pruned weights in memory.
    """

    language_model: LanguageModel


@dataclass(frozen=True, kw_only=True)
class PrunedFiles(Removal):
    """A checkpoint that was pruned block by block, and what was done to it.

    Attributes:
        continued: how many blocks an interrupted run had written before.
        discarded: whether something else had been begun there, which is gone.
    """

    continued: int = 0
    discarded: bool = False


@dataclass(frozen=True, kw_only=True)
class PrunedPipeline(Removal):
    """A pruned pipeline of diffusers and what was done to it.

    Attributes:
        pipeline: with the pruned weights in memory.
    """

    pipeline: Pipeline


@dataclass(frozen=True, kw_only=True)
class PrunedClassifier(Removal):
    """A pruned image classifier and what was done to it.

    Attributes:
        classifier: with the pruned weights in memory.
        held_out: `evoprune.fitness.classifiers.agreement` with the dense model on images that statistics are not of;
            None without such images.
    """

    classifier: ImageClassifier
    held_out: Mapping[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """What `evoprune prune --json` prints of an image classifier."""
        return super().to_json() | {"held_out": None if self.held_out is None else dict(self.held_out)}


@dataclass(frozen=True, kw_only=True)
class CutModel(Smaller):
    """A model that was cut to a shape.

    Attributes:
        language_model: as it is now in memory.
        shape: what every block kept.
        form: of the checkpoint.
        parameters: of the whole model, as it is now.
        dense_parameters: of the whole model before.
        times: of forward passes, before and now; taken where a checkpoint is written and something got smaller.
        foreign: whether the shape was found on other weights of this class.
        refit: what refitted output matrices brought, where that was measured.
        method: that chose the shape; None if it was given.
        found: by the method, on its way to the shape; JSON values.
    """

    language_model: LanguageModel
    shape: Shape
    form: str
    parameters: int
    dense_parameters: int
    foreign: bool = False
    refit: MeasuredRefit | None = None
    times: tuple[PassTimes, ...] = ()
    method: str | None = None
    found: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """What `evoprune prune --json` prints with a shape or a method."""
        return super().to_json() | {
            "form": self.form,
            "parameters": self.parameters,
            "dense_parameters": self.dense_parameters,
            "shape": [[len(kept.groups), kept.heads_per_group, len(kept.neurons)] for kept in self.shape.blocks],
            "widths": [[whole.groups, whole.heads, whole.neurons] for whole in self.shape.widths],
            "milliseconds": [{"pass": row.words, "dense": row.dense / 1e6, "cut": row.cut / 1e6} for row in self.times],
            **({} if self.refit is None else {"refit": self.refit.to_json()}),
            **({} if self.method is None else {"method": self.method, "found": dict(self.found)}),
        }


@dataclass(frozen=True)
class Evaluation:
    """A model on held-out text.

    Attributes:
        model: as it was named.
        held_out: loss, perplexity, KL divergence and their standard errors, also by window.
        window: tokens in a window, or in a sample on average.
        sparsity: fraction of the prunable weights that is exactly zero.
        data: the text, as it was named.
        dtype: of the model while it ran.
        images: whether it is the text of images.
        tasks: scores of evaluation tasks, by task and metric; None if none were asked for.
        dense_tasks: those of the dense model; None without one.
        samples: how the model, and the dense model, go on with the first words of windows of that text.
    """

    model: str
    held_out: HeldOut
    window: int
    sparsity: float
    data: str
    dtype: str
    images: bool = False
    tasks: TaskScores | None = None
    dense_tasks: TaskScores | None = None
    samples: tuple[Continuation, ...] = ()

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return self.held_out.perplexity

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood, in nats per predicted token."""
        return self.held_out.loss

    @property
    def kl(self) -> float | None:
        """KL divergence from the dense model in nats per token; None without a dense model."""
        return self.held_out.kl

    def to_json(self) -> dict[str, Any]:
        """What `evoprune eval --json` prints."""
        return {
            "model": self.model,
            "perplexity": self.perplexity,
            "loss": self.loss,
            "kl": self.kl,
            "tokens": self.held_out.tokens,
            "window": self.window,
            "dtype": self.dtype,
            "images": self.images,
            "sparsity": self.sparsity,
            "data": self.data,
            **({} if self.tasks is None else {"tasks": _scores(self.tasks)}),
            **({} if self.dense_tasks is None else {"dense_tasks": _scores(self.dense_tasks)}),
            **({"samples": [sample.to_json() for sample in self.samples]} if self.samples else {}),
        }


def _scores(tasks: TaskScores) -> dict[str, dict[str, dict[str, float | None]]]:
    return {name: {metric: score.to_json() for metric, score in scores.items()} for name, scores in tasks.items()}


def criterion_label(metric: str | Criterion, criterion: Criterion) -> str:
    """How a checkpoint and the JSON name a criterion: what defines it, never the path of a file."""
    if isinstance(metric, str) and metric.strip() in CRITERIA:
        return metric.strip()
    if isinstance(criterion, Metric):
        return criterion.expression.text
    return str(getattr(criterion, "tree", type(criterion).__name__))
