"""Shape files: what is written is read back, and each kind of damage is one clear line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evoprune.metrics.errors import InvalidInput
from evoprune.metrics.shape import BlockShape, BlockWidths, Shape
from evoprune.metrics.shape_file import from_ranges, from_rows, read_shape, to_json, to_ranges, to_rows, write_shape

WIDTHS = BlockWidths(2, 4, 48)
SHAPE = Shape(
    model="LlamaForCausalLM",
    fingerprint="f" * 64,
    blocks=(BlockShape((1,), (2, 3), (*range(9), 11, 40, 41)), BlockShape((), (), ())),
    widths=(WIDTHS, WIDTHS),
    weights={"method": "none"},
    target={"sparsity": 0.5},
)


def test_there_and_back(tmp_path: Path) -> None:
    path = write_shape(SHAPE, tmp_path / "shape.json")
    assert read_shape(path, model="LlamaForCausalLM", widths=(WIDTHS, WIDTHS)) == SHAPE
    lines = path.read_text().splitlines()
    assert sum('"block":' in line for line in lines) == 2
    assert '"groups": "1", "heads": "2-3", "neurons": "0-8,11,40-41"' in path.read_text()


@pytest.mark.parametrize("indices", [(), (0,), (3,), (0, 1, 2), (0, 2, 3, 7), tuple(range(0, 48, 2))])
def test_ranges(indices: tuple[int, ...]) -> None:
    assert from_ranges(to_ranges(indices), 48, "units") == indices


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("0-", "give ascending ranges such as 0-511,513"),
        (" 1", "give ascending ranges"),
        ([1, 2], "give ascending ranges"),
        ("3-1", "'3-1', which is not ascending from 0 to 47"),
        ("0-4,4", "'4', which is not ascending"),
        ("48", "'48', which is not ascending from 0 to 47"),
        ("0-999999999", "not ascending from 0 to 47"),
    ],
)
def test_ranges_that_are_none(text: Any, told: str) -> None:
    with pytest.raises(InvalidInput, match=told):
        from_ranges(text, 48, "the neurons of block 0")


def test_rows() -> None:
    rows = to_rows(SHAPE.blocks)
    assert rows == [["1", "2-3", "0-8,11,40-41"], ["", "", ""]]
    assert from_rows(json.loads(json.dumps(rows)), SHAPE.widths) == SHAPE.blocks


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (None, "'None' is no list of 2 blocks"),
        ([["1", "2-3", "0"]], "is no list of 2 blocks"),
        ([["1", "2-3", "0"], ["1", "2-3"]], "block 1 is .* give ranges of groups, heads, neurons"),
        ([["1", "2-3", "48"], ["", "", ""]], "the neurons of block 0 have '48'"),
        ([["1", "0-1", "4"], ["", "", ""]], "keeps query head 0 without its KV group 0"),
    ],
)
def test_rows_that_are_none(rows: Any, told: str) -> None:
    with pytest.raises(InvalidInput, match=told):
        from_rows(rows, SHAPE.widths)


def changed(**changes: Any) -> dict[str, Any]:
    """The document of `SHAPE` with other values in it, or in its first block."""
    document = to_json(SHAPE)
    for key, value in changes.items():
        (document if key in document else document["blocks"][0])[key] = value
    return document


@pytest.mark.parametrize(
    ("document", "told"),
    [
        ([], "format 'list' is not known"),
        (changed(format="evoprune-shape/9"), "format 'evoprune-shape/9' is not known; this version reads"),
        ({key: value for key, value in to_json(SHAPE).items() if key != "weights"}, "it has no 'weights'"),
        (to_json(SHAPE) | {"more": 1}, "it has 'more', which no shape has"),
        (changed(weights="none"), "'weights' must be an object"),
        (changed(weights={}), "'weights' must say its 'method'"),
        (changed(blocks=[]), "'blocks' must be a list"),
        (changed(block=1), "entry 1 of 'blocks' is not block 0"),
        (changed(extra="1"), "entry 1 of 'blocks' is not block 0"),
        (changed(of={"groups": 2, "heads": 4}), "'of' of block 0 must say"),
        (changed(of={"groups": 2, "heads": 4, "neurons": True}), "'of' of block 0 must say"),
        (changed(of={"groups": 3, "heads": 4, "neurons": 48}), "block 0 cannot have 4 query heads in 3 KV groups"),
        (changed(neurons="0-48"), "the neurons of block 0 have '0-48'"),
        (changed(heads="1-2"), "block 0 keeps query head 1 without its KV group 0"),
        (changed(groups="0-1", heads="1-3"), "block 0 keeps 1 and 2 query heads"),
    ],
)
def test_damage_is_one_line(document: Any, told: str, tmp_path: Path) -> None:
    (tmp_path / "shape.json").write_text(json.dumps(document))
    with pytest.raises(InvalidInput, match=rf"^'shape.json': .*{told}[^\n]*$"):
        read_shape(tmp_path / "shape.json")


@pytest.mark.parametrize(("text", "told"), [("{", "not a JSON document"), ('{"a": NaN}', "not a JSON document")])
def test_no_json(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "shape.json").write_text(text)
    with pytest.raises(InvalidInput, match=told):
        read_shape(tmp_path / "shape.json")
    with pytest.raises(InvalidInput, match=r"no file '.*nowhere\.json'; give a shape's \.json"):
        read_shape(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("model", "widths", "told"),
    [
        ("OPTForCausalLM", (WIDTHS, WIDTHS), "model, LlamaForCausalLM and not this OPTForCausalLM: the classes differ"),
        ("LlamaForCausalLM", (WIDTHS,), "LlamaForCausalLM: it has 2 blocks and this one 1"),
        (
            "LlamaForCausalLM",
            (WIDTHS, BlockWidths(2, 4, 64)),
            "LlamaForCausalLM: block 1 has 4 query heads in 2 KV groups and 48 neurons there and .* 64 neurons here",
        ),
    ],
)
def test_a_shape_of_another_model(model: str, widths: tuple[BlockWidths, ...], told: str) -> None:
    with pytest.raises(InvalidInput, match=f"^the shape is of another {told}"):
        SHAPE.check(model, widths)


def test_the_example_in_the_readme(tmp_path: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (tmp_path / "shape.json").write_text(readme.split("```json\n")[1].split("```")[0])
    shape = read_shape(tmp_path / "shape.json", model="LlamaForCausalLM", widths=(WIDTHS, WIDTHS))
    assert shape.blocks == (BlockShape((1,), (2, 3), (*range(31), 40)), BlockShape((), (), tuple(range(48))))
