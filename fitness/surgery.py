"""Cutting one part of a block: slices in place of its parameters, and the parameters back again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evoprune.fitness.adapters import SiteModule
from evoprune.metrics.errors import InvalidInput

# What a linear layer says of its own size, by output and input; Conv1D has other names than Linear.
_OUT, _IN = ("out_features", "nf"), ("in_features", "nx")


@dataclass(frozen=True, slots=True)
class Span:
    """Rows or columns that stay, and where.

    Attributes:
        kept: indices in the dense matrix, ascending.
        at: where each of them is in the new one; None if the new one has no others.
        size: how many the new one has.
    """

    kept: Sequence[int]
    at: Sequence[int] | None = None
    size: int = 0

    @property
    def length(self) -> int:
        """How many rows or columns the new matrix has."""
        return len(self.kept) if self.at is None else self.size


class Part:
    """An attention or MLP of a live model.

    Args:
        model: the model.
        inputs: its matrices whose rows are units.
        output: its matrix whose columns are units.
        attributes: modules and names of what they say about their own size.
        dropped: what stands where, by module path, if the part is dropped.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Sequence[SiteModule],
        output: SiteModule,
        attributes: Sequence[tuple[nn.Module, str]],
        dropped: Mapping[str, nn.Module],
    ) -> None:
        self._model = model
        self._inputs, self._output = tuple(inputs), output
        linears = [bound.module for bound in (*inputs, output)]
        sizes = [(module, name) for module in linears for name in (*_OUT, *_IN)]
        self._attributes = [
            (module, name, getattr(module, name)) for module, name in (*sizes, *attributes) if hasattr(module, name)
        ]
        self._parameters = {module: dict(module.named_parameters(recurse=False)) for module in linears}
        self._modules = {path: model.get_submodule(path) for path in dropped}
        self._dropped = dropped
        self._whole = True

    def restore(self) -> None:
        """Put back what was there."""
        if self._whole:
            return
        for path, module in self._modules.items():
            put_module(self._model, path, module)
        for linear, parameters in self._parameters.items():
            for name, parameter in parameters.items():
                setattr(linear, name, parameter)
        for module, name, value in self._attributes:
            setattr(module, name, value)
        self._whole = True

    def drop(self) -> None:
        """Let the part add nothing, without any parameter."""
        self.restore()
        for path, module in self._dropped.items():
            put_module(self._model, path, module)
        self._whole = False

    def dense(self) -> dict[str, Tensor]:
        """The weights, [out, in], and biases of the matrices as they are where nothing is cut, by full name."""
        found = {}
        for bound in (*self._inputs, self._output):
            for name, parameter in self._parameters[bound.module].items():
                value = parameter.detach()
                found[f"{bound.site.name}.{name}"] = value.T if bound.transposed and name == "weight" else value
        return found

    def cut(
        self,
        rows: Sequence[Span],
        columns: Span,
        output: Tensor | None,
        attributes: Mapping[str, Any],
        given: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Replace the matrices by parts of them.

        Args:
            rows: of each input.
            columns: of the output.
            output: [out, kept] what the kept columns are, in place of the dense ones.
            attributes: values by name, set where the part has such an attribute.
            given: what is cut in place of what `dense` gives.

        Raises:
            InvalidInput: `output` has another size.
        """
        self.restore()
        self._whole = False
        for bound in (*self._inputs, self._output):
            for name in self._parameters[bound.module] if given else ():
                _replace(bound, name, (given or {})[f"{bound.site.name}.{name}"])
        for bound, span in zip(self._inputs, rows, strict=True):
            _replace(bound, "weight", _spread(_weight(bound, span.kept, 0), span, 0))
            if (bias := bound.bias()) is not None:
                _replace(bound, "bias", _spread(bias[_index(span.kept, bias)], span, 0))
            _say(bound.module, _OUT, span.length)
        kept = _weight(self._output, columns.kept, 1) if output is None else self._given(output, len(columns.kept))
        _replace(self._output, "weight", _spread(kept, columns, 1))
        if not columns.kept and (bias := self._output.bias()) is not None:
            _replace(self._output, "bias", torch.zeros_like(bias))
        _say(self._output.module, _IN, columns.length)
        for module, name, _ in self._attributes:
            if name in attributes:
                setattr(module, name, attributes[name])

    def _given(self, output: Tensor, columns: int) -> Tensor:
        weight = self._output.weight()
        if output.shape != (weight.shape[0], columns):
            raise InvalidInput(
                f"the output of {self._output.site.name} is {list(output.shape)}; its shape asks for "
                f"{[weight.shape[0], columns]}"
            )
        return output.detach().to(weight)


def put_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Let `module` stand at `path` in `model`."""
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _weight(bound: SiteModule, kept: Sequence[int], dim: int) -> Tensor:
    """The [out, in] weight with these rows (0) or columns (1) alone."""
    weight = bound.weight()
    return weight.index_select(dim, _index(kept, weight))


def _spread(kept: Tensor, span: Span, dim: int) -> Tensor:
    """`kept` with zeros around it where the span leaves room."""
    if span.at is None:
        return kept
    size = list(kept.shape)
    size[dim] = span.size
    return kept.new_zeros(size).index_copy_(dim, _index(span.at, kept), kept)


def _index(indices: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(indices, dtype=torch.long, device=like.device)


def _replace(bound: SiteModule, name: str, value: Tensor) -> None:
    """Let the layer of a site hold another parameter; a weight is given as [out, in]."""
    old = bound.module.get_parameter(name)
    stored = value.T.contiguous() if bound.transposed and name == "weight" else value
    setattr(bound.module, name, nn.Parameter(stored, requires_grad=old.requires_grad))


def _say(module: nn.Module, names: Sequence[str], size: int) -> None:
    for name in names:
        if hasattr(module, name):
            setattr(module, name, size)
