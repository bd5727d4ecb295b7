"""The surrogate against least squares written out, and against a search without it."""

from __future__ import annotations

import random
import statistics
from pathlib import Path

import numpy as np
import pytest

from evoprune.search.spaces.ladder import Gene, Genome
from evoprune.search.surrogate import FEWEST_ROWS, KNOTS, MOST_ROWS, Surrogate
from tests.search.test_generation_search import SENSITIVITY, Session
from tests.search.test_ladder import Plain

SPACE = Plain([Gene(f"gene {at}", tuple(range(0, 65 * (at + 1), at + 1))) for at in range(4)], 300)
HEIGHTS = np.random.default_rng(3).normal(size=(4, len(KNOTS)))


def piecewise(genome: Genome) -> float:
    """A sum over genes of functions that are linear between the knots."""
    return sum(float(np.interp(option / 64, KNOTS, heights)) for option, heights in zip(genome, HEIGHTS, strict=True))


def drawn(rng: random.Random) -> Genome:
    return tuple(rng.randrange(65) for _ in range(4))


def told(count: int, noise: float = 0.0) -> tuple[Surrogate, list[tuple[int, Genome, float]]]:
    rng = random.Random(1)
    rows = []
    for at in range(count):
        generation, genome = at // 16, drawn(rng)
        # What a generation's windows of text are worth is that of all its children.
        rows.append((generation, genome, piecewise(genome) + 10.0 * generation + rng.gauss(0, noise)))
    surrogate = Surrogate(SPACE)
    for row in rows:
        surrogate.tell(*row)
    return surrogate, rows


def test_it_orders_genomes_that_it_has_not_seen() -> None:
    surrogate, _ = told(160)
    rng = random.Random(2)
    others = [drawn(rng) for _ in range(50)]
    ranked = sorted(others, key=piecewise)
    # The penalty bends what is exact a little, so neighbours may change places.
    found = surrogate.best(others, 50)
    assert max(abs(ranked.index(genome) - at) for at, genome in enumerate(found)) <= 2
    assert surrogate.best(others, 5) == found[:5]
    assert surrogate.best([], 5) == []


def test_its_weights_are_those_of_ridge_regression_by_least_error_left_out() -> None:
    surrogate, rows = told(96, noise=0.5)
    features = np.array(
        [
            [max(0.0, 1 - 4 * abs(option / 64 - knot)) for option in genome for knot in KNOTS]
            for _, genome, _ in rows
        ]
    )  # fmt: skip
    kl = np.array([kl for _, _, kl in rows])
    for first in range(0, 96, 16):
        features[first : first + 16] -= features[first : first + 16].mean(axis=0)
        kl[first : first + 16] -= kl[first : first + 16].mean()
    errors, weights = [], []
    for penalty in np.logspace(-3, 3, 13):
        gram = features.T @ features + penalty * np.eye(features.shape[1])
        hat = features @ np.linalg.solve(gram, features.T)
        errors.append(np.sum((kl - hat @ kl) ** 2) / np.trace(np.eye(96) - hat) ** 2)
        weights.append(np.linalg.solve(gram, features.T @ kl))
    np.testing.assert_allclose(surrogate._weights(), weights[int(np.argmin(errors))], rtol=1e-6, atol=1e-9)


def test_it_waits_for_enough_and_forgets_the_oldest() -> None:
    surrogate, _ = told(FEWEST_ROWS - 1)
    assert not surrogate.ready
    surrogate.tell(3, (0, 0, 0, 0), None)
    assert not surrogate.ready
    surrogate.tell(3, (0, 0, 0, 0), 1.0)
    assert surrogate.ready
    for _ in range(MOST_ROWS):
        surrogate.tell(4, (1, 1, 1, 1), 2.0)
    assert len(surrogate.state()) == MOST_ROWS
    assert surrogate.state()[0][0] == 4
    restored = Surrogate(SPACE)
    restored.restore(surrogate.state())
    assert restored.state() == surrogate.state()


@pytest.mark.slow
def test_a_search_with_it_finds_more(tmp_path: Path) -> None:
    """What matrices cost is a sum over them here, as the surrogate supposes."""

    def cost(session: Session) -> float:
        best = session.search.best
        assert best is not None
        levels = session.space.levels(best.genome)
        return sum(weight * (level / 256) ** 2 for weight, level in zip(SENSITIVITY, levels, strict=True))

    gains = []
    for seed in range(5):
        costs = []
        for surrogate in (False, True):
            session = Session(tmp_path / f"{seed}-{surrogate}", seed=seed, evaluations=200, surrogate=surrogate)
            session.go()
            costs.append(cost(session))
        gains.append(costs[0] - costs[1])
    assert statistics.mean(gains) > 0
    assert sum(gain > 0 for gain in gains) >= 4


@pytest.mark.parametrize("count", [4, 9, 32])
def test_a_quarter_is_drawn_without_asking_it(tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there are hardly more proposals than children."""
    session = Session(tmp_path / "run", evaluations=100, surrogate=True)
    session.go()
    search = session.search
    assert search._surrogate is not None and search._surrogate.ready
    for most in (3, count, 4 * count):
        drawn = search._proposals(most, random.Random(3))[:most]
        asked: list[int] = []

        def best(genomes: list[Genome], chosen: int, asked: list[int] = asked) -> list[Genome]:
            asked.append(len(genomes[:chosen]))
            return genomes[:chosen]

        monkeypatch.setattr(search, "_proposals", lambda wanted, rng, drawn=drawn: drawn)
        monkeypatch.setattr(search._surrogate, "best", best)
        made = search._children(count)
        monkeypatch.undo()
        assert len(made) == min(count, len(drawn)) == len({member.genome for member in made})
        assert len(made) - asked[0] >= len(made) / 4


@pytest.mark.parametrize("stop", [70, 150])
def test_a_search_with_it_continues_as_if_never_stopped(tmp_path: Path, stop: int) -> None:
    from evoprune.metrics.errors import Interrupted

    whole = Session(tmp_path / "whole", evaluations=160, surrogate=True)
    whole.go()
    with pytest.raises(Interrupted):
        Session(tmp_path / "parts", evaluations=160, surrogate=True).go(stop_after=stop)
    again = Session(tmp_path / "parts", evaluations=160, surrogate=True)
    again.go()
    assert again.history == whole.history
