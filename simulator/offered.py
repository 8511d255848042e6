"""The load that a cluster is offered: which requests come, and when, at a rate. Decides how a rate is reached: by
compressing all gaps alike, or by more sessions whose users pause as long as ever."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

from simulator.generator import generate
from simulator.sessions import Session, Window, turns_at_rate
from simulator.transforms import at_rate, from_zero, rate_of, truncated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from random import Random

    from simulator.generator import Workload
    from simulator.requests import SimRequest
    from simulator.sessions import Turn

LEAD_IN_SHARE = 0.25  # of a trace's sessions: they fill the ramp, and only their late turns are served
WARMUP_S = 60.0  # in which most sessions under way at the beginning come once, with contexts that no cache has
NUM_REMEMBERED = 16  # loads at a rate; every variant and ring seed asks for the same ones


class OfferedLoad(Protocol):
    """Equal rates give equal requests, by time, the first at 0."""

    @property
    def warmup_s(self) -> float:
        """What comes before is not to count."""

    @property
    def own(self) -> tuple[SimRequest, ...]:
        """As often as they come by themselves."""

    def at(self, rate: float) -> tuple[SimRequest, ...]:
        """ValueError for a rate that cannot be."""


@dataclass(frozen=True, slots=True)
class Compressed:
    """The same requests at every rate, all gaps stretched or compressed alike. Users seem to think faster at high
    rates: a turn may come before the answer that it would have waited for."""

    own: tuple[SimRequest, ...]
    warmup_s: float = 0.0

    def at(self, rate: float) -> tuple[SimRequest, ...]:
        return at_rate(self.own, rate)


@dataclass(frozen=True, slots=True)
class Generated:
    """Made anew for each rate, out of the same sessions. `cut`: prompts end after so many tokens. The rate is that of
    what comes after the warm-up."""

    workload: Workload
    num_requests: int
    rng_of: Callable[[str], Random]
    seed: str
    cut: int | None = None
    warmup_s: float = WARMUP_S

    @property
    def own(self) -> tuple[SimRequest, ...]:
        return _generated(self, None)

    def at(self, rate: float) -> tuple[SimRequest, ...]:
        return _generated(self, rate)


@lru_cache(NUM_REMEMBERED)
def _generated(load: Generated, rate: float | None) -> tuple[SimRequest, ...]:
    requests = generate(load.workload, load.num_requests, load.rng_of(load.seed), rate, load.warmup_s)
    return requests if load.cut is None else truncated(requests, load.cut)


@dataclass(frozen=True, slots=True)
class Regrouped:
    """A trace whose sessions begin closer together or further apart. Its first quarter of sessions begins before the
    first request, and none is served after the last one's beginning: the higher the rate, the fewer requests are left,
    for more of them would come when no session begins any more."""

    requests: tuple[SimRequest, ...]  # the whole trace, with sessions
    num_requests: int | None = None  # the first ones of those that are left; None: all
    warmup_s: float = WARMUP_S

    @property
    def own(self) -> tuple[SimRequest, ...]:
        return self.requests[: self.num_requests]

    def at(self, rate: float) -> tuple[SimRequest, ...]:
        known = _KnownSessions(self.requests)
        window = Window(rate, self.num_requests or len(self.requests), math.inf, self.warmup_s)
        if known.last_start_s <= 0:
            raise ValueError(f"{known.num_sessions} sessions that begin at once cannot be moved to {rate:g} requests/s")
        turns = turns_at_rate(known, window, rate_of(self.requests) / rate)
        if len(turns) < 2:
            raise ValueError(f"{len(turns)} requests of the trace are left at {rate:g} requests/s")
        return from_zero(replace(known.request(turn), at_s=turn.at_s) for turn in turns)


class _KnownSessions:
    """Invariant: the session after the lead-in begins at 0."""

    def __init__(self, requests: Sequence[SimRequest]) -> None:
        self._turns: dict[str, list[SimRequest]] = {}
        for number, request in enumerate(requests):
            self._turns.setdefault(request.session or f"alone {number}", []).append(request)
        starts_s = [turns[0].at_s for turns in self._turns.values()]
        zero_s = starts_s[int(LEAD_IN_SHARE * len(starts_s))]
        self._sessions = [
            Session(name, turns[0].at_s - zero_s, tuple(turn.at_s - turns[0].at_s for turn in turns))
            for name, turns in self._turns.items()
        ]

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    @property
    def last_start_s(self) -> float:
        return self._sessions[-1].start_s

    def between(self, start_s: float, end_s: float) -> Iterator[Session]:
        return (session for session in self._sessions if start_s <= session.start_s <= end_s)

    def request(self, turn: Turn) -> SimRequest:
        return self._turns[turn.session][turn.index]
