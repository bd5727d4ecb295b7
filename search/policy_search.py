"""Search by a policy: masks of one step are drawn from it, measured on the same text, and move it.

A step is a barrier, so the history depends neither on the number of workers nor on who finishes first. Its minibatch is
drawn anew, the same for all of its masks: what differs between them is what they remove. Equal masks of a step are
measured once. Every so many steps the mode of the policy, the mask that it would give now, is measured on further text;
the best of these and the first of them, the initialisation, are then compared on all text B.
Source: Gao et al. 2025 (arXiv:2406.10576), section 3; mask policies, sections 12 and 13.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from evoprune.metrics.errors import EvopruneError, InvalidInput
from evoprune.metrics.files import content_hash, derived_seed
from evoprune.metrics.packed import packed, unpacked
from evoprune.search.engine.executor import Job, Outcome
from evoprune.search.learners import Answer, Learner, Trial
from evoprune.search.loop import Birth
from evoprune.search.mask_words import mask_words
from evoprune.search.result import standard_error, window_mean

INITIALISATION = "initialisation"
"""What the mode of the policy is called before it has moved."""
FINALISTS = 5
MOST_UNITS = 4096
"""Up to so many units the history tells masks and probabilities; of more they would fill the disk."""
SNAPSHOTS = 40
"""How often the history tells all probabilities, at most."""
DIVERGED = 3
"""Steps at the beginning none of whose masks has a finite loss, after which nothing is to be hoped for."""


@dataclass(frozen=True)
class Texts:
    """Windows of text B: the first are for minibatches, those after them for modes of the policy.

    Attributes:
        windows: for minibatches.
        batch: of one step.
        validation: for modes.
    """

    windows: int
    batch: int
    validation: int

    def minibatch(self, seed: int, step: int) -> list[int]:
        """The windows of a step, ascending: each goes around all of them before it takes one again."""
        lap, at = divmod(step, self.windows // self.batch)
        order = np.random.Generator(np.random.Philox(key=derived_seed(seed, "minibatches", lap))).permutation(
            self.windows
        )
        return sorted(order[at * self.batch : (at + 1) * self.batch].tolist())

    @property
    def held(self) -> list[int]:
        """Those for modes."""
        return list(range(self.windows, self.windows + self.validation))

    @property
    def all(self) -> list[int]:
        """All of them."""
        return list(range(self.windows + self.validation))


@dataclass(frozen=True)
class Mode:
    """A mask that the policy would give at some step.

    Attributes:
        kept: the mask, as `packed` has it.
        step: before which the policy would give it.
        birth: that measured it last; None before.
        fitness: its loss on all text B, or on that for modes before the finals; None where it has none.
        stderr: of it, over windows.
    """

    kept: str
    step: int
    birth: int | None = None
    fitness: float | None = None
    stderr: float = 0.0


@dataclass(frozen=True)
class _Measurement:
    """Something of the present round.

    Attributes:
        role: ``sample`` or ``reference`` of a step; ``mode`` elsewhere.
        kept: the mask, packed.
        values: relaxed masks, of which a gradient is asked for; None of others.
        trials: which of the step's trials this answers.
    """

    role: str
    kept: str
    values: tuple[float, ...] | None = None
    trials: tuple[int, ...] = ()


class PolicySearch:
    """Births of masks, step by step.

    Args:
        learner: has the policy and moves it.
        groups: [n] what the history sums probabilities over.
        texts: what masks are measured on.
        objective: ``kl``, ``ce`` or ``ce-residual``.
        dense: cross entropy of the dense model by window of text B, for ``ce-residual``.
        validate_every: steps between two measurements of the mode.
        steps: as many as the budget is planned for; for the snapshots.
        seed: of the run.
        evaluations: masks to measure in all, those of modes included; None for no limit.
        identity: hash of everything that an evaluation depends on beside mask and windows.
        payload: what every job says beside these.
        fixed: the budget leaves one mask, so that there is nothing to learn.
        starts: further masks to begin with, by name: they compete with the modes of the policy.
        learner_from: the learner that starts from one of these; where it is given, the best of them is what is learned
            from.

    Attributes:
        best: the best mode so far.
        initialisation: the first one.
        starts: those further masks.
        step: the present one.
        reasons: how many births ended without a loss, by reason code.
    """

    def __init__(
        self,
        learner: Learner,
        *,
        groups: np.ndarray,
        texts: Texts,
        objective: str,
        dense: Sequence[float] | None,
        validate_every: int,
        steps: int,
        seed: int,
        evaluations: int | None,
        identity: str,
        payload: Mapping[str, Any],
        fixed: bool = False,
        starts: Mapping[str, np.ndarray] | None = None,
        learner_from: Callable[[np.ndarray], Learner] | None = None,
    ) -> None:
        self.learner = learner
        self._learner_from = learner_from
        self._anew: str | None = None
        self.n = len(groups)
        self.payload = dict(payload)
        self.best: Mode | None = None
        self.initialisation = Mode(packed(learner.mode()), 0)
        self.starts = {name: Mode(packed(mask), 0) for name, mask in (starts or {}).items()}
        self.step = 0
        self.reasons: Counter[str] = Counter()
        self.finals: list[Mode] = []
        self._groups = groups
        self._sizes = np.bincount(groups)
        self._texts = texts
        self._objective = objective
        self._dense = dense
        self._validate_every = validate_every
        self._snapshot_every = max(1, -(-steps // SNAPSHOTS))
        self._seed = seed
        self._evaluations = evaluations
        self._fixed = fixed
        self._identity = identity
        self._births = 0
        self._counted = 0
        self._stage: str = INITIALISATION
        self._modes: list[Mode] = []
        self._round: list[_Measurement] = []
        self._answers: list[dict[str, Any] | None] = []
        self._waiting: deque[int] = deque()
        self._concluded = False
        self._lost_steps = 0
        self._step_size = len(learner.ask(0))
        first = dict.fromkeys(mode.kept for mode in (self.initialisation, *self.starts.values()))
        self._enter([_Measurement("mode", kept) for kept in first])

    @property
    def births(self) -> int:
        """Births so far."""
        return self._births

    @property
    def leader(self) -> tuple[float, str] | None:
        """Fitness of the best mode so far, and what it keeps."""
        if self.best is None or self.best.fitness is None:
            return None
        return self.best.fitness, mask_words(unpacked(self.best.kept, self.n), self.payload.get("masker", {}))

    @property
    def stage(self) -> str:
        """What is measured now: ``initialisation``, ``step``, ``validation`` or ``final``."""
        return self._stage

    def next_birth(self) -> Birth | None:
        if not self._waiting:
            return None
        at = self._waiting.popleft()
        asked, windows = self._round[at], self._windows()
        number = self._births
        self._births += 1
        self._counted += 1
        record = {"at": at, "stage": self._stage, "step": self.step}
        payload = {**self.payload, "windows": windows}
        if asked.values is not None:
            payload["values"] = list(asked.values)
            key = content_hash([self._identity, "gradient", payload["values"], windows, self._objective])
            # A constant by window has no gradient.
            objective = "kl" if self._objective == "kl" else "nll"
            return Birth(number, record, Job(key, "gradient", {**payload, "objective": objective}))
        payload["kept"] = asked.kept
        return Birth(number, record, Job(content_hash([self._identity, "mask", asked.kept, windows]), "mask", payload))

    def apply(self, birth: Birth, outcome: Outcome | None) -> dict[str, Any]:
        assert outcome is not None
        asked = self._round[birth.record["at"]]
        line: dict[str, Any] = {
            "birth": birth.number,
            "stage": self._stage,
            "step": self.step,
            "role": asked.role,
            "mask": content_hash(asked.kept)[:16],
            **({"kept": asked.kept} if self.n <= MOST_UNITS else {}),
            "counted": True,
            "loss": None,
            "reason": outcome.reason,
        }
        found: dict[str, Any] | None = None
        if outcome.status == "ok":
            losses = self._losses(outcome.values)
            found = {"birth": birth.number, "windows": losses, "gradient": outcome.values.get("gradient")}
            line |= {
                "loss": math.fsum(losses) / len(losses),
                "stderr": standard_error(losses),
                "kl": window_mean(outcome.values["kl"]),
                "nll": window_mean(outcome.values["nll"]),
            }
        elif outcome.reason is not None:
            self.reasons[outcome.reason] += 1
        self._answers[birth.record["at"]] = found or {"birth": birth.number, "windows": None, "gradient": None}
        if all(answer is not None for answer in self._answers):
            line |= self._advance()
        return line

    def conclude(self) -> bool:
        """See `BirthSearch`: what was begun is finished, the last mode measured, and the finals held."""
        self._concluded = True
        return bool(self._waiting) or self._stage != "over"

    def _windows(self) -> list[int]:
        """The windows of text B that the present round is measured on."""
        if self._stage == "step":
            return self._texts.minibatch(self._seed, self.step)
        return self._texts.all if self._stage == "final" else self._texts.held

    def _losses(self, values: Mapping[str, Any]) -> list[float]:
        """The objective by window, from what a job returned."""
        if self._objective == "kl":
            return list(values["kl"])
        if self._objective == "ce":
            return list(values["nll"])
        assert self._dense is not None
        return [nll - self._dense[window] for nll, window in zip(values["nll"], self._windows(), strict=True)]

    def _advance(self) -> dict[str, Any]:
        """All of the round are measured: learn from it, and begin the next; what the history adds."""
        answers = [answer for answer in self._answers if answer is not None]
        if self._stage == "step":
            note = self._learn(answers)
            self.step += 1
            due = self.step % self._validate_every == 0
            if due or self._spent():
                self._validate()
            else:
                self._next_step()
            return {"policy": note}
        if self._stage == "final":
            measured = [self._measured(mode, answer) for mode, answer in zip(self.finals, answers, strict=True)]
            for mode in measured:
                self._note_first(mode)
            ranked = sorted((mode for mode in measured if mode.fitness is not None), key=_rank)
            self.finals = ranked
            self.best = ranked[0] if ranked else None
            self._stage = "over"
            self._enter([])
            return {}
        for asked, answer in zip(self._round, answers, strict=True):
            mode = self._measured(Mode(asked.kept, self.step), answer)
            self._note_first(mode)
            if mode.fitness is not None:
                self._modes.append(mode)
        if self._modes:
            self.best = min(self._modes, key=_rank)
        if self._stage == INITIALISATION and self.best is not None and self.best.kept != self.initialisation.kept:
            self._start_anew(self.best.kept)
        note = {"policy": self._probabilities(True)} if self._stage == INITIALISATION else {}
        if self._spent():
            self._finish()
        else:
            self._next_step()
        return note

    def _start_anew(self, kept: str) -> None:
        """Learn from this mask on, which one of `starts` is."""
        if self._learner_from is not None:
            self.learner = self._learner_from(unpacked(kept, self.n))
            self._anew = kept

    def _learn(self, answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Move the policy; what the history says of it afterwards."""
        by_trial: dict[int, Answer] = {}
        for asked, answer in zip(self._round, answers, strict=True):
            windows, gradient = answer["windows"], answer["gradient"]
            loss = None if windows is None else math.fsum(windows) / len(windows)
            given = Answer(loss, None if gradient is None else np.asarray(gradient), windows)
            by_trial |= dict.fromkeys(asked.trials, given)
        self._lost_steps = 0 if any(answer["windows"] is not None for answer in answers) else self._lost_steps + 1
        if self._lost_steps == DIVERGED == self.step + 1:
            if not self.reasons["NONFINITE"]:
                raise EvopruneError(f"no mask of the first steps could be measured: {', '.join(self.reasons)}")
            raise InvalidInput(
                "no mask of the first steps has a finite loss: so much ruins the model; give a lower --sparsity, or "
                "another --dtype"
            )
        note: dict[str, Any] = dict(self.learner.tell(self.step, [by_trial[trial] for trial in sorted(by_trial)]))
        return note | self._probabilities((self.step + 1) % self._snapshot_every == 0 or self._spent())

    def _probabilities(self, of_units: bool) -> dict[str, Any]:
        """How probable it is that units are kept, as the history has it: means of groups, and each where asked for."""
        probabilities = self.learner.probabilities()
        sums = np.bincount(self._groups, weights=probabilities, minlength=len(self._sizes))
        note = {"groups": [round(value, 6) for value in (sums / self._sizes).tolist()]}
        if of_units and self.n <= MOST_UNITS:
            note["units"] = [round(value, 4) for value in probabilities.tolist()]
        return note

    def _measured(self, mode: Mode, answer: Mapping[str, Any]) -> Mode:
        windows = answer["windows"]
        if windows is None:
            return replace(mode, birth=answer["birth"], fitness=None)
        fitness = math.fsum(windows) / len(windows)
        return replace(mode, birth=answer["birth"], fitness=fitness, stderr=standard_error(windows))

    def _note_first(self, mode: Mode) -> None:
        """Keep what was measured of the initialisation and of the masks that stood beside it."""
        if mode.kept == self.initialisation.kept:
            self.initialisation = replace(mode, step=0)
        self.starts |= {name: replace(mode, step=0) for name, known in self.starts.items() if known.kept == mode.kept}

    def _next_step(self) -> None:
        """The masks that the policy draws now, each once."""
        trials = self.learner.ask(self.step)
        self._step_size = len(trials)
        asked: dict[tuple[str, tuple[float, ...] | None], _Measurement] = {}
        for index, trial in enumerate(trials):
            kept, values = packed(trial.mask), _plain(trial)
            known = asked.get((kept, values), _Measurement(trial.role, kept, values))
            asked[kept, values] = replace(known, trials=(*known.trials, index))
        self._stage = "step"
        self._enter([*asked.values()])

    def _validate(self) -> None:
        """Measure the mode, unless that was done before."""
        kept = packed(self.learner.mode())
        known = next((mode for mode in self._modes if mode.kept == kept), None)
        if known is None:
            self._stage = "validation"
            self._enter([_Measurement("mode", kept)])
        elif self._spent():
            self._finish()
        else:
            self._next_step()

    def _finish(self) -> None:
        """Compare the best modes and the initialisation, which comes last, on all text B."""
        first = self.initialisation
        others = sorted((mode for mode in self._modes if mode.kept != first.kept), key=_rank)
        self.finals = [*others[: FINALISTS - 1], first]
        self._stage = "final"
        self._enter([_Measurement("mode", mode.kept) for mode in self.finals])

    def _spent(self) -> bool:
        """Whether another step, the measurement of its mode and the finals would be too much."""
        if self._concluded or self._fixed:
            return True
        if self._evaluations is None:
            return False
        finals = min(FINALISTS, len(self._modes) + 2)
        return self._counted + self._step_size + 1 + finals > self._evaluations

    def _enter(self, asked: Sequence[_Measurement]) -> None:
        self._round = list(asked)
        self._answers = [None] * len(self._round)
        self._waiting = deque(range(len(self._round)))

    def state(self) -> dict[str, Any]:
        return {
            "learner": self.learner.state(),
            "anew": self._anew,
            "step": self.step,
            "stage": self._stage,
            "best": None if self.best is None else asdict(self.best),
            "initialisation": asdict(self.initialisation),
            "starts": {name: asdict(mode) for name, mode in self.starts.items()},
            "finals": [asdict(mode) for mode in self.finals],
            "modes": [asdict(mode) for mode in self._modes],
            "round": [
                {**asdict(asked), "values": None if asked.values is None else list(asked.values)}
                for asked in self._round
            ],
            "answers": self._answers,
            "waiting": list(self._waiting),
            "births": self._births,
            "counted": self._counted,
            "concluded": self._concluded,
            "lost_steps": self._lost_steps,
            "step_size": self._step_size,
            "reasons": dict(self.reasons),
        }

    def restore(self, state: dict[str, Any]) -> None:
        if state["anew"] is not None:
            self._start_anew(state["anew"])
        self.learner.restore(state["learner"])
        self.step = state["step"]
        self._stage = state["stage"]
        self.best = None if state["best"] is None else Mode(**state["best"])
        self.initialisation = Mode(**state["initialisation"])
        self.starts = {name: Mode(**mode) for name, mode in state["starts"].items()}
        self.finals = [Mode(**mode) for mode in state["finals"]]
        self._modes = [Mode(**mode) for mode in state["modes"]]
        self._round = [
            _Measurement(
                asked["role"],
                asked["kept"],
                None if asked["values"] is None else tuple(asked["values"]),
                tuple(asked["trials"]),
            )
            for asked in state["round"]
        ]
        self._answers = list(state["answers"])
        self._waiting = deque(state["waiting"])
        self._births = state["births"]
        self._counted = state["counted"]
        self._concluded = state["concluded"]
        self._lost_steps = state["lost_steps"]
        self._step_size = state["step_size"]
        self.reasons = Counter(state["reasons"])


def _rank(mode: Mode) -> tuple[float, int, str]:
    """The better first; of equals the earlier."""
    return math.inf if mode.fitness is None else mode.fitness, mode.step, mode.kept


def _plain(trial: Trial) -> tuple[float, ...] | None:
    return None if trial.values is None else tuple(trial.values.tolist())
