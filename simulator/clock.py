"""Virtual time: what happens next, and when. Knows nothing of what happens."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

# Of what happens at the same instant, messages are taken in before a step that ends then is over.
MESSAGE, STEP_END = 0, 1


class Entry:
    """One thing that will happen, unless it is cancelled."""

    __slots__ = ("action", "args")

    def __init__(self, action: Callable[..., None] | None, args: tuple[Any, ...]) -> None:
        self.action = action
        self.args = args

    def cancel(self) -> None:
        self.action, self.args = None, ()


class Clock:
    """Invariant: time never goes back. What is due at the same instant happens by order, then as it was scheduled, so
    two runs with the same input are the same run."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, int, Entry]] = []
        self._num_scheduled = 0
        self._is_stopped = False

    def at(self, time: float, action: Callable[..., None], *args: Any, order: int = MESSAGE) -> Entry:
        assert time >= self.now, (time, self.now)
        entry = Entry(action, args)
        self._num_scheduled += 1
        heapq.heappush(self._heap, (time, order, self._num_scheduled, entry))
        return entry

    def after(self, delay_s: float, action: Callable[..., None], *args: Any) -> Entry:
        return self.at(self.now + delay_s, action, *args)

    def stop(self) -> None:
        """Nothing that is still to happen will."""
        self._is_stopped = True

    def run(self) -> None:
        """Until nothing is left to happen, or it is stopped."""
        heap = self._heap
        while heap and not self._is_stopped:
            time, _, _, entry = heapq.heappop(heap)
            if entry.action is None:
                continue
            self.now = time
            entry.action(*entry.args)
