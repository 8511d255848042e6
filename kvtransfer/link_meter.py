"""What a link has carried, and for how long it was at it. Pure: told when."""

from __future__ import annotations


class LinkMeter:
    """Written by one thread, read by any. Operations end in the order in which they began, and overlap: `busy_s` is the
    time in which there was at least one."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.busy_s = 0.0
        self._last_end = 0.0

    def count(self, num_bytes: int, began_at: float, ended_at: float) -> None:
        self.num_bytes += num_bytes
        self.busy_s += ended_at - max(began_at, self._last_end)
        self._last_end = ended_at
