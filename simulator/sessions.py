"""More sessions, not faster users: reaches a rate by moving the beginnings of sessions and leaves the time between a
session's turns as it is. Decides when each turn comes and which are served; knows nothing of what they ask for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

FIRST_STEP = 1.2  # by which a factor is changed until the rate lies between two of them
MAX_TRIES = 60


@dataclass(frozen=True, slots=True)
class Session:
    """Its turns come at start_s + offset; offsets ascend from 0. One that starts below 0 is under way when the requests
    begin."""

    name: str
    start_s: float
    offsets_s: tuple[float, ...]


class Sessions(Protocol):
    """Sessions as they come at a rate of their own."""

    @property
    def last_start_s(self) -> float:
        """No session begins later; infinite where more can always be drawn."""

    def between(self, start_s: float, end_s: float) -> Iterable[Session]:
        """Those that begin in [start_s, end_s]."""


@dataclass(frozen=True, slots=True)
class Turn:
    at_s: float
    session: str
    index: int


@dataclass(frozen=True, slots=True)
class Window:
    """What is served: from 0 until num_turns should have come at this rate, and no more of them, but not beyond the
    last session's beginning. Later there would be old sessions and no new ones. Sessions may have begun lead_in_s
    before. The rate is that of what comes after warmup_s, or in the second half where that is longer."""

    rate: float
    num_turns: int
    lead_in_s: float
    warmup_s: float = 0.0

    def end_s(self, sessions: Sessions, factor: float) -> float:
        return min(self.num_turns / self.rate, factor * sessions.last_start_s)

    def turns(self, sessions: Sessions, factor: float) -> list[Turn]:
        """In order of time. Sessions begin `factor` times as far from 0."""
        return sorted(self._turns(sessions, factor), key=lambda turn: turn.at_s)[: self.num_turns]

    def excess(self, sessions: Sessions, factor: float) -> float:
        """By how many turns there are more than the rate asks for."""
        end_s = self.end_s(sessions, factor)
        start_s = min(self.warmup_s, end_s / 2)
        num_turns = sum(turn.at_s >= start_s for turn in self._turns(sessions, factor))
        return num_turns - self.rate * (end_s - start_s)

    def _turns(self, sessions: Sessions, factor: float) -> Iterator[Turn]:
        end_s = self.end_s(sessions, factor)
        for session in sessions.between(-self.lead_in_s / factor, end_s / factor):
            start_s = session.start_s * factor
            if start_s + session.offsets_s[-1] < 0:
                continue  # over before the first request, as most of a long lead-in are
            for index, offset_s in enumerate(session.offsets_s):
                if 0 <= start_s + offset_s <= end_s:
                    yield Turn(start_s + offset_s, session.name, index)


def turns_at_rate(sessions: Sessions, window: Window, guess: float) -> list[Turn]:
    """`guess`: the factor that should about do. ValueError where no factor does."""
    low, high = _bracket(sessions, window, guess)
    factor = math.sqrt(low * high)
    for _ in range(MAX_TRIES):
        excess = window.excess(sessions, factor)
        if abs(excess) < 1:
            break
        low, high = (factor, high) if excess > 0 else (low, factor)
        factor = math.sqrt(low * high)
    return window.turns(sessions, factor)


def _bracket(sessions: Sessions, window: Window, guess: float) -> tuple[float, float]:
    """A factor that makes too many turns, and a greater one that does not."""
    low = guess
    for _ in range(MAX_TRIES):
        if window.excess(sessions, low) > 0:
            break
        low /= FIRST_STEP
    high = low * FIRST_STEP
    for _ in range(MAX_TRIES):
        if window.excess(sessions, high) <= 0:
            return high / FIRST_STEP, high
        high *= FIRST_STEP
    raise ValueError(f"no number of sessions makes {window.rate:g} requests/s")
