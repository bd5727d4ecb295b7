"""What whole searches of every kind run on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.models import save_tiny


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model, a text and a cache of their own."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny(folder / "model")
    text = "\n".join(f"line {index}: {index * index % 97} apples, {index % 13} pears." for index in range(2000))
    (folder / "text.txt").write_text(text)
    before = os.environ.get("EVOPRUNE_CACHE")
    os.environ["EVOPRUNE_CACHE"] = str(folder / "cache")
    yield folder
    if before is None:
        del os.environ["EVOPRUNE_CACHE"]
    else:
        os.environ["EVOPRUNE_CACHE"] = before
