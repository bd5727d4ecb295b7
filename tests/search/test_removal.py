"""What a command line has to say of the compressor, by hand."""

from __future__ import annotations

import pytest

from evoprune.search.removal import compressor_option, followed_by, in_brackets


@pytest.mark.parametrize(
    ("compressor", "allocation", "option"),
    [
        ("mask", None, ""),
        ("mask", {"sites": {}}, ""),
        # `prune` would take that of the allocation's file.
        ("mask", {"compressor": "sparsegpt"}, " --compressor mask"),
        ("refit:steps=10", None, " --compressor refit:steps=10"),
        ("refit", {"compressor": "refit"}, " --compressor refit"),
        ("obq:bits=3,symmetric=true", {"sites": {}}, " --compressor obq:bits=3,symmetric=true"),
    ],
)
def test_the_option_of_prune(compressor: str, allocation: dict[str, object] | None, option: str) -> None:
    assert compressor_option({"compressor": compressor, "allocation": allocation}) == option


def test_results_of_before_have_none() -> None:
    assert compressor_option({}) == ""


def test_words() -> None:
    assert (followed_by("mask"), in_brackets("mask")) == ("", "")
    assert (followed_by("awp"), in_brackets("awp")) == (" followed by awp", " (awp)")
