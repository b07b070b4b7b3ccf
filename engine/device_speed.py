"""How long batches take on this device, learnt while it works; pure numbers."""

from __future__ import annotations

SLACK = 1.7
"""How many times as long as alone an urgent crop may take beside bulk; under two, because two is what is promised."""
FORGETS = 1.05
"""A time that is not reached again grows by this factor each time."""


class DeviceSpeed:
    """The shortest recent time of each batch size, and the line a + b*n through them."""

    def __init__(self) -> None:
        self._takes_s: dict[int, float] = {}

    def learn(self, crops: int, took_s: float) -> None:
        """A batch of this size took so long."""
        self._takes_s[crops] = min(took_s, FORGETS * self._takes_s.get(crops, took_s))

    def seconds(self, crops: int) -> float | None:
        """What a batch of this size takes; None: there was none yet."""
        return self._takes_s.get(crops)

    def prompt(self, delay_s: float) -> int | None:
        """The largest batch beside which urgent crops stay prompt; None: not known, or no size is too large.

        An urgent crop takes the window, a and b when alone; beside bulk it waits for the batch under way and rides in the next
        one. Batches of n keep that within `SLACK` times the first where 2 (a + b n) <= SLACK (delay + a + b).

        Args:
            delay_s: the window, the longest wait for company.
        """
        if not self._takes_s:
            return None
        small, large = min(self._takes_s), max(self._takes_s)
        if small == large:
            fixed_s, crop_s = 0.0, self._takes_s[large] / large
        else:
            crop_s = (self._takes_s[large] - self._takes_s[small]) / (large - small)
            fixed_s = max(0.0, self._takes_s[small] - crop_s * small)
        if crop_s <= 0:
            return None
        return max(1, int((SLACK / 2 * (delay_s + fixed_s + crop_s) - fixed_s) / crop_s))
