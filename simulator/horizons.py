"""Instants that no step which stands for several may go beyond: it matters which tokens have been made by then, or have
come to the router. Decides nothing."""

from __future__ import annotations

import math

from simulator.setup import ChangeKind, Setup


class Horizons:
    """When a worker goes, when the router hears of it and, where it relieves decode workers (one that drains always),
    when it looks at them."""

    def __init__(self, setup: Setup) -> None:
        gone = [change for change in setup.changes if change.kind is not ChangeKind.JOIN]
        heard = [change.at_s + setup.lease_s(change) - setup.message_s for change in gone]
        self._changes = sorted([*(change.at_s for change in gone), *(c.at_s - setup.message_s for c in gone), *heard])
        drains = any(change.kind is ChangeKind.DRAIN for change in setup.changes)
        self._tick_s = setup.tick_s if setup.router.relieves or drains else math.inf
        self._message_s = setup.message_s

    def after(self, now: float) -> float:
        """The next one; infinity where there is none."""
        change = next((each for each in self._changes if each > now), math.inf)
        return min(change, self._look_after(now))

    def _look_after(self, now: float) -> float:
        """When a token must be made to have come by the next look."""
        if math.isinf(self._tick_s):
            return math.inf
        number = math.floor((now + self._message_s) / self._tick_s)
        looks = ((number + more) * self._tick_s - self._message_s for more in (0, 1, 2))
        return next(each for each in looks if each > now)
