"""A network namespace for one worker, joined to ours by a cable (veth) that can be pulled. Needs root and iproute2.

Brokers, cache and image host listen on 127.0.0.1 and say so to their clients. Inside the namespace the loopback device stays
down and 127.0.0.0/8 is routed through the cable (`route_localnet` lets such packets pass at both ends), so the worker dials the
same addresses and the kernel alone is between the two: no relay that would hide a cut.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from pathlib import Path


class Namespace:
    """`prefix` before a command runs it inside; `address` is where its servers can be reached."""

    def __init__(self, number: int) -> None:
        tag = uuid.uuid4().hex[:6]
        self.name = f"chaos-{tag}"
        self._cable, end = f"ch{tag}a", f"ch{tag}b"
        third, fourth = int(tag[:2], 16), number % 64 * 4
        ours, self.address = f"10.231.{third}.{fourth + 1}", f"10.231.{third}.{fourth + 2}"
        self.prefix = ["ip", "netns", "exec", self.name]
        _ip("netns", "add", self.name)
        try:
            _ip("link", "add", self._cable, "type", "veth", "peer", "name", end, "netns", self.name)
            _ip("address", "add", f"{ours}/30", "dev", self._cable)
            _ip("link", "set", self._cable, "up")
            Path(f"/proc/sys/net/ipv4/conf/{self._cable}/route_localnet").write_text("1")
            self._inside("address", "add", f"{self.address}/30", "dev", end)
            self._inside("link", "set", end, "up")
            _run([*self.prefix, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/conf/all/route_localnet"])
            self._inside("route", "add", "127.0.0.0/8", "via", ours, "src", self.address)
        except BaseException:
            self.close()
            raise

    def cut(self) -> None:
        """Pull the cable: what is sent either way is gone, and nobody is told."""
        _ip("link", "set", self._cable, "down")

    def heal(self) -> None:
        """Put it back."""
        _ip("link", "set", self._cable, "up")

    def close(self) -> None:
        """Remove it; the cable goes with it."""
        _ip("netns", "delete", self.name)

    def _inside(self, *arguments: str) -> None:
        _ip("-n", self.name, *arguments)


def missing() -> str | None:
    """Why there can be no namespaces here, in a line; None where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2"
    try:
        Namespace(0).close()
    except (OSError, subprocess.CalledProcessError) as error:
        detail = str(getattr(error, "stderr", "") or error).strip()
        return f"network namespaces cannot be made here: {detail}"
    return None


def _ip(*arguments: str) -> None:
    _run(["ip", *arguments])


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
