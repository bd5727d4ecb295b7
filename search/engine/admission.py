"""Who may work on a run: a worker with the driver's code, whose numbers are those of the run's first worker."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, Literal

from evoprune.search.identity import code_hash

Numerics = Literal["strict", "relaxed"]

RELAXED_TOLERANCE = 0.02
"""How far a canary's loss may be off, relative to the run's, before a worker is broken rather than different."""


class Admission:
    """Holds the workers of a run to one numerics class.

    Args:
        policy: `strict` refuses a worker whose class or canary differs in any bit; `relaxed` takes it if its canary is
            close, and then the run is not bit-reproducible.
        expected: what the first worker of an earlier session reported; None takes what the first one to come reports.
        mixed: whether an earlier session took workers that differ.
        one_device: refuse a worker on another kind of device or processor than the first, whatever the policy: the run
            has times in it, and those of another kind would say nothing beside them.
    """

    def __init__(
        self,
        policy: Numerics = "strict",
        expected: Mapping[str, Any] | None = None,
        mixed: bool = False,
        one_device: bool = False,
    ) -> None:
        self._one_device = one_device
        self.mixed = mixed
        self._code = code_hash()  # now: the files may be edited while the search runs
        self._policy = policy
        self._expected = expected
        self._lock = threading.Lock()

    @property
    def expected(self) -> Mapping[str, Any] | None:
        """What the run's first worker reported, or None while there was none."""
        return self._expected

    def refusal(self, code: str | None, numerics: Mapping[str, Any] | None) -> str | None:
        """Why a worker cannot take part, or None if it can.

        Args:
            code: the hash of its code; None where it is this process's own.
            numerics: what it reports of itself; None admits it, for it has nothing that could differ.
        """
        if code is not None and code != self._code:
            return (
                f"its evoprune (code {code[:12]}) is not this process's (code {self._code[:12]}): "
                "remove or update the one that is installed there"
            )
        if numerics is None:
            return None
        with self._lock:
            if self._expected is None:
                self._expected = dict(numerics)
            if self._one_device and (reason := _other_device(self._expected, numerics)) is not None:
                return reason
            difference = _difference(self._expected, numerics)
            if difference is None:
                return None
            if self._policy == "strict":
                return f"its numbers differ from the run's: {difference}; `--set numerics=relaxed` would take it"
            ours, theirs = self._expected["loss"], numerics["loss"]
            if not abs(theirs - ours) <= RELAXED_TOLERANCE * abs(ours):
                return f"its canary's loss is {theirs:g}, the run's is {ours:g}: that is no rounding"
            self.mixed = True
            return None


def _other_device(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """Why times of a worker cannot stand beside those of the first, or None if they can."""
    kinds = [(report["class"].get("device"), report.get("processor")) for report in (ours, theirs)]
    if kinds[0] == kinds[1]:
        return None
    first, other = (" with ".join(filter(None, kind)) for kind in kinds)
    return f"it runs on {other}, and this search measures times on {first}: give it workers of one kind of device"


def _difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """The first difference between two reports, for people."""
    for name in sorted({*ours["class"], *theirs["class"]}):
        mine, other = ours["class"].get(name), theirs["class"].get(name)
        if mine != other:
            return f"{name} is {other!r}, not {mine!r}"
    if ours["bits"] != theirs["bits"]:
        return f"same class, but its canary gives {theirs['bits']}, not {ours['bits']}"
    return None
