"""What the outputs of a cut model become when each makes up for its own cut and for all before it.

Block by block, attention before MLP, an output matrix is solved for on the activations of the model cut so far, towards
the hidden states of the dense model: one exact refit, without gradients, in place of training a candidate before it is
measured.
Source: layerwise sparsity allocation, section 5.7 (path refit).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from evoprune.fitness.block_walk import BlockWalk
from evoprune.fitness.dense_stream import CORRECTION, DenseStream, dense_stream
from evoprune.fitness.models import LanguageModel
from evoprune.fitness.refit import Factor
from evoprune.fitness.samples import Sequences
from evoprune.fitness.structure_build import check_path, named_parts, part_sums, replaced, texts_of
from evoprune.fitness.structure_parts import Part, columns_of, problem_of, spread
from evoprune.fitness.units import BlockUnits, PartName
from evoprune.metrics.shape import BlockShape


@torch.no_grad()
def path_refits(
    language_model: LanguageModel,
    units: Sequence[BlockUnits],
    windows: Sequences | Sequence[Sequences],
    path: Sequence[BlockShape],
    correction: float = CORRECTION,
) -> list[dict[PartName, Tensor]]:
    """Of each block the weights [out, kept] float32 of its outputs, columns ascending; of a whole part the dense one.

    Weights of the same shapes from a database of the mode ``path`` are equal but for rounding; this makes no orders.

    Args:
        language_model: the dense model, whose weights are as before at the end.
        units: of all of its blocks.
        windows: text A, or several texts, as `evoprune.fitness.structure_build.build_structure_database` takes them.
        path: what is kept of each block.
        correction: as of `evoprune.fitness.structure_build.build_structure_database`.

    Raises:
        InvalidInput: no such correction, shapes that do not fit, or a Gram matrix that cannot be inverted even damped.
    """
    check_path(units, path)
    texts = texts_of(windows)
    walk = BlockWalk(language_model, [block.name for block in units], texts)
    stream = dense_stream(language_model, units, texts, correction, walk)
    found: list[dict[PartName, Tensor]] = []
    for block, shape in zip(units, path, strict=True):
        found.append({})
        if stream is not None:
            stream.enter(block)
        with ExitStack() as stack:
            for name, part in named_parts(block):
                columns = columns_of(part, shape)
                weight = found[-1][name] = _refit(walk, part, columns, stream)
                stack.enter_context(replaced(part, spread(part, weight, columns), dropped=not columns))
            if len(found) < len(units):
                walk.run({}, to=len(found))
    return found


def _refit(walk: BlockWalk, part: Part, columns: Sequence[int], stream: DenseStream | None) -> Tensor:
    weight = part.output.weight().float()
    if len(columns) in (0, weight.shape[1]):
        return weight[:, list(columns)]
    problem = problem_of(part, *part_sums(walk, part, stream))
    return Factor.of(problem, torch.tensor(columns, device=weight.device)).weight(len(columns)).float()
