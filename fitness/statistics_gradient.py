"""Statistics of weight gradients, one gradient per sequence, without ever storing a `.grad`.

Each site gets a tap on its output. When the backward pass reaches the tap it holds the layer's inputs x and the
gradient dy of its outputs, so the gradient of one sequence is dyᵀ x over that sequence's tokens: added to the sums
and dropped at once. Several sequences share a forward and a backward pass, and the weights need no gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from evoprune.fitness.adapters.base import SiteModule
from evoprune.fitness.samples import Batch, Sequences, forward_batches
from evoprune.fitness.statistics_forward import Results
from evoprune.metrics.errors import EvopruneError

# fp16 gradients of a mean loss underflow (a fifth of them, at a median of 1e-7); a power of two unscales exactly.
HALF_LOSS_SCALE = 1024.0
# Tokens whose softmax is computed at once.
LOGIT_ROWS = 256


def loss_scale(dtype: torch.dtype) -> float:
    """What the loss is multiplied by before the backward pass of a model of type `dtype`."""
    return HALF_LOSS_SCALE if dtype == torch.float16 else 1.0


class Taps(ABC):
    """Taps on sites, and what is made of what they hear, one sequence at a time.

    Args:
        sites: the sites of the model.
        scale: what the loss is multiplied by.
    """

    def __init__(self, sites: Iterable[SiteModule], scale: float = 1.0) -> None:
        self._sites = {bound.site.name: bound for bound in sites}
        self._scale = scale
        self._seen: set[str] = set()
        self._sequences = 0
        self._window: int | None = 0

    @contextmanager
    def tapped(self) -> Iterator[None]:
        """Put a tap on every site; it works where gradients are enabled."""
        handles = [bound.module.register_forward_hook(partial(self._tap, name)) for name, bound in self._sites.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def expect(self, sequences: int, window: int | None) -> None:
        """Announce the batch that the next backward pass belongs to.

        Args:
            sequences: how many there are.
            window: tokens in each; None of a single sequence, all of whose rows it then are, however many a layer gets.
        """
        assert window is not None or sequences == 1
        self._sequences, self._window = sequences, window
        self._seen.clear()

    def add(self, name: str, inputs: Tensor, output_gradient: Tensor) -> None:
        """Take in one site's part of a backward pass.

        Args:
            name: the site.
            inputs: [sequences, window, in] or [sequences * window, in].
            output_gradient: the same with out for in, times the loss scale.
        """
        if name in self._seen:
            raise EvopruneError(f"{name} runs more than once per forward pass: its gradients cannot be told apart")
        self._seen.add(name)
        with torch.no_grad():
            xs, dys = self._per_sequence(name, inputs), self._per_sequence(name, output_gradient)
            for x, dy in zip(xs, dys, strict=True):
                narrow = dy.float() if self._scale == 1 else dy.float() / self._scale
                self._take(name, x.float(), narrow)

    @abstractmethod
    def _take(self, name: str, inputs: Tensor, output_gradient: Tensor) -> None:
        """One sequence of a site: [tokens, in] and [tokens, out] float32, the latter of the loss itself."""

    def _tap(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        tapped: Tensor = _Tap.apply(output, args[0], partial(self.add, name))
        return tapped

    def _per_sequence(self, name: str, tensor: Tensor) -> Tensor:
        if self._window is None:
            return tensor.reshape(1, -1, tensor.shape[-1])
        rows = self._sequences * self._window
        batched = tensor.dim() == 3 and tensor.shape[:2] == (self._sequences, self._window)
        if not batched and not (tensor.dim() == 2 and tensor.shape[0] == rows):
            raise EvopruneError(f"{name} gets {list(tensor.shape)}, not sequences x tokens x features: no gradients")
        return tensor.reshape(self._sequences, self._window, tensor.shape[-1])


class GradientSums(Taps):
    """Sums over sequences of |g|, g and g², float32 [out, in] per site.

    Args:
        sites: the sites of the model.
        names: terminals out of ``G_l2 G_l1 G_mean G_reg``; each costs one float32 copy of the prunable weights.
        scale: what the loss is multiplied by.
    """

    def __init__(self, sites: Iterable[SiteModule], names: frozenset[str], scale: float = 1.0) -> None:
        super().__init__(sites, scale)
        # All at once: between the activations of the first pass they would leave the heap full of holes.
        self._sums: Results = {name: _zeros(bound, names) for name, bound in self._sites.items()}

    def results(self, sequences: int) -> Results:
        """Site -> terminal -> [out, in] float32. To be called once: the sums are finished in place and given away."""
        finish: dict[str, Callable[[Tensor], Tensor]] = {
            "G_l2": Tensor.sqrt_,
            "G_l1": lambda total: total,
            "G_mean": lambda total: total.div_(sequences),
            "G_reg": lambda total: total.div_(sequences).sqrt_(),
        }
        found, self._sums = self._sums, {}
        for name, sums in found.items():
            if name not in self._seen:
                raise EvopruneError(f"no gradient reaches {name}")
            for terminal, total in sums.items():
                if not bool(total.isfinite().all()):
                    raise EvopruneError(f"{terminal} of {name} is not finite: load the model in bfloat16 or float32")
                finish[terminal](total)
        return found

    def _take(self, name: str, inputs: Tensor, output_gradient: Tensor) -> None:
        gradient = output_gradient.t() @ inputs
        for terminal, total in self._sums[name].items():
            if terminal in ("G_l2", "G_reg"):
                total.addcmul_(gradient, gradient)
            else:
                total.add_(gradient.abs() if terminal == "G_l1" else gradient)


def _zeros(bound: SiteModule, names: Iterable[str]) -> dict[str, Tensor]:
    shape, device = (bound.site.out_features, bound.site.in_features), bound.weight().device
    return {name: torch.zeros(shape, device=device) for name in sorted(names)}


class _Tap(torch.autograd.Function):
    """Identity on a layer's output that hands the layer's input and the output's gradient to a function."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, sink: Callable[[Tensor, Tensor], None]) -> Tensor:
        # Saved by autograd, not in a closure, so that activation checkpointing drops and recomputes it.
        ctx.save_for_backward(inputs)
        ctx.sink = sink
        # A copy, not an alias: some models go on to change a layer's output in place.
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inputs,) = ctx.saved_tensors
        ctx.sink(inputs, gradients[0])
        return gradients[0], None, None


def backward_from_loss(logits: Tensor, batch: Batch, scale: float = 1.0) -> None:
    """Back-propagate the sum over sequences of each sequence's mean causal cross-entropy, times `scale`.

    Args:
        logits: [sequences, window, vocabulary], with a graph. Destroyed: their gradient, softmax minus one-hot, is
            written over them, where autograd would need three more tensors of this size.
        batch: the inputs, of which text is predicted from what stands before it.
        scale: loss scaling.
    """
    gradient = logits.detach()  # the same memory; autograd objects if a layer still needs what was there
    targets = batch.inputs["input_ids"][:, 1:, None].to(logits.device)
    predicted = batch.predicted
    if predicted is None:
        shares = torch.full_like(targets, scale / targets.shape[1], dtype=torch.float32)
    else:
        shares = (scale * predicted / predicted.sum(1, keepdim=True).clamp(min=1))[..., None].to(logits.device)
    step = max(1, LOGIT_ROWS // batch.rows)
    parts = (part.split(step, dim=1) for part in (gradient[:, :-1], targets, shares))
    for rows, target, share in zip(*parts, strict=True):
        surplus = torch.softmax(rows, dim=-1, dtype=torch.float32)
        surplus.scatter_add_(-1, target, torch.full_like(target, -1, dtype=torch.float32))
        rows.copy_(surplus.mul_(share))
    gradient[:, -1] = 0  # the last token predicts nothing
    logits.backward(gradient)


@contextmanager
def checkpointed(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Keep only each block's inputs during a forward pass and recompute the rest in the backward pass."""
    changed: list[tuple[nn.Module, Any]] = []
    try:
        for block in blocks:
            changed.append((block, block.__dict__.get("forward")))
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        yield
    finally:
        for block, own in changed:
            if own is None:
                del block.forward
            else:
                block.forward = own


def gradient_pass(
    model: nn.Module,
    sums: Taps,
    windows: Sequences,
    batch: int,
    device: torch.device,
    scale: float,
    blocks: Sequence[nn.Module],
    recompute: bool,
    advance: Callable[[int], None],
) -> None:
    """Gradients of the language-model loss, such as for ``G_l2``, ``G_l1`` and ``G_mean``.

    Args:
        model: a transformers causal language model in eval mode whose parameters are frozen.
        sums: takes the gradients in.
        windows: of text, or samples.
        batch: windows per backward pass.
        device: of the embeddings.
        scale: loss scaling.
        blocks: the decoder blocks from the first that `sums` listens to, to the last of the model.
        recompute: use activation checkpointing in `blocks`.
        advance: called with the number of windows done since its last call.
    """
    # Frozen weights build no graph: it starts at the inputs of the first block of interest.
    start = blocks[0].register_forward_pre_hook(
        lambda block, args, kwargs: _with_gradient(args, kwargs), with_kwargs=True
    )
    try:
        with torch.enable_grad(), sums.tapped(), checkpointed(blocks if recompute else ()):
            for given in forward_batches(windows, batch, device):
                sums.expect(given.rows, given.inputs["input_ids"].shape[1])
                backward_from_loss(model(**given.inputs, use_cache=False).logits, given, scale)
                advance(given.rows)
    finally:
        start.remove()


def regional_pass(
    model: nn.Module,
    sums: GradientSums,
    windows: Sequences,
    batch: int,
    device: torch.device,
    scale: float,
    blocks: Sequence[nn.Module],
    advance: Callable[[int], None],
) -> None:
    """Gradients of the norm of each block's output, back-propagated inside that block only, for ``G_reg``.

    Arguments as in `gradient_pass`, but `blocks` are those that `sums` listens to.

    Source: Yang et al. 2025, Wanda++, arXiv:2503.04992 (regional gradient score).
    """
    running = False
    keep: Tensor | None = None

    def replay(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal running
        if running:  # the replay calls this hook again
            return
        running = True
        try:
            with torch.enable_grad():
                args, kwargs = _with_gradient(args, kwargs)
                result = block(*args, **kwargs)
                hidden = result if isinstance(result, Tensor) else result[0]
                if keep is not None:
                    hidden = hidden * keep[..., None].to(hidden.device)
                norms = torch.linalg.vector_norm(hidden.float(), dim=(1, 2))  # one per sequence
                (norms.sum() * scale).backward()
        finally:
            running = False

    handles = [block.register_forward_hook(replay, with_kwargs=True) for block in blocks]
    body = getattr(model, "base_model", model)
    try:
        with torch.no_grad(), sums.tapped():
            for given in forward_batches(windows, batch, device):
                sums.expect(given.rows, given.inputs["input_ids"].shape[1])
                keep = given.keep
                body(**given.inputs, use_cache=False)
                advance(given.rows)
    finally:
        for handle in handles:
            handle.remove()


def _with_gradient(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments, the hidden states replaced by a leaf that wants a gradient."""
    if args:
        return (args[0].detach().requires_grad_(True), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": kwargs["hidden_states"].detach().requires_grad_(True)}
