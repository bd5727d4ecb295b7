"""Metric search by births: filters, duplicates, racing and the hall of fame around a searcher."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from evoprune.metrics.canonical import canonicalise
from evoprune.metrics.expression import Expression, from_json
from evoprune.metrics.files import content_hash, derived_seed
from evoprune.metrics.filters import reject_reason
from evoprune.metrics.mask import MAX_TIED_ROWS
from evoprune.metrics.probe import Probe
from evoprune.metrics.products import is_power_product
from evoprune.metrics.records import MaskRule
from evoprune.metrics.signature import rank_signature
from evoprune.search.archive import Archive
from evoprune.search.candidate import Candidate
from evoprune.search.engine.executor import Job, Outcome
from evoprune.search.loop import Birth
from evoprune.search.racing import RacingRule
from evoprune.search.searchers import Proposal, Searcher
from evoprune.search.spaces.symbolic import MetricSpace

# What breeding may hand to the canonicaliser; the limits on canonical forms are those of the birth filters.
MAX_HEIGHT_BRED = 16
MAX_SIZE_BRED = 80

# A winner has to beat the best power product of these, whoever found it.
POWER_TERMINALS = frozenset({"W", "X_l2", "X_ss", "G_l2"})


class MetricSearch:
    """Births of metrics, simplified as the space does it, none of them ever evaluated twice.

    Args:
        space: what candidates are made of.
        searcher: decides who is born.
        archive: hall of fame; shared with the searcher.
        racing: decides how many tokens a candidate gets.
        probe: real weights and statistics for rank signatures.
        rule: the mask rule.
        seed: of the run.
        prepared: name of the prepared set that evaluations read.
        identity: hash of everything that an evaluation depends on beside its candidate.
        finalists: how many of the best at the top rung to remember.
        full_ladder: names of seeds that run every rung, because they stand in the result's table.
        dead: statistics that are zero along too many rows; expressions that read them are rejected.
        own: sparsity of each matrix by site name, if they have such; see `own_rule`.
    """

    def __init__(
        self,
        space: MetricSpace,
        searcher: Searcher,
        archive: Archive,
        racing: RacingRule,
        probe: Probe,
        rule: MaskRule,
        *,
        seed: int,
        prepared: str,
        identity: str,
        finalists: int = 1,
        full_ladder: frozenset[str] = frozenset(),
        dead: frozenset[str] = frozenset(),
        own: Mapping[str, float] | None = None,
    ) -> None:
        self.archive = archive
        self.racing = racing
        self.reasons: Counter[str] = Counter()
        self.origins: Counter[str] = Counter()
        self.evolved_parents = 0
        self.best: Candidate | None = None
        self.power: Candidate | None = None
        self.finalists: list[Candidate] = []
        self.seed_fitness: dict[str, float] = {}
        self._space = space
        self._searcher = searcher
        self._probe = probe
        self._rule = rule
        self._seed = seed
        self._prepared = prepared
        self._identity = identity
        self._n_finalists = finalists
        self._full_ladder = full_ladder
        self._dead = dead
        self._own = own or {}
        self._births = 0
        self._keys: dict[str, int] = {}
        self._signatures: dict[str, int] = {}
        self._rungs: dict[int, list[float]] = {}

    @property
    def births(self) -> int:
        """Births so far, with and without a forward pass."""
        return self._births

    @property
    def leader(self) -> tuple[float, str] | None:
        """Fitness and expression of the best so far."""
        return None if self.best is None else (self.best.value, self.best.expression.text)

    @property
    def distinct(self) -> int:
        """Different rank signatures among all births."""
        return len(self._signatures)

    def next_birth(self) -> Birth:
        number = self._births
        self._births += 1
        rng = random.Random(derived_seed(self._seed, "birth", number))
        proposal = self._searcher.propose(number, rng)
        record: dict[str, Any] = {"proposal": _proposal_json(proposal)}
        if proposal.expression.height > MAX_HEIGHT_BRED or proposal.expression.size > MAX_SIZE_BRED:
            return Birth(number, {**record, "reason": "LIMIT"}, None)
        expression = self._space.simplified(proposal.expression)
        record["expression"] = expression.to_json()
        given = proposal.origin.startswith("seed:")
        reason, same_as = self._reject(expression, number, record, given)
        if reason is not None:
            return Birth(number, {**record, "reason": reason, "same_as": same_as}, None)
        draws = [rng.random() for _ in range(self.racing.rungs - 1)]
        record["uniform"] = self.racing.is_uniform(draws)
        thresholds = self.racing.thresholds(draws)
        thresholds[: proposal.rung] = [None] * len(thresholds[: proposal.rung])
        if given and proposal.origin.removeprefix("seed:") in self._full_ladder:
            thresholds = [None] * len(thresholds)
        return Birth(number, record, self._job(expression, thresholds, None if given else MAX_TIED_ROWS))

    def _job(self, expression: Expression, thresholds: Sequence[float | None], max_tied: float | None) -> Job:
        payload = {
            "prepared": self._prepared,
            "criterion": {"expression": expression.to_json()},
            "thresholds": list(thresholds),
            "max_tied": max_tied,
        }
        # Not the prepared set's name: what it is made from is in the identity.
        key = content_hash([self._identity, payload["criterion"], payload["thresholds"]])
        return Job(key, "evaluate", payload)

    def apply(self, birth: Birth, outcome: Outcome | None) -> dict[str, Any]:
        record = birth.record
        proposal = _proposal_from(record["proposal"])
        line: dict[str, Any] = {
            "birth": birth.number,
            "origin": proposal.origin,
            "parents": list(proposal.parents),
            "island": proposal.island,
            "expression": None,
            "signature": record.get("signature"),
            "reason": record.get("reason"),
        }
        if "expression" in record:
            expression = from_json(record["expression"])
            line |= {"expression": expression.text, "complexity": expression.complexity}
        self.origins[proposal.origin.partition(":")[0]] += 1
        self.evolved_parents += proposal.evolved_parent
        if outcome is not None:
            line |= self._take_in(birth, proposal, outcome)
        else:
            line["same_as"] = record.get("same_as")
            self._searcher.tell(proposal, None, self._value(record.get("same_as"), proposal.rung))
        if line["reason"] is not None:
            self.reasons[line["reason"]] += 1
        return line

    def _take_in(self, birth: Birth, proposal: Proposal, outcome: Outcome) -> dict[str, Any]:
        """Tell racing, archive and searcher; what the history adds."""
        if outcome.status != "ok":
            self._searcher.tell(proposal, None, None)
            return {"reason": outcome.reason}
        rungs = tuple(outcome.values["rungs"])
        candidate = Candidate(
            birth=birth.number,
            expression=from_json(birth.record["expression"]),
            origin=proposal.origin,
            parents=proposal.parents,
            evolved=proposal.evolved,
            island=proposal.island,
            rungs=rungs,
            stderr=outcome.values["stderr"],
            signature=birth.record["signature"],
        )
        self._rungs[birth.number] = list(rungs)
        self.racing.observe(rungs, birth.record["uniform"])
        finished = len(rungs) == self.racing.rungs
        joined = finished and self.archive.add(candidate)
        if finished:
            self.finalists = sorted([*self.finalists, candidate], key=lambda member: (member.value, member.birth))
            del self.finalists[self._n_finalists :]
        canonical = canonicalise(candidate.expression, self._rule.group)
        if is_power_product(canonical, POWER_TERMINALS) and (
            self.power is None or candidate.fitness > self.power.fitness
        ):
            self.power = candidate
        if proposal.origin.startswith("seed:"):
            self.seed_fitness[proposal.origin.removeprefix("seed:")] = candidate.value
        if self.best is None or candidate.fitness > self.best.fitness:
            self.best = candidate
        self._searcher.tell(proposal, candidate, self._value(birth.number, proposal.rung))
        line: dict[str, Any] = {"rungs": list(rungs), "stderr": candidate.stderr, "front": joined}
        return line if finished else {**line, "reason": f"CUT_F{len(rungs) - 1}"}

    def _value(self, birth: int | None, rung: int) -> float | None:
        """Fitness of a birth at a rung, or at the top if the ladder is shorter; None if it did not get there."""
        rungs = self._rungs.get(birth, []) if birth is not None else []
        rung = min(rung, self.racing.rungs - 1)
        return rungs[rung] if rung < len(rungs) else None

    def _reject(
        self, expression: Expression, number: int, record: dict[str, Any], given: bool
    ) -> tuple[str | None, int | None]:
        """(reason, birth that is equivalent) of a candidate that needs no forward pass; notes key and signature."""
        key = self._space.key(expression)
        if key in self._keys:
            return "DUP_KEY", self._keys[key]
        self._keys[key] = number
        reason = (
            "STAT_DEAD"
            if expression.terminals & self._dead
            else reject_reason(expression, allowed_terminals=self._space.terminals, group=self._rule.group)
        )
        if reason is not None:
            return reason, None
        signature = rank_signature(expression, self._probe, self._rule, self._own)
        # A given metric runs even if half-precision weights tie in it, as magnitudes do.
        if signature.reason is not None and not (given and signature.reason == "TIES"):
            return signature.reason, None
        record["signature"] = signature.digest
        if signature.digest in self._signatures:
            return "DUP_SIG", self._signatures[signature.digest]
        self._signatures[signature.digest] = number
        return None, None

    def conclude(self) -> bool:
        return False

    def state(self) -> dict[str, Any]:
        return {
            "births": self._births,
            "keys": self._keys,
            "signatures": self._signatures,
            "rungs": {str(birth): rungs for birth, rungs in self._rungs.items()},
            "reasons": dict(self.reasons),
            "origins": dict(self.origins),
            "evolved_parents": self.evolved_parents,
            "best": None if self.best is None else self.best.to_json(),
            "power": None if self.power is None else self.power.to_json(),
            "finalists": [member.to_json() for member in self.finalists],
            "seed_fitness": self.seed_fitness,
            "archive": self.archive.state(),
            "racing": self.racing.state(),
            "searcher": self._searcher.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._births = state["births"]
        self._keys = state["keys"]
        self._signatures = state["signatures"]
        self._rungs = {int(birth): rungs for birth, rungs in state["rungs"].items()}
        self.reasons = Counter(state["reasons"])
        self.origins = Counter(state["origins"])
        self.evolved_parents = state["evolved_parents"]
        self.best = None if state["best"] is None else Candidate.from_json(state["best"])
        self.power = None if state["power"] is None else Candidate.from_json(state["power"])
        self.finalists = [Candidate.from_json(member) for member in state["finalists"]]
        self.seed_fitness = state["seed_fitness"]
        self.archive.restore(state["archive"])
        self.racing.restore(state["racing"])
        self._searcher.restore(state["searcher"])


def _proposal_json(proposal: Proposal) -> dict[str, Any]:
    return {
        "expression": proposal.expression.to_json(),
        "origin": proposal.origin,
        "parents": list(proposal.parents),
        "evolved": proposal.evolved,
        "evolved_parent": proposal.evolved_parent,
        "island": proposal.island,
        "token": None if proposal.token is None else list(proposal.token),
        "rung": proposal.rung,
    }


def _proposal_from(values: Mapping[str, Any]) -> Proposal:
    token = values["token"]
    return Proposal(
        from_json(values["expression"]),
        values["origin"],
        tuple(values["parents"]),
        values["evolved"],
        values["evolved_parent"],
        values["island"],
        None if token is None else (token[0], token[1]),
        values["rung"],
    )
