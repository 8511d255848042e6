"""Makes requests that resemble what services see: sessions whose contexts grow, shared system prompts, tools and
agents, bursts, heavy tails. Every draw comes from randomness that is handed in. Knows nothing of the cluster that
serves them.

The two presets are made up, not fitted: what they hold is stated in docs/simulator.md and held by tests."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from simulator.requests import TRACE_BLOCK_TOKENS, SimRequest
from simulator.sessions import Session, Turn, Window, turns_at_rate
from simulator.transforms import from_zero, renumbered

if TYPE_CHECKING:
    from collections.abc import Iterator
    from random import Random

ANSWER_S_PER_TOKEN = 0.03  # after which, as its user sees it, an answer is there
NUM_PILOTS = 500  # sessions by which the rate of requests is estimated


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
    pause_s: Lengths  # from the expected end of an answer to the next turn
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
    lead_in_s: float  # before the first request, so that sessions of every age are there from the first request on

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
        sessions_per_s=0.1, burst_factor=3.0, calm_s=120.0, burst_s=20.0, lead_in_s=2_000.0,
    ),
}  # fmt: skip


def generate(
    workload: Workload, num_requests: int, rng: Random, rate: float | None = None, warmup_s: float = 0.0
) -> tuple[SimRequest, ...]:
    """By time, the first at 0. At another rate than the workload's own the same sessions begin closer together or
    further apart, and their users pause as long as ever. The rate is that of what comes after warmup_s; with a warm-up
    there may be a few requests less than asked for. Equal seeds give equal requests."""
    if num_requests < 1:
        raise ValueError(f"requests must be positive, not {num_requests}")
    drawn = _Drawn(workload, rng)
    own_rate = drawn.estimated_rate()
    if rate is None:
        window = Window(own_rate, num_requests, workload.lead_in_s)
        while len(turns := window.turns(drawn, 1.0)) < num_requests:
            window = replace(window, rate=window.rate / 2)
    elif math.isfinite(rate) and rate > 0:
        turns = turns_at_rate(drawn, Window(rate, num_requests, workload.lead_in_s, warmup_s), own_rate / rate)
    else:
        raise ValueError(f"rate must be positive, not {rate:g}")
    return renumbered(from_zero(drawn.request(turn) for turn in turns))


def preset(name: str) -> Workload:
    if name not in PRESETS:
        raise ValueError(f"generate must be one of {', '.join(PRESETS)}, not {name!r}")
    return PRESETS[name]


def without_longer_contexts(workload: Workload, max_context_tokens: int) -> Workload:
    """Sessions end earlier."""
    kinds = tuple(
        replace(kind, max_context_tokens=min(kind.max_context_tokens, max_context_tokens)) for kind in workload.kinds
    )
    return replace(workload, kinds=kinds)


@dataclass(frozen=True, slots=True)
class _Draft:
    """What a session asks for. Its context is one growing stream of tokens, cut into blocks: those wholly inside the
    shared prefix are shared, the others its own."""

    session: Session
    shared_ids: range
    own_ids: range
    num_prompt_tokens: tuple[int, ...]  # by turn, as num_output_tokens
    num_output_tokens: tuple[int, ...]


class _Drawn:
    """Sessions drawn so far: those from 0 on and, as far back as anyone has asked, those before. Invariant: how far
    either side is drawn changes nothing that is drawn."""

    def __init__(self, workload: Workload, rng: Random) -> None:
        self._block_ids = _BlockIds()
        self._prefixes = _Prefixes(workload, self._block_ids, rng)
        self._drafts: dict[str, _Draft] = {}
        self._later = self._side(workload, type(rng)(rng.getrandbits(64)), 1)
        self._earlier = self._side(workload, type(rng)(rng.getrandbits(64)), -1)

    @property
    def last_start_s(self) -> float:
        return math.inf

    def between(self, start_s: float, end_s: float) -> Iterator[Session]:
        yield from self._earlier.until(-start_s)
        yield from self._later.until(end_s)

    def estimated_rate(self) -> float:
        """Requests/s at the sessions' own rate, by the first ones."""
        sessions = list(self._later.first(NUM_PILOTS))
        return sum(len(session.offsets_s) for session in sessions) / sessions[-1].start_s

    def request(self, turn: Turn) -> SimRequest:
        draft = self._drafts[turn.session]
        num_tokens = draft.num_prompt_tokens[turn.index]
        num_own = -(-num_tokens // TRACE_BLOCK_TOKENS) - len(draft.shared_ids)
        hash_ids = (*draft.shared_ids, *draft.own_ids[:num_own])
        return SimRequest(turn.at_s, draft.num_output_tokens[turn.index], hash_ids, num_tokens, session=turn.session)

    def _side(self, workload: Workload, rng: Random, sign: int) -> _Side:
        return _Side(self._sessions(workload, rng, sign))

    def _sessions(self, workload: Workload, rng: Random, sign: int) -> Iterator[Session]:
        weights = [kind.weight for kind in workload.kinds]
        for number, start_s in enumerate(_session_starts(workload, rng), start=1):
            kind = rng.choices(workload.kinds, weights)[0]
            name = f"{kind.name} {sign * number}"
            draft = _draft(kind, name, sign * start_s, self._prefixes, self._block_ids, rng)
            if draft.session.offsets_s:
                self._drafts[name] = draft
                yield draft.session


class _Side:
    """Sessions ever further from 0, drawn when they are asked for and kept."""

    def __init__(self, sessions: Iterator[Session]) -> None:
        self._sessions = sessions
        self._kept: list[Session] = []

    def first(self, num_sessions: int) -> Iterator[Session]:
        self._kept += itertools.islice(self._sessions, max(0, num_sessions - len(self._kept)))
        return itertools.islice(self._kept, num_sessions)

    def until(self, distance_s: float) -> Iterator[Session]:
        for index in itertools.count():
            if index == len(self._kept):
                self._kept.append(next(self._sessions))
            if abs(self._kept[index].start_s) > distance_s:
                return
            yield self._kept[index]


class _BlockIds:
    """Hands out block ids that nobody else has."""

    def __init__(self) -> None:
        self._next = 0

    def take(self, num_ids: int) -> range:
        self._next += num_ids
        return range(self._next - num_ids, self._next)


class _Prefixes:
    """The shared prefixes: length and block ids, by kind and popularity."""

    def __init__(self, workload: Workload, block_ids: _BlockIds, rng: Random) -> None:
        self._known: dict[str, list[tuple[int, range]]] = {}
        self._weights: dict[str, list[float]] = {}  # cumulative
        for kind in workload.kinds:
            lengths = [kind.prefix_tokens.draw(rng) for _ in range(kind.num_prefixes)]
            self._known[kind.name] = [(length, block_ids.take(length // TRACE_BLOCK_TOKENS)) for length in lengths]
            weights = (1 / (rank + 1) ** kind.prefix_skew for rank in range(kind.num_prefixes))
            self._weights[kind.name] = list(itertools.accumulate(weights))

    def draw(self, kind: SessionKind, rng: Random) -> tuple[int, range]:
        return rng.choices(self._known[kind.name], cum_weights=self._weights[kind.name])[0]


def _session_starts(workload: Workload, rng: Random) -> Iterator[float]:
    """A Poisson process whose rate switches between calm and burst after times drawn from exponentials."""
    now_s, is_burst = 0.0, False
    while True:
        ends_at = now_s + rng.expovariate(1 / (workload.burst_s if is_burst else workload.calm_s))
        rate = workload.sessions_per_s * (workload.burst_factor if is_burst else 1.0)
        while (now_s := now_s + rng.expovariate(rate)) < ends_at:
            yield now_s
        now_s, is_burst = ends_at, not is_burst


def _draft(
    kind: SessionKind, name: str, start_s: float, prefixes: _Prefixes, block_ids: _BlockIds, rng: Random
) -> _Draft:
    """Without turns where already the first would exceed the context."""
    num_tokens, shared_ids = prefixes.draw(kind, rng)
    at_s, turns = 0.0, []
    for _ in range(kind.num_turns.draw(rng)):
        num_tokens += kind.turn_tokens.draw(rng)
        if num_tokens > kind.max_context_tokens:
            break
        num_output_tokens = kind.output_tokens.draw(rng)
        turns.append((at_s, num_tokens, num_output_tokens))
        num_tokens += num_output_tokens
        at_s += ANSWER_S_PER_TOKEN * num_output_tokens + kind.pause_s.draw(rng)
    offsets_s, num_prompt_tokens, num_output = tuple(zip(*turns, strict=True)) if turns else ((), (), ())
    num_own = -(-max(num_prompt_tokens, default=0) // TRACE_BLOCK_TOKENS) - len(shared_ids)
    own_ids = block_ids.take(max(0, num_own))
    return _Draft(Session(name, start_s, offsets_s), shared_ids, own_ids, num_prompt_tokens, num_output)
