"""A model of which one part is in memory at a time: decoder blocks, embeddings and head come from its files in turn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from evoprune.fitness.adapters import auto_class, list_sites
from evoprune.fitness.compact import is_compact
from evoprune.fitness.hub import fingerprint, one_line, silence
from evoprune.fitness.models import (
    LanguageModel,
    check_model,
    check_vocabulary,
    config_facts,
    device_of,
    dtype_of,
    read_tokenizer,
)
from evoprune.fitness.modular import is_modular
from evoprune.fitness.weight_files import WeightFiles
from evoprune.metrics.errors import InvalidInput


@dataclass(frozen=True)
class Streamed:
    """A model whose weights are read when they are needed.

    Attributes:
        language_model: its blocks and its head are on the meta device, and its embeddings read as zeros, unless they
            are resident; all else, such as norms and positions, is there.
        files: where the weights are.
        dtype: that it computes in.
        device: that it computes on.
        embeddings, head: names of the parameters of the input embeddings, and of those of the output head.
        beside: names of what is outside the blocks and always there.
    """

    language_model: LanguageModel
    files: WeightFiles
    dtype: torch.dtype
    device: torch.device
    embeddings: tuple[str, ...]
    head: tuple[str, ...]
    beside: tuple[str, ...]

    @property
    def model(self) -> PreTrainedModel:
        """The model, empty but for what is resident."""
        return self.language_model.model

    @property
    def n_blocks(self) -> int:
        """How many decoder blocks it has."""
        return len(self.language_model.blocks())

    def block(self, index: int) -> tuple[str, ...]:
        """Names of all tensors of a decoder block."""
        prefix, block = self.language_model.blocks()[index]
        return tuple(f"{prefix}.{name}" for name in block.state_dict())

    @contextmanager
    def resident(self, names: Iterable[str]) -> Iterator[None]:
        """Inside, these tensors are in memory, and may be changed there; behind it they are as they were before.

        Raises:
            InvalidInput: one cannot be read, or is not finite.
        """
        with ExitStack() as stack:
            for name in names:
                owner, leaf = _owner(self.model, name)
                before = getattr(owner, leaf)
                stack.callback(_put, owner, leaf, before)
                found = self.files.read(name, self.dtype, self.device)
                _put(owner, leaf, nn.Parameter(found, requires_grad=False) if _is_parameter(before) else found)
                del found
            yield


def open_streamed(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Streamed:
    """A model to be read part by part; arguments as of `evoprune.fitness.models.load_model`.

    Raises:
        InvalidInput: what `load_model` refuses; or it also reads images, has parts of ours or weights that its class
            keeps in float32, or its files call weights otherwise than its class does.
    """
    target = device_of(device)
    computes = dtype_of(dtype, target)
    folder, config = check_model(name, revision=revision, trust_remote_code=trust_remote_code)
    facts = config_facts(folder)
    if is_compact(facts) or is_modular(facts):
        raise InvalidInput(f"model {name!r} has a form of evoprune's own, which is loaded whole: leave out --memory")
    tokenizer = read_tokenizer(folder, config, trust_remote_code)
    model = _empty(name, config, computes, trust_remote_code)
    check_vocabulary(folder, tokenizer, model)
    language_model = LanguageModel(
        model=model,
        tokenizer=tokenizer,
        sites=tuple(list_sites(model)),
        name=name,
        fingerprint=fingerprint(folder),
        stored_dtype=config.dtype if isinstance(config.dtype, torch.dtype) else None,
        folder=folder,
    )
    if language_model.multimodal:
        raise InvalidInput(f"model {name!r} also reads images, and such are loaded whole: leave out --memory")
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    if kept and computes != torch.float32:
        raise InvalidInput(f"{type(model).__name__} keeps {min(kept)} in float32: give --dtype float32 with --memory")
    files = WeightFiles(folder, model)
    names = _names(language_model)
    streamed = Streamed(language_model, files, computes, target, *names)
    _fill(streamed)
    return streamed


def _empty(name: str, config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """A model on the meta device, in eval mode, with attention as `load_model` has it."""

    def build(attention: str) -> PreTrainedModel:
        with silence(), torch.device("meta"):
            return auto_class(config).from_config(
                config, dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code
            )

    try:
        try:
            model = build("sdpa")
        except ValueError as error:
            if "scaled_dot_product_attention" not in str(error):
                raise
            model = build("eager")
    except Exception as error:
        raise InvalidInput(f"model {name!r} cannot be built empty: {one_line(error)}") from error
    return model.eval().requires_grad_(False)


def _names(language_model: LanguageModel) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Names of the tensors of the embeddings, of the head, and of what is in neither and in no block."""
    model = language_model.model
    places = {id(module): path for path, module in model.named_modules()}
    state = model.state_dict(keep_vars=True)

    def within(module: nn.Module | None) -> tuple[str, ...]:
        if module is None:
            return ()
        path = places[id(module)]
        return tuple(name for name in state if name.startswith(f"{path}."))

    embeddings, head = within(model.get_input_embeddings()), within(model.get_output_embeddings())
    blocks = tuple(f"{path}." for path, _ in language_model.blocks())
    apart = {*embeddings, *head}
    beside = tuple(name for name in state if name not in apart and not name.startswith(blocks))
    return embeddings, head, beside


@torch.no_grad()
def _fill(streamed: Streamed) -> None:
    """Bring what is always there into memory: weights beside the blocks, and buffers that are in no file."""
    model = streamed.model
    for name in streamed.beside:
        owner, leaf = _owner(model, name)
        found = streamed.files.read(name, streamed.dtype, streamed.device)
        _put(owner, leaf, nn.Parameter(found, requires_grad=False) if _is_parameter(getattr(owner, leaf)) else found)
    for name in streamed.embeddings:
        # Rows of zeros that take no memory: what blocks behind the first are given does not come from here, but its
        # device and its shape do.
        owner, leaf = _owner(model, name)
        shape = getattr(owner, leaf).shape
        zeros = torch.zeros((), dtype=streamed.dtype, device=streamed.device).expand(shape)
        _put(owner, leaf, nn.Parameter(zeros, requires_grad=False))
    owners = {}
    for name, buffer in model.named_non_persistent_buffers():
        owner, leaf = _owner(model, name)
        _put(owner, leaf, torch.empty_like(buffer, device=streamed.device))
        owners[id(owner)] = owner
    with silence():
        for owner in owners.values():
            # As transformers itself does behind loading; weights in these modules have no memory to be drawn into.
            kept = dict(owner.named_parameters(recurse=False))
            for leaf, value in kept.items():
                _put(owner, leaf, nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=False))
            model._init_weights(owner)
            for leaf, value in kept.items():
                _put(owner, leaf, value)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _is_parameter(value: object) -> bool:
    return isinstance(value, nn.Parameter)


def _put(owner: nn.Module, leaf: str, value: Tensor) -> None:
    """Set a parameter or a buffer in place of the one of this name."""
    held: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
    held[leaf] = value
