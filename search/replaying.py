"""Winners block by block: each block compressed, or its outputs refitted, behind what became of those before it.

A search compresses every matrix by statistics of the dense model, since a candidate must not depend on the one before.
The same choice made block by block adds up fewer errors, and that is what `prune --accumulation path` writes. Source:
specification, pruners.md 0.3, which wants both figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from evoprune.metrics.allocation import Allocation
from evoprune.metrics.allocation_file import to_json
from evoprune.metrics.files import content_hash
from evoprune.metrics.records import MaskRule
from evoprune.search.engine.executor import Job, Outcome
from evoprune.search.removal import PLAIN
from evoprune.search.result import paired_difference, summary

REPLAYED = "winner, replayed"
"""What it is called in tables."""
OPTION = " --accumulation path"
"""Of a command line that prunes in this way."""
PHASE = "replaying the winner"
NOTE = (
    "All are compressed by statistics of the dense model but for the winner replayed, whose blocks are each compressed "
    "behind the compressed blocks before it."
)
"""What has to be known of a table with both."""

REFITTED = "winner, path refit"
"""The shape that a structure search found, each of whose outputs is solved for behind the cut blocks before it."""
REFIT_OPTION = " --refit path-refit"
"""Of a command line that cuts a model in this way."""
REFIT_NOTE = (
    "With a path refit every output is solved for once more, on what the cut blocks before it hand on, towards the "
    "hidden states of the dense model."
)
"""What has to be known of a table with both of a shape."""


@runtime_checkable
class Replayable(Protocol):
    """A comparison whose winner can be replayed; it has these beside what `Comparison` has."""

    def replay(self) -> Job | None:
        """What measures the winner in replay on held-out text; None where nothing is compressed, or not by blocks."""
        ...

    def replayed(self, outcome: Outcome) -> dict[str, Any]:
        """What ``best`` of the result says of it, given the outcome; asked after `result`."""
        ...


def replay_job(
    identity: str,
    prepared: str,
    criterion: Mapping[str, Any],
    compressor: str,
    rule: MaskRule,
    allocation: Allocation | None,
) -> Job | None:
    """See `Replayable.replay`.

    Args:
        identity: hash of everything that a measurement depends on beside what is measured.
        prepared: name of the prepared set.
        criterion: as jobs spell it.
        compressor: with its parameters.
        rule: that of the search.
        allocation: what each matrix loses, if they do not all lose the same.
    """
    if compressor == PLAIN or (rule.group == "global" and rule.pattern is None):
        return None
    asked = {
        "criterion": dict(criterion),
        "compressor": compressor,
        "allocation": None if allocation is None else to_json(allocation),
    }
    return Job(content_hash([identity, "replayed", asked]), "replayed", {"prepared": prepared, **asked})


def replayed_facts(outcome: Outcome, winner: Mapping[str, Any]) -> dict[str, Any]:
    """See `Replayable.replayed`: nothing but None where it could not be measured.

    Args:
        winner: losses of the winner as it was searched, on the same text.
    """
    if outcome.status != "ok":
        return {"replayed": None}
    return {
        "replayed": summary(outcome.values),
        "winner_minus_replayed": paired_difference(winner, outcome.values),
    }
