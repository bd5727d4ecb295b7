"""Options of a learner as a configuration has them."""

from __future__ import annotations

from typing import Any

from evoprune.metrics.parameters import parameters_of
from evoprune.search.config_policy import PolicySearcher
from evoprune.search.learners import LEARNERS


def learner_options(searcher: PolicySearcher) -> dict[str, Any]:
    """What is not as the learner has it by default: the number of samples, where it knows one, and what is given.

    Raises:
        UnknownName: no such learner.
    """
    known = parameters_of(LEARNERS[searcher.name])
    samples = {"samples": searcher.samples} if "samples" in known else {}
    return {**samples, **searcher.options}
