"""What can go wrong, and which exit code it gives. The command line prints the message as one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EvopruneError(Exception):
    """Base of every error that evoprune raises on purpose."""

    exit_code = 1


class InvalidInput(EvopruneError):
    """The user's input is wrong: the message says what was wrong and what would be right."""

    exit_code = 2


class InvalidExpression(InvalidInput):
    """A metric cannot be read: unknown name, wrong type, too long, too deep."""


class UnknownName(InvalidInput):
    """A name is not registered; the message offers the closest ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
        super().__init__(f"no {kind} {name[:80]!r}; {hint}")


class InvalidCandidate(EvopruneError):
    """A candidate that must not become a mask; `reason` is a code of the closed list in `evoprune.metrics.reasons`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class WorkersFailed(EvopruneError):
    """Workers cannot start."""

    exit_code = 3


class AuditFailed(EvopruneError):
    """A repeated evaluation gave another result."""

    exit_code = 4


class NoCapacity(EvopruneError):
    """Nothing can run at present; what was computed is saved and the run can be resumed."""

    exit_code = 75


class Interrupted(EvopruneError):
    """SIGINT or SIGTERM; state is saved."""

    exit_code = 130
