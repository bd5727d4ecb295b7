"""Depth profiles of a few numbers, proposed by Optuna's samplers.

With z the depth from -1 to 1, every kind of part (attention, MLP) gets the sparsity

    s(z) = S + a0 + a1 z + a2 (2 z^2 - 1) + a3 [first block] + a4 [last block],

which is then repaired to the budget; where parts only go as a whole, it ranks them. Ten numbers are few enough for
Bayesian optimisation, which does much with little data.
Source: layerwise sparsity allocation, section 5.5.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler
from optuna.trial import Trial, TrialState

from evoprune.metrics.allocation import repair
from evoprune.metrics.files import content_hash, derived_seed
from evoprune.search.breeders import BREEDERS, BreederPlugin, Plain
from evoprune.search.spaces.ladder import Genome
from evoprune.search.spaces.levels import LevelSpace, part_of

_RANGES = {"offset": 0.3, "slope": 0.3, "curve": 0.2, "first": 0.6, "last": 0.6}
"""Largest size of each number, in fractions of weights."""


class Profiles(Plain):
    """Depth profiles, proposed by one of Optuna's samplers from all that was measured.

    A state is the list of what was asked and told. To restore it is to ask and tell again, which gives the same
    proposals, for the sampler is seeded and asked by nobody else.

    Args:
        space: repairs and rounds what a profile asks for.
        seed: of the run.
        sampler: makes a sampler from a seed.
    """

    origin = "profile"
    redraw = False

    def __init__(self, space: LevelSpace, seed: int, sampler: Callable[[int], BaseSampler]) -> None:
        self._space = space
        self._seed = seed
        self._target = space.budget / sum(site.weights for site in space.sites)
        self._parts = sorted({part_of(site) for site in space.sites})
        self._distributions: dict[str, BaseDistribution] = {
            f"{part} {name}": FloatDistribution(-size, size) for part in self._parts for name, size in _RANGES.items()
        }
        self._log: list[Any] = []
        self._values: dict[Genome, float | None] = {}
        self._open: dict[Genome, list[Trial]] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study = optuna.create_study(sampler=sampler(derived_seed(seed, "profiles", 0) % (1 << 32)))

    def children(self, parent: Genome, count: int, rng: random.Random) -> Sequence[Genome]:
        self._log.append(count)
        return [genome for genome in self._ask(count) if genome != parent]

    def _ask(self, count: int) -> list[Genome]:
        asked: dict[Genome, None] = {}
        with _quiet():
            for _ in range(count):
                trial = self._study.ask(self._distributions)
                genome = self._genome(trial.params)
                if genome in self._values:
                    self._answer(trial, self._values[genome])
                else:
                    self._open.setdefault(genome, []).append(trial)
                    asked[genome] = None
        return list(asked)

    def tell(self, genome: Genome, kl: float | None) -> None:
        self._log.append([list(genome), kl])
        self._values[genome] = kl
        with _quiet():
            for trial in self._open.pop(genome, []):
                self._answer(trial, kl)

    def _answer(self, trial: Trial, kl: float | None) -> None:
        if kl is None:
            self._study.tell(trial, state=TrialState.FAIL)
        else:
            self._study.tell(trial, kl)

    def state(self) -> Any:
        return self._log

    def restore(self, state: Any) -> None:
        for entry in state:
            if isinstance(entry, int):
                self._log.append(entry)
                self._ask(entry)
            else:
                self.tell(tuple(entry[0]), entry[1])

    def _genome(self, numbers: Mapping[str, float]) -> Genome:
        requested = []
        for site in self._space.sites:
            a = {name: numbers[f"{part_of(site)} {name}"] for name in _RANGES}
            z = 2 * site.depth - 1
            requested.append(
                self._target
                + a["offset"]
                + a["slope"] * z
                + a["curve"] * (2 * z * z - 1)
                + a["first"] * (site.block == 0)
                + a["last"] * (site.block == site.n_blocks - 1)
            )
        if not self._space.only:
            requested = [*repair(requested, self._space.sites, self._target)]
        return self._space.near(requested, random.Random(derived_seed(self._seed, content_hash(dict(numbers)), 0)))


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, Optuna says nothing of its own."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _tpe(seed: int) -> BaseSampler:
    return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)


def _cmaes(seed: int) -> BaseSampler:
    return optuna.samplers.CmaEsSampler(seed=seed)


def _gp(seed: int) -> BaseSampler:
    return optuna.samplers.GPSampler(seed=seed, deterministic_objective=False)


BREEDERS.add("tpe", BreederPlugin("depth profiles, by Optuna's Parzen estimator", partial(Profiles, sampler=_tpe)))
BREEDERS.add("cmaes", BreederPlugin("depth profiles, by CMA-ES", partial(Profiles, sampler=_cmaes), ("cmaes",)))
BREEDERS.add("gp", BreederPlugin("depth profiles, by a Gaussian process", partial(Profiles, sampler=_gp), ("scipy",)))
