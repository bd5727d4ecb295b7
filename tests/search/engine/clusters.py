"""Ray clusters for tests: raylets with a cache folder each, on the loopback interface or in network namespaces."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

START_SECONDS = 120


@dataclass(frozen=True)
class Host:
    """Where processes run: an IP address, and the words that come before a command there."""

    ip: str = "127.0.0.1"
    prefix: tuple[str, ...] = ()


LOOPBACK = Host()


class LocalCluster:
    """A head and the raylets that join it, with token authentication.

    Attributes:
        address: of the head.
        environment: what a driver needs to connect.
        token: the secret in it.
    """

    def __init__(self, folder: Path, scratch: Path, host: Host = LOOPBACK) -> None:
        self.folder = folder
        self.token = secrets.token_hex(32)
        self.address = f"{host.ip}:{free_port()}"
        clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment = {
            **clean,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # Ray's 15 would starve the workers on a busy machine
            "EVOPRUNE_CACHE": str(folder / "driver"),
        }
        self._scratch = scratch
        self._raylets: dict[str, subprocess.Popen[bytes]] = {}

    def add(
        self, name: str, cpus: int = 1, host: Host = LOOPBACK, options: Sequence[str] = (), **environment: str
    ) -> None:
        """Start a raylet, the head first, and wait for it.

        Args:
            options: more words for ``ray start``.

        Raises:
            RuntimeError: it does not come up.
        """
        words = ["start", "--block", f"--node-ip-address={host.ip}", f"--num-cpus={cpus}"]
        words += ["--object-store-memory=100000000"]
        if self._raylets:
            words += [f"--address={self.address}"]
        else:
            # The path of a socket has 107 characters at most, so it is not below the test's own folder.
            words += ["--head", f"--port={self.address.partition(':')[2]}", f"--temp-dir={self._scratch}"]
            words += ["--include-dashboard=false"]
        words += options
        log = self.folder / f"{name}.log"
        with log.open("wb") as stream:
            self._raylets[name] = subprocess.Popen(
                [*host.prefix, sys.executable, "-m", "ray.scripts.scripts", *words],
                env={**self.environment, "EVOPRUNE_CACHE": str(self.folder / name), **environment},
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        give_up = time.monotonic() + START_SECONDS
        while b"Ray runtime started" not in log.read_bytes():
            if self._raylets[name].poll() is not None or time.monotonic() > give_up:
                self.remove(name)
                raise RuntimeError(log.read_text()[-2000:])
            time.sleep(0.2)

    def remove(self, name: str) -> None:
        """End a raylet and all its processes at once."""
        raylet = self._raylets.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(raylet.pid, signal.SIGKILL)
        raylet.wait()

    def close(self) -> None:
        """End all of them, the head last."""
        for name in reversed(list(self._raylets)):
            self.remove(name)


def free_port() -> int:
    """A port that nobody listens on yet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextlib.contextmanager
def local_cluster(folder: Path, host: Host = LOOPBACK) -> Iterator[LocalCluster]:
    """A cluster without raylets yet, its head to be on `host`, ended at the end of the block."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as scratch:
        cluster = LocalCluster(folder, Path(scratch), host)
        try:
            yield cluster
        finally:
            cluster.close()


@contextlib.contextmanager
def namespaces(count: int) -> Iterator[list[Host]]:
    """Hosts with networks of their own, joined by a bridge in the first; needs root and the command ``ip``."""
    names = [f"evoprune-{os.getpid()}-{index}" for index in range(count)]
    hosts = [Host(f"10.77.0.{index + 1}", ("ip", "netns", "exec", name)) for index, name in enumerate(names)]
    with contextlib.ExitStack() as stack:
        for name, host in zip(names, hosts, strict=True):
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "del", name)
            _ip("-n", name, "link", "set", "lo", "up")
            device = "eth0"
            if host is hosts[0]:
                _ip("-n", name, "link", "add", device, "type", "bridge")
            else:
                cable = cable_of(host)
                _ip("-n", name, "link", "add", device, "type", "veth", "peer", "name", cable, "netns", names[0])
                _ip("-n", names[0], "link", "set", cable, "master", "eth0", "up")
            _ip("-n", name, "addr", "add", f"{host.ip}/24", "dev", device)
            _ip("-n", name, "link", "set", device, "up")
        yield hosts


def cable_of(host: Host) -> str:
    """The device in the first namespace that leads to `host`."""
    return f"to-{host.ip.rpartition('.')[2]}"


def set_cable(bridge: Host, host: Host, state: str) -> None:
    """Pull the cable between two hosts of `namespaces` (``down``), or plug it in again (``up``)."""
    _ip("-n", bridge.prefix[-1], "link", "set", cable_of(host), state)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=30)
