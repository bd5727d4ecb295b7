"""Which Ray a search may use."""

from __future__ import annotations

from pathlib import Path

import pytest

from evoprune.metrics.errors import InvalidInput
from evoprune.search.engine import address
from evoprune.search.engine.address import check_address, is_loopback


@pytest.fixture(autouse=True)
def no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize("text", ["", "here", "10.0.0.1", "http://127.0.0.1:8265", "ray://", "a:b", "10.0.0.1:6379/x"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="is not local, auto, HOST:PORT or ray://HOST:PORT"):
        check_address(text, insecure=True)


@pytest.mark.parametrize("text", ["10.0.0.1:6379", "ray://head.example:10001", "127.0.0.1:6379", "[fd00::1]:6379"])
def test_a_cluster_needs_a_token_or_the_flag(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInput, match=r"needs a token: .*RAY_AUTH_MODE=token.* or accept with --insecure-cluster"):
        check_address(text)
    check_address(text, insecure=True)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    with pytest.raises(InvalidInput) as caught:  # a token alone is not used by Ray for such an address
        check_address(text)
    assert "secret" not in str(caught.value)
    assert "needs a token: set RAY_AUTH_MODE=token here and" in str(caught.value)  # nothing that is there already
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    check_address(text)


def test_a_token_may_lie_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(InvalidInput):
        check_address("10.0.0.1:6379")
    (tmp_path / "token").write_text("secret")
    check_address("10.0.0.1:6379")


def test_auto_may_do_without_on_loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    check_address("local")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(InvalidInput, match=r"cluster at 10\.0\.0\.1:6379 needs a token"):
        check_address("auto")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    check_address("auto")
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setattr("evoprune.search.engine.ray.current_cluster", lambda: "192.168.0.7:6379")
    assert address.running_cluster() == "192.168.0.7:6379"
    with pytest.raises(InvalidInput, match="needs a token"):
        check_address("auto")


def test_loopback() -> None:
    assert [is_loopback(text) for text in ("127.0.0.1:1", "localhost:1", "[::1]:1", "10.0.0.1:1", "head:1")] == [
        True, True, True, False, False,
    ]  # fmt: skip
