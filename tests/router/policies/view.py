"""A view made of plain numbers, over real rings, that records what it was asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import inf
from typing import overload

from router.hash_ring import RingPair
from router.policy import Candidate, Choice
from router.sampling import Sampler

BLOCK = 16
PREFILL_S_PER_TOKEN = 0.001


@dataclass(frozen=True)
class Load:
    """Of one worker, in tokens."""

    num_pending_tokens: int = 0
    num_cached_tokens: int = 0
    num_held_blocks: int = 0


@cache
def rings_of(worker_ids: frozenset[str]) -> RingPair:
    """Not to be changed: views with equal workers share them."""
    rings = RingPair(seed=0, num_virtual_nodes=4)
    for worker_id in worker_ids:
        rings.add(worker_id)
    return rings


class CountedIds(Sequence[str]):
    """Counts the ids that are read, not the question how many there are."""

    def __init__(self, worker_ids: Sequence[str], asked: Counter[str]) -> None:
        self._worker_ids = worker_ids
        self._asked = asked

    def __len__(self) -> int:
        return len(self._worker_ids)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...

    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        found = self._worker_ids[index]
        self._asked["worker_id"] += 1 if isinstance(found, str) else len(found)
        return found


class FakeView:
    """Invariant: `asked` counts the calls that a policy made, by name."""

    def __init__(
        self,
        loads: Mapping[str, Load],
        num_tokens: int = 100,
        prefix: str = "prompt",
        pull_s_per_token: float = inf,
        seed: int = 0,
        earlier_homes: Sequence[str] = (),
        prefill_s_per_token: float = PREFILL_S_PER_TOKEN,
        last_place: str | None = None,
        regret: float = 1.0,
    ) -> None:
        self.num_tokens = num_tokens
        self.links: Sequence[bytes] = tuple(f"{prefix}/{index}".encode() for index in range(num_tokens // BLOCK))
        self.asked: Counter[str] = Counter()
        self._loads = dict(sorted(loads.items()))
        self._pull_s_per_token = pull_s_per_token
        self._sampler = Sampler(seed)
        self._earlier_homes = earlier_homes
        self._last_place = last_place
        self._regret = regret
        self._prefill_s_per_token = prefill_s_per_token
        self._rings = rings_of(frozenset(loads))

    @property
    def home(self) -> tuple[str, ...]:
        """The same as home_pair(), for a test to look at."""
        return self._rings.candidates(self.links[0]) if self.links else ()

    def worker_ids(self) -> Sequence[str]:
        return CountedIds(list(self._loads), self.asked)

    def candidate(self, worker_id: str) -> Candidate:
        self.asked["candidate"] += 1
        load = self._loads[worker_id]
        return Candidate(
            worker_id,
            num_cached_tokens=load.num_cached_tokens,
            num_pending_tokens=load.num_pending_tokens,
            backlog_s=self.backlog_s(worker_id, self._prefill_s(load.num_cached_tokens)),
            prefill_s=self._prefill_s(load.num_cached_tokens),
            num_blocks=100,
            num_free_blocks=100 - load.num_held_blocks,
        )

    def lightest(self) -> str:
        self.asked["lightest"] += 1
        return min(self._loads, key=lambda worker_id: (self._loads[worker_id].num_pending_tokens, worker_id))

    def num_pending_tokens(self) -> int:
        return sum(load.num_pending_tokens for load in self._loads.values())

    def sample(self, num: int) -> Sequence[str]:
        self.asked["sample"] += 1
        return self._sampler.sample(list(self._loads), num)

    def home_key(self) -> bytes | None:
        return self.links[0] if self.links else None

    def home_pair(self) -> tuple[str, ...]:
        self.asked["home_pair"] += 1
        return self.home

    def earlier_homes(self) -> Sequence[str]:
        self.asked["earlier_homes"] += 1
        return self._earlier_homes

    def last_place(self) -> str | None:
        self.asked["last_place"] += 1
        return self._last_place

    def ring(self, key: bytes) -> Iterator[str]:
        for worker_id in self._rings.rings[0].walk(key):
            self.asked["ring"] += 1
            yield worker_id

    def eviction_regret(self) -> float:
        return self._regret

    def backlog_s(self, worker_id: str, prefill_s: float) -> float:
        return self._loads[worker_id].num_pending_tokens * self._prefill_s_per_token

    def prefill_s(self, worker_id: str, num_cached_tokens: int) -> float:
        assert worker_id in self._loads
        return self._prefill_s(num_cached_tokens)

    def pull_s(self, worker_id: str, num_tokens: int) -> float:
        return num_tokens * self._pull_s_per_token if num_tokens else 0.0

    def _prefill_s(self, num_cached_tokens: int) -> float:
        return (self.num_tokens - num_cached_tokens) * self._prefill_s_per_token


def away(view: FakeView, choice: Choice) -> bool:
    return choice.worker_id not in view.home
