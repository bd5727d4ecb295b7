"""Options of a learner as a configuration has them."""

from __future__ import annotations

from typing import Any

from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.parameters import parameters_of
from evoprune.search.config_policy import PolicySearcher
from evoprune.search.learners import LEARNERS


def learner_options(searcher: PolicySearcher) -> dict[str, Any]:
    """What is not as the learner has it by default: the number of samples, where it knows one, and what is given.

    Raises:
        UnknownName: no such learner.
        InvalidInput: it is to choose the number of masks by itself, and cannot.
    """
    plugin = LEARNERS[searcher.name]
    if searcher.samples == "auto" and not plugin.adapts:
        raise InvalidInput(
            f"the learner {searcher.name} takes a fixed number of masks a step: give --population a number"
        )
    known = parameters_of(plugin)
    samples = {"samples": searcher.samples} if "samples" in known else {}
    return {**samples, **searcher.options}
