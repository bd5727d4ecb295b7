"""The training of a recovery: transformers' `Trainer`, quiet, with masks that hold and checkpoints of our own."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from evoprune.fitness.cache import disk_errors
from evoprune.fitness.hub import silence
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.recoveries import Recovery, hold, learning_rate
from evoprune.fitness.recovery_checkpoint import TrainingState, last_checkpoint, learning, read_state, write_state
from evoprune.metrics.files import derived_seed

WARM_UP = 0.05
BETAS = (0.9, 0.95)
LARGEST_NORM = 1.0
# Logits of so many tokens exist at a time; of a longer window all.
FORWARD_TOKENS = 2048
# Between two checkpoints, and no less than so many times what writing the last one took.
CHECKPOINT_SECONDS, CHECKPOINT_SHARE = 20.0, 10.0

_SCHEDULES = {"cosine": "cosine", "constant": "constant_with_warmup"}


@dataclass(frozen=True)
class Trained:
    """What a training was.

    Attributes:
        steps: of the optimiser.
        parameters: how many learned.
        learning_rate: behind the warm-up.
        continued: the step of the checkpoint that it went on from; 0 from the start.
    """

    steps: int
    parameters: int
    learning_rate: float
    continued: int


def train(
    language_model: LanguageModel,
    recovery: Recovery,
    windows: Tensor,
    *,
    dense: PreTrainedModel | None,
    kept: Mapping[str, Tensor],
    seed: int,
    folder: Path | None,
    progress: Callable[[int, int], None],
) -> Trained:
    """Train what asks for gradients, each window once, in their order; the model is in training mode afterwards.

    AdamW without weight decay, with a linear warm-up over 5 % of the steps, gradients clipped to norm 1. On a GPU
    passes run in bfloat16 where it has it; parameters are float32 everywhere.

    Args:
        language_model: float32, after `Recovery.begin`.
        recovery: its learning rate, schedule and batch.
        windows: [n, window] int64 token ids.
        dense: the model to learn from: the loss is the KL divergence from its distribution at every token. None: the
            cross-entropy of the next token.
        kept: what may differ from zero; see `kept_weights`.
        seed: of dropout.
        folder: for checkpoints, and with the one to go on from; None writes none.
        progress: called with (done, all) in steps.

    Raises:
        InvalidInput: the checkpoint to go on from is damaged, or the disk is full.

    Source: specification, allocation.md 5.7; Loshchilov and Hutter 2019, arXiv:1711.05101 (AdamW).
    """
    width, model, device = windows.shape[1], language_model.model, language_model.device
    per_step = min(max(recovery.batch_tokens // width, 1), len(windows))
    per_pass = min(max(FORWARD_TOKENS // width, 1), per_step)
    passes = per_step // per_pass
    steps = -(-len(windows) // (per_pass * passes))
    found = None if folder is None else last_checkpoint(folder)
    start = None if found is None else read_state(found, model)
    with _generators_kept(), silence(), disk_errors(folder or Path()):
        arguments = TrainingArguments(
            output_dir=str(folder or Path()),
            num_train_epochs=1,
            per_device_train_batch_size=per_pass,
            gradient_accumulation_steps=passes,
            learning_rate=learning_rate(recovery, language_model),
            lr_scheduler_type=_SCHEDULES[recovery.schedule],
            warmup_steps=round(WARM_UP * steps),
            optim="adamw_torch",
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            weight_decay=0.0,
            max_grad_norm=LARGEST_NORM,
            bf16=device.type == "cuda" and torch.cuda.is_bf16_supported(),
            use_cpu=device.type == "cpu",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # the others are not ours to take
        trainer = _Trainer(
            model,
            arguments,
            windows,
            [_Steps(language_model, kept, seed, folder is not None, progress)],
            dense=dense,
            start=start,
        )
        trainer.remove_callback(PrinterCallback)
        hooks = list(_masked_gradients(model, kept))
        try:
            trainer.train(resume_from_checkpoint=None if found is None else str(found))
        finally:
            for hook in hooks:
                hook.remove()
            # Where passes are in half precision, it was wrapped for that.
            trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        if folder is not None:
            trainer.write()
    # Those that no text reaches, such as a vision tower's, have no state.
    learned = sum(parameter.numel() for parameter in trainer.optimizer.state)
    return Trained(trainer.state.global_step, learned, arguments.learning_rate, 0 if start is None else start.step)


class _Windows(Dataset[dict[str, Tensor]]):
    def __init__(self, windows: Tensor) -> None:
        self._windows = windows

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._windows[index]}


class _Trainer(Trainer):
    """Learns from a dense model or from the text, in the order of the windows; reads and writes no pickles.

    Args:
        dense: see `train`.
        start: where to begin; None is the beginning.
    """

    # Trainer has them as optional; they are there once it trains.
    model: nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LambdaLR

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: TrainingArguments,
        windows: Tensor,
        callbacks: list[TrainerCallback],
        *,
        dense: PreTrainedModel | None,
        start: TrainingState | None,
    ) -> None:
        super().__init__(model, arguments, train_dataset=_Windows(windows), callbacks=callbacks)
        self._dense, self._start = dense, start

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        ids = inputs["input_ids"]
        logits = model(input_ids=ids, use_cache=False).logits
        if self._dense is None:
            return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        with torch.no_grad():
            target = self._dense(input_ids=ids, use_cache=False).logits.flatten(0, 1).float().log_softmax(1)
        found = logits.flatten(0, 1).float().log_softmax(1)
        return functional.kl_div(found, target, reduction="batchmean", log_target=True)

    def write(self) -> None:
        """Write a checkpoint of where the training is."""
        state = TrainingState(
            self.state.global_step,
            {name: parameter.detach() for name, parameter in learning(self.model)},
            self.optimizer.state_dict()["state"],
            self.lr_scheduler.state_dict(),
        )
        write_state(Path(str(self.args.output_dir)), state, self.args.per_device_train_batch_size)

    def _get_train_sampler(self, *_: Any) -> Sampler[int]:
        assert isinstance(self.train_dataset, _Windows)
        return SequentialSampler(self.train_dataset)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.write()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        assert self._start is not None
        with torch.no_grad():
            for name, parameter in learning(self.model):
                parameter.copy_(self._start.parameters[name])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._start is None:
            return
        self.lr_scheduler.load_state_dict(self._start.schedule)
        fresh = self.optimizer.state_dict()
        for group, rate in zip(fresh["param_groups"], self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        self.optimizer.load_state_dict(fresh | {"state": self._start.optimizer})

    def _load_scaler(self, checkpoint: str | None) -> None:
        """There is none: nothing here computes in float16."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """There is none: each step seeds its own."""


class _Steps(TrainerCallback):
    """What happens at each step: its own seed, masks that hold, a checkpoint now and then, a word of how far it is."""

    def __init__(
        self,
        language_model: LanguageModel,
        kept: Mapping[str, Tensor],
        seed: int,
        saves: bool,
        progress: Callable[[int, int], None],
    ) -> None:
        self._language_model, self._seed, self._saves, self._progress = language_model, seed, saves, progress
        own = dict(learning(language_model.model))
        self._kept = {name: keep for name, keep in kept.items() if name in own}
        self._due = time.monotonic() + CHECKPOINT_SECONDS
        self._began = 0.0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **more: Any) -> None:
        torch.manual_seed(derived_seed(self._seed, "recovery-step", state.global_step))

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: Any, **more: Any) -> None:
        hold(self._language_model, self._kept)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **more: Any) -> None:
        self._progress(state.global_step, state.max_steps)
        if self._saves and time.monotonic() >= self._due:
            control.should_save, self._began = True, time.monotonic()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **more: Any) -> None:
        now = time.monotonic()
        self._due = now + max(CHECKPOINT_SECONDS, CHECKPOINT_SHARE * (now - self._began))


def _masked_gradients(model: nn.Module, kept: Mapping[str, Tensor]) -> Iterator[Any]:
    """Hooks that let the norm of the gradients, by which they are clipped, be that of the weights that there are."""
    for name, parameter in learning(model):
        if name in kept:
            gone = ~kept[name]
            yield parameter.register_hook(lambda gradient, gone=gone: gradient.masked_fill(gone, 0))


@contextmanager
def _generators_kept() -> Iterator[None]:
    """`Trainer` seeds every global generator; they are put back."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
