"""Makes requests that resemble what services see: sessions whose contexts grow, shared system prompts, tools and
agents, bursts, heavy tails. Every draw comes from randomness that is handed in. Knows nothing of the cluster that
serves them.

The two presets are made up, not fitted: what they hold is stated in docs/simulator.md and held by tests."""

from __future__ import annotations

import heapq
import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from simulator.requests import TRACE_BLOCK_TOKENS, SimRequest
from simulator.transforms import from_zero, renumbered

if TYPE_CHECKING:
    from collections.abc import Iterator
    from random import Random


@dataclass(frozen=True, slots=True)
class Lengths:
    """Log-normal: half lie below the median; sigma 1 puts one in a hundred above ten medians. Clipped to [1, most]."""

    median: float
    sigma: float
    most: int

    def __post_init__(self) -> None:
        if not (self.median >= 1 and self.sigma >= 0 and self.most >= self.median):
            raise ValueError(f"lengths need median >= 1, sigma >= 0 and most >= median, not {self}")

    def draw(self, rng: Random) -> int:
        return max(1, min(self.most, round(rng.lognormvariate(math.log(self.median), self.sigma))))


@dataclass(frozen=True, slots=True)
class SessionKind:
    """One way of using the service. A session begins with one of num_prefixes shared prefixes; the k-th most popular
    one is drawn with weight 1 / k ** prefix_skew. Each turn's prompt is the whole context so far."""

    name: str
    weight: float  # share of the sessions, before all are made to sum to 1
    num_prefixes: int
    prefix_skew: float
    prefix_tokens: Lengths
    num_turns: Lengths
    turn_tokens: Lengths  # what the user or a tool adds per turn
    output_tokens: Lengths  # also added to the context
    pause_s: Lengths  # between turns, over the whole second
    max_context_tokens: int = 120_000  # a session that would exceed it ends

    def __post_init__(self) -> None:
        if not (self.weight > 0 and self.num_prefixes >= 1 and self.max_context_tokens >= 1):
            raise ValueError(f"{self.name} needs a positive weight, prefixes and a context")


@dataclass(frozen=True, slots=True)
class Workload:
    """Sessions begin at random, burst_factor times as often during bursts."""

    kinds: tuple[SessionKind, ...]
    sessions_per_s: float  # outside bursts
    burst_factor: float
    calm_s: float  # mean length of the time between bursts
    burst_s: float  # mean length of a burst
    lead_in_s: float  # left out at the beginning, so that sessions of every age are there from the first request on

    def __post_init__(self) -> None:
        for name in ("sessions_per_s", "burst_factor", "calm_s", "burst_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")


PRESETS = {
    # Three kinds at once: chats, single tool calls with large shared definitions, agents that call tools in a loop.
    "tool_agent": Workload(
        kinds=(
            SessionKind(
                "chat", 3, 40, 1.0, Lengths(700, 0.5, 4_000), Lengths(3, 0.8, 40), Lengths(400, 1.4, 40_000),
                Lengths(220, 0.8, 2_000), Lengths(30, 0.8, 600),
            ),
            SessionKind(
                "tool", 12, 24, 0.8, Lengths(4_000, 0.5, 20_000), Lengths(1, 0.0, 1), Lengths(1_800, 1.2, 60_000),
                Lengths(60, 0.9, 1_000), Lengths(1, 0.0, 1),
            ),
            SessionKind(
                "agent", 1, 12, 0.8, Lengths(5_000, 0.4, 20_000), Lengths(8, 0.7, 60), Lengths(1_200, 1.2, 30_000),
                Lengths(90, 0.8, 2_000), Lengths(5, 0.7, 60),
            ),
        ),
        sessions_per_s=1.5, burst_factor=3.0, calm_s=60.0, burst_s=10.0, lead_in_s=300.0,
    ),
    # Dozens of turns each; nine tenths of all prompt tokens are there from earlier turns.
    "long_sessions": Workload(
        kinds=(
            SessionKind(
                "long", 1, 20, 0.8, Lengths(2_000, 0.6, 10_000), Lengths(36, 0.4, 120), Lengths(350, 1.0, 8_000),
                Lengths(250, 0.7, 2_000), Lengths(15, 0.7, 300),
            ),
        ),
        sessions_per_s=0.1, burst_factor=3.0, calm_s=120.0, burst_s=20.0, lead_in_s=1_000.0,
    ),
}  # fmt: skip


def generate(workload: Workload, num_requests: int, rng: Random) -> tuple[SimRequest, ...]:
    """By time, the first at 0. Equal seeds give equal requests."""
    if num_requests < 1:
        raise ValueError(f"requests must be positive, not {num_requests}")
    turns = (turn for turn in _merged(workload, rng) if turn.at_s >= workload.lead_in_s)
    return renumbered(from_zero(itertools.islice(turns, num_requests)))


def preset(name: str) -> Workload:
    if name not in PRESETS:
        raise ValueError(f"generate must be one of {', '.join(PRESETS)}, not {name!r}")
    return PRESETS[name]


def _merged(workload: Workload, rng: Random) -> Iterator[SimRequest]:
    """The turns of all sessions in order of time, without end."""
    block_ids = itertools.count()
    prefixes = _Prefixes(block_ids)
    weights = [kind.weight for kind in workload.kinds]
    upcoming: list[tuple[float, int, SimRequest]] = []  # a heap
    order = itertools.count()
    for number, start_s in enumerate(_session_starts(workload, rng)):
        while upcoming and upcoming[0][0] <= start_s:
            yield heapq.heappop(upcoming)[2]
        kind = rng.choices(workload.kinds, weights)[0]
        for turn in _turns(kind, start_s, f"{kind.name} {number}", prefixes, block_ids, rng):
            heapq.heappush(upcoming, (turn.at_s, next(order), turn))


def _session_starts(workload: Workload, rng: Random) -> Iterator[float]:
    """A Poisson process whose rate switches between calm and burst after times drawn from exponentials."""
    now_s, is_burst = 0.0, False
    while True:
        ends_at = now_s + rng.expovariate(1 / (workload.burst_s if is_burst else workload.calm_s))
        rate = workload.sessions_per_s * (workload.burst_factor if is_burst else 1.0)
        while (now_s := now_s + rng.expovariate(rate)) < ends_at:
            yield now_s
        now_s, is_burst = ends_at, not is_burst


class _Prefixes:
    """The shared prefixes that have been used: (kind, rank) -> length and block ids. A prefix keeps both for good."""

    def __init__(self, block_ids: Iterator[int]) -> None:
        self._block_ids = block_ids
        self._known: dict[tuple[str, int], tuple[int, list[int]]] = {}

    def draw(self, kind: SessionKind, rng: Random) -> tuple[int, list[int]]:
        ranks = range(kind.num_prefixes)
        rank = rng.choices(ranks, [1 / (rank + 1) ** kind.prefix_skew for rank in ranks])[0]
        if (kind.name, rank) not in self._known:
            num_tokens = kind.prefix_tokens.draw(rng)
            ids = list(itertools.islice(self._block_ids, num_tokens // TRACE_BLOCK_TOKENS))
            self._known[kind.name, rank] = (num_tokens, ids)
        return self._known[kind.name, rank]


def _turns(
    kind: SessionKind, at_s: float, session: str, prefixes: _Prefixes, block_ids: Iterator[int], rng: Random
) -> Iterator[SimRequest]:
    """The context is one growing stream of tokens, cut into blocks: blocks wholly inside the shared prefix are shared,
    the others are the session's own."""
    num_tokens, shared_ids = prefixes.draw(kind, rng)
    hash_ids = list(shared_ids)
    for _ in range(kind.num_turns.draw(rng)):
        num_tokens += kind.turn_tokens.draw(rng)
        if num_tokens > kind.max_context_tokens:
            return
        hash_ids += itertools.islice(block_ids, -(-num_tokens // TRACE_BLOCK_TOKENS) - len(hash_ids))
        num_output_tokens = kind.output_tokens.draw(rng)
        yield SimRequest(at_s, num_output_tokens, tuple(hash_ids), num_tokens, session=session)
        num_tokens += num_output_tokens
        at_s += kind.pause_s.draw(rng)
