"""Watching the head of a cluster, without which Ray ends the process and lets nobody say a last word.

What Ray asks of a head that is away blocks for as long as that takes, and some questions to one that was restarted
without its memory abort the process. So whoever wants something of the head asks here first.
"""

from __future__ import annotations

import contextlib
import socket
import time
from typing import Any

from evoprune.metrics.errors import NoCapacity

LOOK_SECONDS = 5.0
"""Between two looks."""
GONE_SECONDS = 30.0
"""A head that has been away for so long is gone. After 60 s Ray itself ends the process, with exit code 1."""
CONNECT_SECONDS = 2.0
"""To wait for an answer."""


class Head:
    """The process that knows a cluster (Ray calls it GCS). Running work does not need it, new workers do.

    Args:
        address: its host and port.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        host, _, port = address.rpartition(":")
        self._place = (host.strip("[]"), int(port))
        self._looked_at = self._seen_at = time.monotonic()

    def answers(self) -> bool:
        """Whether somebody listens at the head's address."""
        self._looked_at = time.monotonic()
        try:
            socket.create_connection(self._place, timeout=CONNECT_SECONDS).close()
        except OSError:
            return False
        self._seen_at = time.monotonic()
        return True

    def knows_us(self, ray: Any) -> bool:
        """Whether it is there, and the one that `ray`, the module, was connected to."""
        if not self.answers():
            return False
        with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
            ray._private.worker.global_worker.gcs_client.internal_kv_get(b"evoprune", None, timeout=CONNECT_SECONDS)
            return True
        return False

    def check(self) -> None:
        """Look whether it is there, now and then.

        Raises:
            NoCapacity: it is gone.
        """
        if time.monotonic() - self._looked_at > LOOK_SECONDS:
            self.answers()
        if self._looked_at - self._seen_at > GONE_SECONDS:
            raise NoCapacity(f"the head of the Ray cluster, {self._address}, has been gone for {GONE_SECONDS:g} s")
