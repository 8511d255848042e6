"""Instants that no step which stands for several may go beyond: it matters which tokens have been made by then, or have
come to the router. Decides nothing."""

from __future__ import annotations

import math
from collections.abc import Callable

from simulator.setup import ChangeKind, Setup


class Horizons:
    """When a worker goes, when the router hears of it and, while it relieves decode workers (one that drains always),
    when it looks at them. Where pools change by themselves, one that drains may have to go at any of these looks."""

    def __init__(self, setup: Setup, drains: Callable[[], bool]) -> None:
        """drains: whether any worker does at present."""
        gone = [change for change in setup.changes if change.kind is not ChangeKind.JOIN]
        heard = [change.at_s + setup.lease_s(change) - setup.message_s for change in gone]
        self._changes = sorted([*(change.at_s for change in gone), *(c.at_s - setup.message_s for c in gone), *heard])
        self._tick_s = setup.tick_s
        self._relieves = setup.router.relieves
        self._drains = drains
        self._before_s = (setup.message_s, 0.0) if setup.autoscaler.enabled else (setup.message_s,)

    def after(self, now: float) -> float:
        """The next one; infinity where there is none."""
        change = next((each for each in self._changes if each > now), math.inf)
        return min(change, self._look_after(now))

    def _look_after(self, now: float) -> float:
        """When a token must be made to have come by the next look, or to be made by then."""
        if not (self._relieves or self._drains()):
            return math.inf
        number = math.floor(now / self._tick_s)
        looks = ((number + more) * self._tick_s - before_s for more in (0, 1, 2) for before_s in self._before_s)
        return min(each for each in looks if each > now)
