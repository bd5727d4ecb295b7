"""Groups of matrices with budgets of their own: which matrix is in which, and what is left for the rest."""

from __future__ import annotations

import pytest

from evoprune.metrics.allocation_groups import rest_sparsity, site_groups
from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.records import Site, removed_count


def sites() -> list[Site]:
    return [
        Site("vision.0.fc", "fc", 0, 3, 10, 20, "vision_tower"),
        Site("text.0.q", "q", 1, 3, 8, 20),
        Site("text.0.up", "up", 1, 3, 30, 20),
        Site("text.1.q", "q", 2, 3, 8, 20),
    ]


def test_by_component_and_by_pattern() -> None:
    groups, rest = site_groups(sites(), {"vision_tower": 0.3, "*.q": 0.5})
    assert [(group.name, group.indices, group.sparsity) for group in groups] == [
        ("vision_tower", (0,), 0.3),
        ("*.q", (1, 3), 0.5),
    ]
    assert rest == (2,)


def test_the_first_group_that_fits_has_the_matrix() -> None:
    groups, rest = site_groups(sites(), {"text.0.*": 0.2, "language_model": 0.6, "*": 0.1})
    assert [group.indices for group in groups] == [(1, 2), (3,), (0,)]
    assert rest == ()


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        (
            {"ears": 0.5},
            r"no prunable matrix fits 'ears'; give a component \(vision_tower, language_model\) or a pattern",
        ),
        ({"*": 0.5, "*.q": 0.2}, "every matrix that '\\*.q' fits is in an earlier group"),
        ({"*": 1.0}, r"the budget of '\*' is 1.0, outside \[0, 1\)"),
        ({"*": float("nan")}, r"outside \[0, 1\)"),
        ({"*": -0.1}, r"outside \[0, 1\)"),
    ],
)
def test_groups_that_cannot_be(budgets: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        site_groups(sites(), budgets)
    assert "\n" not in str(caught.value)


def test_the_rest_makes_up_the_total() -> None:
    found = sites()
    weights = sum(site.weights for site in found)
    share = rest_sparsity(found, (2, 3), 100, 0.5)
    assert 100 + removed_count(share, 38 * 20) == weights // 2
    with pytest.raises(InvalidInput, match="cannot be reached: the groups lose 1,000 of 1,120 weights"):
        rest_sparsity(found, (2,), 1000, 0.5)
    with pytest.raises(InvalidInput, match=r"hold every matrix and lose 0\.08.* of all weights, not 0\.5"):
        rest_sparsity(found, (), 100, 0.5)


def test_the_published_budgets_of_stable_diffusion() -> None:
    """Text encoder 47.5 % of 340 M, denoiser 35 % of 866 M: 38.5 % of both (chapter, 7.13)."""
    both = [Site("text.w", "w", 0, 2, 17, 20, "text_encoder"), Site("unet.w", "w", 1, 2, 433, 2, "denoiser")]
    groups, _ = site_groups(both, {"text_encoder": 0.475, "denoiser": 0.35})
    total = sum(group.sparsity * both[index].weights for group in groups for index in group.indices)
    assert total / sum(site.weights for site in both) == pytest.approx(0.385, abs=0.0005)
