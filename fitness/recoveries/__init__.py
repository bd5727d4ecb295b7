"""Recoveries: how the weights that are left learn to do without those that went. Plug-ins, one file each.

A recovery is a frozen dataclass whose fields are its parameters. It says which parameters learn and how they come back
into the model; `evoprune.fitness.recovery` trains them, the same way for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from evoprune.fitness.models import LanguageModel
from evoprune.metrics import parameters
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.parameters import check_choice, check_range
from evoprune.metrics.registry import Registry

SCHEDULES = ("cosine", "constant")
_MOST_BATCH_TOKENS = 1 << 24


class Recovery(Protocol):
    """Makes parameters of a pruned model learn, and a plain model of it afterwards.

    Attributes:
        packages: what it imports beside evoprune's own requirements.
        source: the paper it is from.
        learning_rate: of AdamW, behind the warm-up; None leaves it to the width of the model.
        rate_by_width: what is then divided by the hidden size.
        schedule: one of `SCHEDULES`: what becomes of the learning rate.
        batch_tokens: tokens in a step.
    """

    @property
    def packages(self) -> tuple[str, ...]: ...

    @property
    def source(self) -> str: ...

    @property
    def learning_rate(self) -> float | None: ...

    @property
    def rate_by_width(self) -> float: ...

    @property
    def schedule(self) -> str: ...

    @property
    def batch_tokens(self) -> int: ...

    def begin(self, language_model: LanguageModel, kept: Mapping[str, Tensor]) -> None:
        """Let those parameters ask for gradients that shall learn; may add some. Draws from torch's own generator.

        Args:
            language_model: pruned, float32, no parameter asks for gradients.
            kept: what may differ from zero; see `kept_weights`. The model's own parameters are held to it by whoever
                trains them, parameters that are added are not.
        """

    def end(self, language_model: LanguageModel, kept: Mapping[str, Tensor]) -> None:
        """Bring what was learned into the model's own parameters, and take away what was added."""


RECOVERIES: Registry[Recovery] = Registry("recovery", "evoprune.fitness.recoveries")


@dataclass(frozen=True)
class Training:
    """The parameters that every recovery of ours has.

    Attributes:
        learning_rate: of AdamW, behind the warm-up; None takes `rate_by_width` / hidden size.
        schedule: ``cosine`` falls to zero, ``constant`` stays.
        batch_tokens: tokens in a step.

    Source: specification, allocation.md 5.7; of rates by width Yang et al. 2022, arXiv:2203.03466, table 3: those of
    Adam for the matrices inside a model go as 1 / width.
    """

    learning_rate: float | None = None
    schedule: str = "cosine"
    batch_tokens: int = 2048

    packages: ClassVar[tuple[str, ...]] = ("accelerate",)

    def __post_init__(self) -> None:
        if self.learning_rate is not None:
            check_range("learning_rate", self.learning_rate, 0, 1)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_range("batch_tokens", self.batch_tokens, 1, _MOST_BATCH_TOKENS)


def configured(name: str, given: Mapping[str, object] | None = None) -> Recovery:
    """A registered recovery with some parameters changed; see `evoprune.metrics.parameters.configured`."""
    return parameters.configured(RECOVERIES, name, given)


def learning_rate(recovery: Recovery, language_model: LanguageModel) -> float:
    """The one that was given, or what follows from the width of the model."""
    hidden: int = language_model.model.config.get_text_config().hidden_size
    return recovery.rate_by_width / hidden if recovery.learning_rate is None else recovery.learning_rate


def check_packages(name: str, recovery: Recovery) -> None:
    """Refuse a recovery that cannot run here; worth asking before long work.

    Raises:
        InvalidInput: names the package and what installs it.
    """
    for package in recovery.packages:
        if find_spec(package) is None:
            raise InvalidInput(f"recovery {name!r} needs {package}: pip install 'evoprune[recovery]'")


def kept_weights(language_model: LanguageModel) -> dict[str, Tensor]:
    """What of a pruned model may differ from zero, by name of the parameter, as its layer stores it; bool, True = keep.

    A weight that is zero stays zero. So does a bias of zero where the whole row is: there nothing is left but room.
    Parameters without such zeros are not named.
    """
    found = {}
    for bound in language_model.sites:
        weight = bound.weight() != 0
        if not bool(weight.all()):
            found[f"{bound.site.name}.weight"] = weight.T if bound.transposed else weight
        if (bias := bound.bias()) is not None:
            live = weight.any(1) | (bias != 0)
            if not bool(live.all()):
                found[f"{bound.site.name}.bias"] = live
    return found


@torch.no_grad()
def hold(language_model: LanguageModel, kept: Mapping[str, Tensor]) -> None:
    """Zero what `kept_weights` does not keep."""
    for name, keep in kept.items():
        language_model.model.get_parameter(name).masked_fill_(~keep, 0)  # a product would write -0
