"""Where a candidate comes from."""

from __future__ import annotations

from collections.abc import Mapping

from evoprune.search.report.data import Entry


def ancestors(entry: Entry, known: Mapping[int, Entry]) -> list[Entry]:
    """`entry` and all that it descends from, oldest first.

    Args:
        known: candidates by birth; parents that are not in it are passed over.
    """
    found: dict[int, Entry] = {}
    waiting = [entry]
    while waiting:
        current = waiting.pop()
        if current.birth not in found:
            found[current.birth] = current
            waiting += [known[birth] for birth in current.parents if birth in known]
    return [found[birth] for birth in sorted(found)]


def main_line(entry: Entry, known: Mapping[int, Entry]) -> list[Entry]:
    """`entry`, its better parent (at the first rung, which all ran), that one's better parent, ...; oldest first."""
    line = [entry]
    while parents := [known[birth] for birth in line[-1].parents if birth in known]:
        line.append(min(parents, key=lambda parent: (parent.rungs[0], parent.birth)))
    return line[::-1]
