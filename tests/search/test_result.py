"""Numbers in one table are of one text, one length and one dtype; what is not is refused in one line."""

from __future__ import annotations

from typing import Any

import pytest

from evoprune.metrics.errors import InvalidInput
from evoprune.search.result import check_measured_alike, measured_on, paired_difference
from evoprune.search.tables import heldout_rows


def heldout(loss: float, tokens: int = 248) -> dict[str, Any]:
    return {"loss": loss, "perplexity": 2.0, "kl": 0.1, "stderr": 0.01, "tokens": tokens}


def result(**changes: Any) -> dict[str, Any]:
    """Of a policy search, as far as tables read it."""
    return {
        "kind": "policy",
        "data": "corpus",
        "window": 32,
        "dtype": "float32",
        "dense": {"heldout": heldout(1.0)},
        "best": {"heldout": heldout(1.2)},
        "baselines": [{"name": "flap", "heldout": heldout(1.1), "winner_minus_this": {"loss": 0.1, "stderr": 0.01}}],
        **changes,
    }


def test_a_table_of_one_text() -> None:
    assert [row[0] for row in heldout_rows(result())] == ["dense", "flap", "learned winner"]
    mixed = result(baselines=[{"name": "flap", "heldout": heldout(1.1, tokens=120), "winner_minus_this": None}])
    message = "'dense' and 'flap' were not measured alike, predicted tokens: 248 and 120; "
    with pytest.raises(InvalidInput, match=message) as refused:
        list(heldout_rows(mixed))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 64}, "tokens in a window: 32 and 64"),
        ({"dtype": "bfloat16"}, "dtype: float32 and bfloat16"),
        ({"data": "text.txt"}, "text: corpus and text.txt"),
        ({"dense": {"heldout": heldout(1.0, tokens=31)}}, "predicted tokens: 248 and 31"),
    ],
)
def test_runs_side_by_side(changes: dict[str, Any], message: str) -> None:
    check_measured_alike({"first": result(), "second": result()})
    with pytest.raises(InvalidInput, match=f"'first' and 'third' were not measured alike, {message}"):
        check_measured_alike({"first": result(), "second": result(), "third": result(**changes)})


def test_a_result_of_before_dtypes_were_said_is_compared_by_the_rest() -> None:
    old = result()
    del old["dtype"]
    check_measured_alike({"old": old, "new": result(dtype="bfloat16")})
    assert (measured_on(old), measured_on(result())) == ("windows of 32", "windows of 32, float32")


def test_differences_are_of_the_same_windows() -> None:
    one, other = ({"nll": [first, 2.0], "tokens": 62} for first in (1.0, 1.5))
    assert paired_difference(one, other)["loss"] == -0.25
    with pytest.raises(InvalidInput, match="2 windows with 62 predicted tokens and on 2 windows with 30 predicted"):
        paired_difference(one, {"nll": [1.0, 2.0], "tokens": 30})
    with pytest.raises(InvalidInput, match="2 windows with 62 predicted tokens and on 1 windows with 62"):
        paired_difference(one, {"nll": [1.0], "tokens": 62})
