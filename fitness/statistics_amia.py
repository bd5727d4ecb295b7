"""Statistics of the inputs of chosen tokens only: TAMP's adaptive multimodal input activation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from evoprune.fitness.adapters.base import SiteModule
from evoprune.fitness.amia import TokenChoice, select_tokens
from evoprune.fitness.samples import Batch
from evoprune.fitness.statistics_forward import ForwardSums
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.records import LANGUAGE


class ChosenSums(ForwardSums):
    """`ForwardSums` over the tokens that `select_tokens` takes of each sequence, matrix by matrix.

    Sums of squares are divided by the tokens that were chosen for the matrix, in towers too, since not equally many are
    chosen everywhere. Towers and projectors, which no last token looks at, are summed over all tokens. Unlike in the
    released code the model is dense throughout, as it is for all statistics here, and not pruned up to the block at
    hand.

    Args:
        sites: the sites of the model.
        names: stored terminals with cost ``forward`` or ``hessian``, and ``H``.
        choice: how tokens are chosen.
        blocks: the block with each index that `sites` name.
        model: whose attention gives its maps while `hooked`.

    Source of the divisor: Lee et al. 2025, TAMP; multimodal allocation chapter, section 2, step 5.
    """

    def __init__(
        self,
        sites: Iterable[SiteModule],
        names: frozenset[str],
        choice: TokenChoice,
        blocks: Mapping[int, nn.Module],
        model: PreTrainedModel,
    ) -> None:
        super().__init__(sites, names)
        self._choice = choice
        self._model = model
        read = {bound.site.block for bound in self._sites if bound.site.component == LANGUAGE}
        self._blocks = {index: blocks[index] for index in read}
        self._waiting: list[tuple[SiteModule, Tensor, Tensor]] = []  # what the block's matrices got and gave
        self._attention: Tensor | None = None

    @contextmanager
    def hooked(self) -> Iterator[None]:
        with super().hooked(), ExitStack() as stack:
            stack.enter_context(attention_maps(self._model))
            for block in self._blocks.values():
                handles = [child.register_forward_hook(self._hear_attention) for child in block.children()]
                handles.append(block.register_forward_hook(self._end_block))
                for handle in handles:
                    stack.callback(handle.remove)
            yield

    def _shares(self, name: str, sequences: int) -> int:
        return self.rows[name]

    def _hear(self, bound: SiteModule, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if bound.site.component != LANGUAGE:
            super()._hear(bound, module, args, output)
        else:
            self._waiting.append((bound, args[0].detach(), output.detach()))

    def _hear_attention(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, tuple) and len(output) > 1 and isinstance(output[1], Tensor) and output[1].dim() == 4:
            self._attention = last_row(output[1], self._batch)

    def _end_block(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        waiting, self._waiting = self._waiting, []
        attention, self._attention = self._attention, None
        if attention is None:
            raise InvalidInput(
                f"{type(module).__name__} gives no attention map, by which tokens are chosen: collect over all tokens"
            )
        assert self._batch is not None
        rows = [row for row, _ in self._batch.by_row(attention[..., None])]
        for bound, inputs, outputs in waiting:
            self.leaders[bound.site.name] = bound.site.name
            pairs = zip(self._batch.by_row(inputs), self._batch.by_row(outputs), rows, strict=True)
            for (given, _), (made, modality), seen in pairs:
                index = select_tokens(made, seen[:, 0], self._choice, modality=modality)
                self._add(
                    bound, bound.site.name, given[index], made[index], None if modality is None else modality[index]
                )


def last_row(attention: Tensor, batch: Batch | None) -> Tensor:
    """What the last token of each sequence that is no padding pays to every token.

    Args:
        attention: [rows, heads, tokens, tokens], each row of which sums to 1.
        batch: says what is padding.

    Returns:
        [rows, tokens] float32, mean over heads; zero at padding.
    """
    rows, _, tokens, _ = attention.shape
    last = [tokens - 1] * rows
    if batch is not None and batch.keep is not None:
        last = [int(keep.nonzero().max()) for keep in batch.keep]
    return attention.float().mean(1)[range(rows), last]


@contextmanager
def attention_maps(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the language model's attention hands out its maps, which fused kernels do not."""
    kind = type(model.config.get_text_config())
    found = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    configs = [config for config in found.values() if isinstance(config, kind)]
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation
