"""Names of threads as the operating system shows them (top -H, py-spy, /proc): Python 3.11 keeps them to itself."""

from __future__ import annotations

import ctypes
import sys

_PR_SET_NAME = 15


def set_current(name: str) -> None:
    """Name the calling thread; at most 15 bytes are kept. Does nothing elsewhere than on Linux."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0)
