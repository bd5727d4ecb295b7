"""Looking at what decoder blocks are given and return, and changing it, whatever the family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def hidden_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The hidden states among the arguments of a block: the first, or the one of that name."""
    return args[0] if args else kwargs.get("hidden_states")


@contextmanager
def input_seen(block: nn.Module, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Inside, `see` is called with the hidden states that the block is given, each time."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = hidden_argument(args, kwargs)
        if isinstance(hidden, Tensor):
            see(hidden)

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def output_seen(block: nn.Module, see: Callable[[Any], None]) -> Iterator[None]:
    """Inside, `see` is called with what the block returns, each time."""
    handle = block.register_forward_hook(lambda module, args, output: see(output))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def input_replaced(block: nn.Module, hidden: Tensor) -> Iterator[None]:
    """Inside, the block is given a copy of `hidden` in place of its hidden states."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (hidden.clone(), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden.clone()}

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def passing_through(block: nn.Module, beside: tuple[Any, ...] | None) -> Iterator[None]:
    """Inside, `block` returns the hidden states that it is given, with `beside` behind them if it returns a tuple."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = hidden_argument(args, kwargs)
        return hidden if beside is None else (hidden, *beside)

    # An attribute of the instance hides the method of its class, and may itself be there before: accelerate's is.
    before = block.__dict__.get("forward")
    block.forward = forward
    try:
        yield
    finally:
        if before is None:
            del block.forward
        else:
            block.forward = before


def hidden_output(output: Any) -> Tensor:
    """A block's hidden states: transformers gives a tensor or a tuple that begins with it."""
    return output if isinstance(output, Tensor) else output[0]


def beside_hidden(output: Any) -> tuple[Any, ...] | None:
    """What a block returns beside its hidden states, without tensors; None if it returns nothing else."""
    if not isinstance(output, tuple):
        return None
    return tuple(None if isinstance(part, Tensor) else part for part in output[1:])
