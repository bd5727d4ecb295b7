"""Which Ray a search may use: a private one, or a cluster that asks its visitors for a token."""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path

from evoprune.metrics.errors import InvalidInput

LOCAL, AUTO = "local", "auto"
_SHAPE = re.compile(r"(ray://)?(?P<host>\[[0-9a-fA-F:]+\]|[\w.-]+):(?P<port>\d{1,5})")
EXPOSURE = "whoever reaches it can run code as you on every node, and read the models and texts there"


def check_address(address: str, *, insecure: bool = False) -> None:
    """Refuse an address that is none, and a cluster that takes anyone for a friend.

    A cluster whose head listens on this machine's loopback interface, found by `auto`, may do without a token.

    Args:
        address: as given to ``--address``.
        insecure: the user's own flag ``--insecure-cluster``.

    Raises:
        InvalidInput: with the line to type instead.
    """
    if address == LOCAL:
        return
    if address != AUTO and not _SHAPE.fullmatch(address):
        hint = "; port 8265 is for `ray job submit`" if address.startswith("http") else ""
        raise InvalidInput(f"--address {address[:100]!r} is not local, auto, HOST:PORT or ray://HOST:PORT{hint}")
    if insecure or (has_token() and os.environ.get("RAY_AUTH_MODE") == "token"):
        return
    target = address if address != AUTO else running_cluster()
    if address == AUTO and (target is None or is_loopback(target)):
        return
    # Ray looks at a token, wherever it lies, in this mode only.
    remedy = "RAY_AUTH_MODE=token" if has_token() else "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE"
    raise InvalidInput(
        f"the Ray cluster at {target} needs a token: set {remedy} here and on every node before `ray start`, "
        f"or accept with --insecure-cluster that {EXPOSURE}"
    )


def has_token() -> bool:
    """Whether Ray would find a token: in RAY_AUTH_TOKEN, in the file RAY_AUTH_TOKEN_PATH, or in the home folder."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return True
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    return path.is_file() and path.stat().st_size > 0


def running_cluster() -> str | None:
    """The address behind `auto`: RAY_ADDRESS, else the cluster that `ray start` began on this machine, else None."""
    if named := os.environ.get("RAY_ADDRESS"):
        return named
    from evoprune.search.engine.ray import current_cluster

    return current_cluster()


def split_address(address: str) -> tuple[str, int] | None:
    """(host, port) of ``host:port`` or ``ray://host:port``, else None."""
    found = _SHAPE.fullmatch(address)
    return (found["host"].strip("[]"), int(found["port"])) if found else None


def is_loopback(address: str) -> bool:
    """Whether ``host:port`` is on this machine's loopback interface."""
    host, _ = split_address(address) or (address, 0)
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
