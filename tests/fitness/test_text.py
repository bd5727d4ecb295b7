"""Three disjoint texts, from whatever the user has, cut into the same windows every time."""

from __future__ import annotations

import gzip
import json
import sys
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from evoprune.fitness import documents
from evoprune.fitness.corpus import read_side, side_hash
from evoprune.fitness.documents import read_documents
from evoprune.fitness.text import SIDES, side_documents, source_hash, token_stream, token_windows
from evoprune.metrics.errors import InvalidInput
from tests.models import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def essay(number: int, length: int = 600) -> str:
    """A document that no other number gives."""
    return "".join(f"document {number} line {line}\n" for line in range(length // 20))


def write_rows(file: Path, texts: list[str]) -> Path:
    file.write_text("".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in texts))
    return file


@pytest.fixture(params=["one file", "folder", "rows", "lines"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The four shapes in which users have text."""
    match request.param:
        case "one file":
            (tmp_path / "a.txt").write_text(essay(0, 20_000))
            return str(tmp_path / "a.txt")
        case "folder":
            (tmp_path / "inner").mkdir()
            for number in range(4):
                (tmp_path / "inner" / f"{number}.md").write_text(essay(number, 5000))
            return str(tmp_path)
        case "rows":
            return str(write_rows(tmp_path / "a.jsonl", [essay(number) for number in range(60)]))
    return str(write_rows(tmp_path / "a.jsonl", [f"line {number}, not a document\n" for number in range(900)]))


def refusal(source: str | Path, **options: Any) -> str:
    with pytest.raises(InvalidInput) as caught:
        token_windows(TOKENIZER, str(source), "A", **({"window": 16} | options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_sides_are_disjoint_and_lose_nothing(source: str) -> None:
    sides = {side: side_documents(source, side) for side in SIDES}
    assert sorted("".join(map("".join, sides.values()))) == sorted("".join(read_documents(source)))
    lines = {side: {line for document in found for line in document.splitlines()} for side, found in sides.items()}
    for one, other in combinations(SIDES, 2):
        assert not lines[one] & lines[other]
    sizes = [sum(map(len, found)) for found in sides.values()]
    assert max(sizes) < 3 * min(sizes)
    assert len({source_hash(source, side) for side in SIDES}) == 3


def test_windows_of_different_sides_and_sizes_are_disjoint(source: str) -> None:
    # A line that is whole inside a window stands in one place of the source only.
    seen: dict[str, set[str]] = {}
    for side, window in (("A", 64), ("B", 48), ("C", 100)):
        for row in token_windows(TOKENIZER, source, side, window=window):
            seen.setdefault(side, set()).update(str(TOKENIZER.decode(row)).split("\n")[1:-1])
    for one, other in combinations(SIDES, 2):
        assert not seen[one] & seen[other]


def test_windows_do_not_overlap_and_follow_the_stream(source: str) -> None:
    stream = token_stream(TOKENIZER, side_documents(source, "B"))
    windows = token_windows(TOKENIZER, source, "B", window=32)
    assert windows.dtype == torch.int64
    assert windows.shape == (len(stream) // 32, 32)
    assert torch.equal(windows.flatten(), stream[: windows.numel()])
    assert torch.equal(token_windows(TOKENIZER, source, "B", window=32, count=3), windows[:3])


def test_a_seed_draws_without_replacement(source: str) -> None:
    everything = {tuple(row.tolist()) for row in token_windows(TOKENIZER, source, "A", window=32)}
    drawn = [tuple(row.tolist()) for row in token_windows(TOKENIZER, source, "A", window=32, count=40, seed=1)]
    assert len(set(drawn)) == 40
    assert set(drawn) <= everything
    again = token_windows(TOKENIZER, source, "A", window=32, count=40, seed=1)
    assert [tuple(row.tolist()) for row in again] == drawn
    fewer = token_windows(TOKENIZER, source, "A", window=32, count=10, seed=1)
    assert torch.equal(fewer, again[:10])
    assert not torch.equal(token_windows(TOKENIZER, source, "A", window=32, count=40, seed=2), again)


def test_every_document_stands_behind_a_separator() -> None:
    stream = token_stream(TOKENIZER, ("ab", "c"))
    assert stream.tolist() == [0, *TOKENIZER("ab")["input_ids"], 0, *TOKENIZER("c")["input_ids"]]
    bare = tiny_tokenizer()
    bare.bos_token = bare.eos_token = None
    assert token_stream(bare, ("ab", "c")).tolist() == TOKENIZER("abc")["input_ids"]


def test_the_embedded_corpus() -> None:
    assert side_documents("corpus", "C") == read_side("C")
    assert source_hash("corpus", "B") == side_hash("B")
    assert token_windows(TOKENIZER, "corpus", "A", window=128, count=4).shape == (4, 128)
    with pytest.raises(InvalidInput, match="the sides are A, B, C"):
        side_documents("corpus", "D")


def test_equal_documents_share_a_side(tmp_path: Path) -> None:
    texts = [essay(number % 20) for number in range(60)]
    file = write_rows(tmp_path / "a.jsonl", texts)
    sides = [set(side_documents(str(file), side)) for side in SIDES]
    assert sum(map(len, sides)) == 20
    assert sum(len(side_documents(str(file), side)) for side in SIDES) == 60


def test_a_text_without_line_ends_is_cut_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 9000)
    assert [len("".join(side_documents(str(tmp_path / "a.txt"), side))) for side in SIDES] == [3000] * 3


def test_compressed_rows_equal_plain_ones(tmp_path: Path) -> None:
    plain = write_rows(tmp_path / "a.jsonl", [essay(number) for number in range(40)])
    packed = tmp_path / "b.json.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert source_hash(str(plain), "A") == source_hash(str(packed), "A")


def test_odd_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + b"caf\xe9 \x00 \xf0\x9f\x8c\xb1\n" * 200)
    assert token_windows(TOKENIZER, str(tmp_path / "a.txt"), "A", window=16).shape[1] == 16


def test_only_the_first_part_of_a_large_source_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_CHARACTERS", 3000)
    (tmp_path / "a.txt").write_text(essay(0, 50_000))
    assert sum(map(len, read_documents(str(tmp_path / "a.txt")))) == 3000
    rows = write_rows(tmp_path / "b.jsonl", [essay(number) for number in range(50)])
    assert 3000 <= sum(map(len, read_documents(str(rows)))) < 4000


def test_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").table
    texts = [essay(number) for number in range(40)]
    parquet.write_table(table({"text": texts}), tmp_path / "a.parquet")
    rows = write_rows(tmp_path / "a.jsonl", texts)
    assert source_hash(str(tmp_path / "a.parquet"), "A") == source_hash(str(rows), "A")
    parquet.write_table(table({"words": texts}), tmp_path / "b.parquet")
    assert "has no column 'text', only words" in refusal(tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no more")
    assert "is no Parquet file" in refusal(tmp_path / "c.parquet")


class HubRows:
    """Stands in for the datasets library."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        self.asked: list[tuple[Any, ...]] = []

    def load_dataset(self, name: str, config: str | None, *, split: str, streaming: bool) -> list[dict[str, Any]]:
        self.asked.append((name, config, split, streaming))
        if name == "no/such":
            raise ConnectionError("Couldn't reach\nthe Hub")
        return self.rows


@pytest.fixture
def hub_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> HubRows:
    monkeypatch.setenv("EVOPRUNE_CACHE", str(tmp_path / "cache"))
    library = HubRows([{"text": essay(number)} for number in range(40)])
    monkeypatch.setattr(documents, "_datasets", lambda: library)
    return library


def test_a_hub_data_set_is_fetched_once(hub_rows: HubRows) -> None:
    for side in SIDES:
        assert side_documents("some/texts:en:validation", side)
    assert hub_rows.asked == [("some/texts", "en", "validation", True)]
    read_documents("some/texts")
    read_documents("some/texts:test")
    assert hub_rows.asked[1:] == [("some/texts", None, "train", True), ("some/texts", None, "test", True)]


def test_bad_data_sets(hub_rows: HubRows) -> None:
    assert "Couldn't reach the Hub" in refusal("no/such")
    assert "name:config:split" in refusal("a:b:c:d")
    assert "name:config:split" in refusal("a::d")
    hub_rows.rows = [{"content": "x"}]
    assert "has no field 'text', only content" in refusal("other/texts")


def test_optional_libraries_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'evoprune[data]'" in refusal("some/texts")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    assert "pip install 'evoprune[data]'" in refusal(tmp_path / "a.parquet")
    (tmp_path / "state.json").write_text("{}")
    assert "pip install 'evoprune[data]'" in refusal(tmp_path)


def test_a_saved_data_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [{"text": essay(number)} for number in range(40)]
    for loaded in (rows, {"train": rows, "test": []}, {"b": [], "a": rows}):
        library = SimpleNamespace(load_from_disk=lambda _, loaded=loaded: loaded)
        monkeypatch.setattr(documents, "_datasets", lambda library=library: library)
        (tmp_path / "dataset_dict.json").write_text("{}")
        assert len(read_documents(str(tmp_path))) == 40


def test_a_data_set_that_the_library_saved(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    texts = [essay(number) for number in range(40)]
    saved = datasets.Dataset.from_dict({"text": texts})
    saved.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"test": saved.select([0]), "train": saved}).save_to_disk(str(tmp_path / "splits"))
    rows = write_rows(tmp_path / "a.jsonl", texts)
    for name in ("one", "splits"):
        assert source_hash(str(tmp_path / name), "B") == source_hash(str(rows), "B")
    saved.rename_column("text", "words").save_to_disk(str(tmp_path / "other"))
    assert "has no field 'text', only words" in refusal(tmp_path / "other")


def test_too_short(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words\n" * 12)
    assert "text too short: side A of" in refusal(tmp_path / "a.txt", count=100)
    assert "has 56 tokens, 1600 are needed (100 windows of 16)" in refusal(tmp_path / "a.txt", count=100)
    assert "has 56 tokens, 1600 are needed (100 windows of 16)" in refusal(tmp_path / "a.txt", count=100, seed=3)
    assert "1 windows of 64" in refusal(tmp_path / "a.txt", window=64)
    (tmp_path / "b.txt").write_text("")
    assert "has 0 tokens" in refusal(tmp_path / "b.txt")


def test_bad_sources(tmp_path: Path) -> None:
    assert "no such file or folder" in refusal(tmp_path / "nowhere.txt")
    assert "no such file or folder" in refusal("nowhere.jsonl")
    assert "holds no text" in refusal(tmp_path)
    (tmp_path / "a.csv").write_text("a,b")
    assert "give a file that ends in .txt" in refusal(tmp_path / "a.csv")
    for text in ("{", '{"words": 1}', '{"text": 1}', "3", "[" * 100_000, "\udcff"):
        (tmp_path / "a.jsonl").write_text(text, errors="surrogateescape")
        assert "a.jsonl" in refusal(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl.gz").write_bytes(b"no gzip")
    assert "a.jsonl.gz" in refusal(tmp_path / "a.jsonl.gz")


def test_bad_windows() -> None:
    assert "give 2 or more" in refusal("corpus", window=1)
    assert "give 1 or more" in refusal("corpus", count=0)
    for seed in (-1, 1 << 63):
        assert f"seed {seed} cannot be" in refusal("corpus", count=1, seed=seed)
