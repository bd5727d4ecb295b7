"""`prune --bits` and the same in Python: what is rounded, written, read again and refused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import evoprune
from evoprune.metrics.allocation import Allocation, BitBudget
from evoprune.metrics.allocation_file import from_json, read_allocation, to_json, write_allocation
from evoprune.metrics.errors import InvalidInput
from evoprune.search.given import read_named
from tests.door.conftest import Done, Run

SHORT = ("--calibration", "text.txt", "--calibration-sequences", 4, "--calibration-window", 32)
FEW: dict[str, Any] = {"calibration": "text.txt", "calibration_sequences": 4, "calibration_window": 32}


@pytest.fixture(autouse=True)
def text(place: Path) -> None:
    """A text of bytes that takes no time to read."""
    lines = (f"line {number} holds {number * number % 97} of something\n" for number in range(400))
    (place / "text.txt").write_text("".join(lines))


@pytest.fixture
def refused(run: Run, place: Path) -> Callable[..., str]:
    """Run `prune` as it must be refused; its one line."""

    def call(*words: object) -> str:
        done: Done = run("prune", *words, "--out", "out", *SHORT)
        assert (done.code, done.out) == (2, ""), done
        assert done.err.startswith("error: ") and done.err.count("\n") == 1, done.err
        assert not (place / "out").exists()
        return done.err

    return call


@pytest.fixture
def found(tiny: Path) -> Allocation:
    return evoprune.allocate(str(tiny), "tdmpq", bits=3.5, compressor="sparsegpt", **FEW)


def test_a_mean_of_bits(run: Run, tiny: Path, place: Path) -> None:
    words = (
        "--bits",
        3.5,
        "--bit-levels",
        "2,3,4,8",
        "--compressor",
        "obq",
        "--pattern",
        "2:4",
        "--allocation",
        "cmpq",
    )
    document = run("prune", tiny, "--out", "out", *words, *SHORT, "--json").json
    assert (document["pattern"], document["sparsity"], document["bits"]) == ("2:4", 0.5, 3.5)
    assert document["allocation"]["bits"] == {"mean": 3.5, "budget": 7 * document["prunable"] // 4}
    assert document["allocation"]["parameters"]["bit_levels"] == [2, 3, 4, 8]
    rows = document["layers"]
    assert sum(row["bits"] * row["shape"][0] * row["shape"][1] for row in rows) == 7 * document["prunable"] // 2
    written = read_allocation(place / "out" / "allocation.json")
    assert [site.bits for site in written.sites] == [row["bits"] for row in rows]
    card = (place / "out" / "README.md").read_text()
    assert f"at most {7 * document['prunable'] // 4:,} bits together" in card
    assert document["stored_bits"] == 7 * document["prunable"] // 4
    counts = Counter(row["bits"] for row in rows)
    assert len(counts) > 1
    assert all(f"| {bits} | {count} |" in card for bits, count in counts.items())


def test_nothing_goes_unless_asked_for_and_all_have_the_same(run: Run, tiny: Path, place: Path) -> None:
    document = run("prune", tiny, "--out", "out", "--bits", 4, "--compressor", "sparsegpt", *SHORT, "--json").json
    assert document["removed"] == 0
    # Rounding makes zeros too, which nobody removed.
    assert f"# {tiny.name}, rounded to 4 bits a weight\n" in (place / "out" / "README.md").read_text()
    assert {row["bits"] for row in document["layers"]} == {4}
    assert document["allocation"]["allocator"] == "uniform"


def test_a_file_says_what_rounds(tiny: Path, found: Allocation, place: Path) -> None:
    write_allocation(found, place / "bits.json")
    pruned = evoprune.prune(str(tiny), allocation="bits.json", **FEW)
    assert pruned.compressor == "sparsegpt"
    assert [layer.bits for layer in pruned.layers] == [site.bits for site in found.sites]
    assert pruned.mean_bits == 3.5


def test_files(found: Allocation, place: Path) -> None:
    document = to_json(found)
    assert document["format"] == "evoprune-allocation/2"
    assert document["bits"] == {"mean": 3.5, "budget": 7 * found.weights // 2}
    assert from_json(json.loads(json.dumps(document))) == found
    assert read_allocation(write_allocation(found, place / "bits.json")) == found
    plain = replace(found, bits=None, sites=tuple(replace(site, bits=None) for site in found.sites))
    assert to_json(plain)["format"] == "evoprune-allocation/1"
    assert "bits" not in json.dumps(to_json(plain)["sites"])
    assert from_json(to_json(plain)) == plain
    with pytest.raises(InvalidInput, match="EvoPress's text holds no bits"):
        write_allocation(found, place / "bits.txt")
    for change, message in (
        ({"bits": None}, "'bits' must be an object"),
        ({"bits": {"mean": 0, "budget": 1}}, "'bits' must be an object"),
        ({"bits": {"mean": 3.5, "budget": 1.5}}, "'bits' must be an object"),
        ({"bits": {"mean": 3.5, "budget": 10}}, "budget is 10 bits, but its matrices have"),
        ({"sites": [{**row, "bits": 17} for row in document["sites"]]}, "the bits of .* are 17"),
        ({"sites": [{**row, "bits": True} for row in document["sites"]]}, "the bits of .* are True"),
        ({"sites": to_json(plain)["sites"]}, "the bits of .* are None"),
        ({"format": "evoprune-allocation/3"}, "this version reads 'evoprune-allocation/1' and 'evoprune-allocation/2'"),
    ):
        with pytest.raises(InvalidInput, match=message):
            from_json(document | change)
    with pytest.raises(InvalidInput, match="has no bits, and the allocation has a budget"):
        replace(plain, bits=BitBudget(3.5, 1)).check_budget()
    with pytest.raises(InvalidInput, match="has bits without a budget"):
        replace(found, bits=None).check_budget()


def test_what_is_refused(refused: Callable[..., str], tiny: Path, found: Allocation, place: Path) -> None:
    obq = (tiny, "--compressor", "obq", "--bits")
    assert "3.5 bits are none of the levels" in refused(*obq, 3.5)
    assert "allocator 'owl' shares out no bits" in refused(*obq, 3.5, "--allocation", "owl")
    assert "no allocator 'cmqp'; did you mean 'cmpq'" in refused(*obq, 3.5, "--allocation", "cmqp")
    assert "a mean of 1.5 bits cannot be reached" in refused(*obq, 1.5, "--allocation", "dp")
    assert "bits 9 is outside [2, 8]" in refused(*obq, 4, "--bit-levels", "4,9")
    assert "compressor 'mask' has no bits: give one that has, awp, obq, sparsegpt" in refused(tiny, "--bits", 3)
    assert "says how many bits every weight has" in refused(tiny, "--bits", 3, "--compressor", "obq:bits=3")
    assert "levels of bits go with bits" in refused(tiny, "--bit-levels", "2,3")
    assert "an allocation counts by row" in refused(*obq, 4, "--group", "layer")
    assert "leave out the budgets of groups" in refused(*obq, 4, "--budget", "*.mlp.*=0.5")
    assert "--method says by itself what goes: leave out --bits" in refused(tiny, "--bits", 4, "--method", "shortgpt")
    assert "recovery 'full' would train weights off the values" in refused(*obq, 4, "--recovery", "full")
    write_allocation(found, place / "bits.json")
    with pytest.raises(InvalidInput, match=r"'bits.json' holds bits, which no search reads"):
        read_named("bits.json")
    assert "the allocation has a mean of 3.5 bits, not 4" in refused(*obq, 4, "--allocation", "bits.json")
    given = (tiny, "--allocation", "bits.json")
    assert "compressor 'mask' has no bits" in refused(*given, "--compressor", "mask")
    assert "for a sparsity of 0 of" in refused(*given, "--pattern", "2:4")
    plain = replace(found, bits=None, sites=tuple(replace(site, bits=None) for site in found.sites))
    write_allocation(plain, place / "plain.json")
    assert "the allocation has no bits, not 4" in refused(*obq, 4, "--allocation", "plain.json")
    assert "a pattern fixes the sparsity" in refused(tiny, "--allocation", "plain.json", "--pattern", "2:4")
    (place / "levels.txt").write_text("a: 1\n")
    assert "a text of EvoPress has no bits" in refused(*obq, 4, "--allocation", "levels.txt")
    with pytest.raises(InvalidInput, match="levels of bits and a pattern go with bits"):
        evoprune.allocate(str(tiny), "dp", 0.5, pattern="2:4")
