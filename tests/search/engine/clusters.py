"""Ray clusters for tests: raylets on the loopback interface, each with a cache folder of its own."""

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
from collections.abc import Iterator
from pathlib import Path

START_SECONDS = 120


class LoopbackCluster:
    """A head and the raylets that join it, with token authentication.

    Attributes:
        address: of the head.
        environment: what a driver needs to connect.
        token: the secret in it.
    """

    def __init__(self, folder: Path, scratch: Path) -> None:
        self.folder = folder
        self.token = secrets.token_hex(32)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
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

    def add(self, name: str, cpus: int = 1, **environment: str) -> None:
        """Start a raylet, the head first, and wait for it.

        Raises:
            RuntimeError: it does not come up.
        """
        words = ["start", "--block", "--node-ip-address=127.0.0.1", f"--num-cpus={cpus}"]
        words += ["--object-store-memory=100000000"]
        if self._raylets:
            words += [f"--address={self.address}"]
        else:
            # The path of a socket has 107 characters at most, so it is not below the test's own folder.
            words += ["--head", f"--port={self.address.partition(':')[2]}", f"--temp-dir={self._scratch}"]
            words += ["--include-dashboard=false"]
        log = self.folder / f"{name}.log"
        with log.open("wb") as stream:
            self._raylets[name] = subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", *words],
                env={**self.environment, "EVOPRUNE_CACHE": str(self.folder / name), **environment},
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        give_up = time.monotonic() + START_SECONDS
        while b"Ray runtime started" not in log.read_bytes():
            if self._raylets[name].poll() is not None or time.monotonic() > give_up:
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


@contextlib.contextmanager
def loopback_cluster(folder: Path) -> Iterator[LoopbackCluster]:
    """A cluster without raylets yet, ended at the end of the block."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as scratch:
        cluster = LoopbackCluster(folder, Path(scratch))
        try:
            yield cluster
        finally:
            cluster.close()
