"""Models that read more than text: towers, projectors and a language model, each a component with its own matrices."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from evoprune.fitness.adapters.base import ADAPTERS, Part, linear_kinds
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.records import LANGUAGE
from evoprune.metrics.registry import Registry

VISION, PROJECTOR = "vision_tower", "projector"


@dataclass(frozen=True, slots=True)
class Component:
    """Where the prunable matrices of one part of a model family are.

    Attributes:
        name: what users call it: ``language_model``, ``vision_tower``, ``projector``.
        root: module path of a list of blocks, of a module with such a list in it, of which the heaviest is taken, or
            of a module without one, which is then a single block.
        kinds: paths of the prunable linear layers inside a block, in the order in which a forward pass uses them. If
            empty, those of the text family for the language model; elsewhere every linear layer.
    """

    name: str
    root: str
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MultimodalAdapter:
    """The components of a model family.

    Attributes:
        components: in the order of a forward pass, the language model last.
        auto: name of the class in transformers that loads the family.
    """

    components: tuple[Component, ...]
    auto: str = "AutoModelForImageTextToText"


MULTIMODAL: Registry[MultimodalAdapter] = Registry("multimodal family", "evoprune.fitness.adapters")


def component_part(model: PreTrainedModel, component: Component) -> Part:
    """A component of a live model.

    Raises:
        InvalidInput: the model has no such module, or it holds no linear layer.
    """
    try:
        root = model.get_submodule(component.root)
    except AttributeError:
        raise InvalidInput(f"{type(model).__name__} has no {component.root!r} for the {component.name}") from None
    where, blocks = _blocks(component.root, root)
    kinds = component.kinds
    if not kinds and component.name == LANGUAGE:
        family = model.config.get_text_config().model_type
        kinds = ADAPTERS[family].kinds if family in ADAPTERS else ()
    return Part(component.name, blocks, kinds or linear_kinds(where, (block for _, block in blocks)), where)


def _blocks(path: str, root: nn.Module) -> tuple[str, list[tuple[str, nn.Module]]]:
    """(module path of the list, its blocks)."""
    lists = [(name, module) for name, module in root.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        return path, [(path, root)]
    # `max` keeps the first of equals, and an outer list comes before the lists inside it.
    name, found = max(lists, key=lambda entry: sum(parameter.numel() for parameter in entry[1].parameters()))
    where = f"{path}.{name}" if name else path
    return where, [(f"{where}.{index}", block) for index, block in found.named_children()]
