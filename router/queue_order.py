"""In which order the requests queued for one worker are sent to it. Knows what was known of each when it was placed;
not the workers, nor how many may be sent.

In every order a higher priority goes first, and before all of them whoever has waited longer than max_wait_s, oldest
first: that bounds the wait of those that an order would always put off."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Literal, Protocol, assert_never

QueueOrderName = Literal["first_come", "cached_first", "shortest_remaining", "moore_hodgson"]
Key = tuple[float, ...]
MIN_STALE = 16  # a heap is cleaned when more than half of it, and more than these, have left the queue


@dataclass(frozen=True, slots=True)
class Queued:
    """One request in one queue."""

    request_id: str
    since: float  # it has waited since then, here or in other queues
    due_at: float  # its first token is late after that
    num_tokens: int = 0  # to compute
    prefill_s: float = 0.0  # what that takes
    num_cached_tokens: int = 0
    priority: int = 0


Planned = tuple[bool, Queued]  # whether it will be late, by the plan


class QueueOrder(Protocol):
    """Entries have distinct request ids. `start_s`: how long the worker is still busy with what it was sent."""

    @property
    def puts_short_first(self) -> bool:
        """Whether a long one waits for shorter ones that come after it, on the whole."""

    def __len__(self) -> int: ...

    def add(self, entry: Queued) -> None: ...

    def remove(self, request_id: str) -> Queued | None:
        """None where it is not there."""

    def head(self, now: float, start_s: float) -> Queued | None:
        """The one to send next; it stays until it is removed."""

    def in_order(self, now: float, start_s: float) -> list[Queued]:
        """All of them, as they would go if nothing came or changed. O(n log n)."""


class LazyHeap:
    """Entries by a key. Invariant: those of `entries` are all in the heap; others in it count as gone."""

    def __init__(self, key: Callable[[Queued], Key], entries: dict[str, Queued]) -> None:
        self._key = key
        self._entries = entries
        self._heap: list[tuple[Key, str, int, Queued]] = []  # the number: an id may leave and come back
        self._numbers = count()

    def push(self, entry: Queued) -> None:
        if len(self._heap) > 2 * len(self._entries) + MIN_STALE:
            self._heap = [item for item in self._heap if self._is_live(item[-1])]
            heapify(self._heap)
        heappush(self._heap, (self._key(entry), entry.request_id, next(self._numbers), entry))

    def least(self) -> Queued | None:
        while self._heap and not self._is_live(self._heap[0][-1]):
            heappop(self._heap)
        return self._heap[0][-1] if self._heap else None

    def _is_live(self, entry: Queued) -> bool:
        return self._entries.get(entry.request_id) is entry


class KeyedOrder:
    """By a key that stays as it was when the request came. O(log n) for each request that comes and goes."""

    def __init__(self, key: Callable[[Queued], Key], max_wait_s: float) -> None:
        self.puts_short_first = key is _length
        self._max_wait_s = max_wait_s
        self._entries: dict[str, Queued] = {}
        self._key = _after_priority(key)
        self._by_key = LazyHeap(self._key, self._entries)
        self._by_age = LazyHeap(_age, self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entry: Queued) -> None:
        assert entry.request_id not in self._entries, entry
        self._entries[entry.request_id] = entry
        self._by_key.push(entry)
        self._by_age.push(entry)

    def remove(self, request_id: str) -> Queued | None:
        return self._entries.pop(request_id, None)

    def head(self, now: float, start_s: float) -> Queued | None:
        return _overdue(self._by_age, now, self._max_wait_s) or self._by_key.least()

    def in_order(self, now: float, start_s: float) -> list[Queued]:
        late, others = _parted(self._entries.values(), now, self._max_wait_s)
        return late + sorted(others, key=lambda entry: (self._key(entry), entry.request_id))


class MooreHodgson:
    """As many as possible on time (J. M. Moore, 1968): those that can be, in the order in which they are due; then the
    others, shortest first. Each priority is a problem of its own, behind the higher ones.

    One that is late even if it started now can never be on time again, and stays behind in a heap. So the plan, made
    again when the set has changed, is O(m log m) in the m requests that came within the SLO, not in the queue's length.
    Sending the plan's first does not change it: the others start when it ends, as planned."""

    puts_short_first = True  # of those that make the set late it gives up the longest

    def __init__(self, max_wait_s: float) -> None:
        self._max_wait_s = max_wait_s
        self._entries: dict[str, Queued] = {}
        self._hopeful: dict[str, Queued] = {}
        self._hopeless: dict[str, Queued] = {}
        self._shortest = LazyHeap(_after_priority(_length), self._hopeless)
        self._by_age = LazyHeap(_age, self._entries)
        self._plan: list[Planned] | None = []  # the hopeful ones, last first; None: to be made

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entry: Queued) -> None:
        assert entry.request_id not in self._entries, entry
        self._entries[entry.request_id] = self._hopeful[entry.request_id] = entry
        self._by_age.push(entry)
        self._plan = None

    def remove(self, request_id: str) -> Queued | None:
        entry = self._entries.pop(request_id, None)
        self._hopeless.pop(request_id, None)
        if self._hopeful.pop(request_id, None) is not None:
            if self._plan and self._plan[-1][1] is entry:
                self._plan.pop()
            else:
                self._plan = None
        return entry

    def head(self, now: float, start_s: float) -> Queued | None:
        overdue = _overdue(self._by_age, now, self._max_wait_s)
        if overdue is not None:
            return overdue
        if self._plan is None:
            self._give_up(now)
            self._plan = _planned(self._hopeful.values(), now + start_s)[::-1]
        heads = self._plan[-1:]
        shortest = self._shortest.least()
        if shortest is not None:
            heads.append((True, shortest))
        return min(heads, key=_place)[1] if heads else None

    def in_order(self, now: float, start_s: float) -> list[Queued]:
        late, others = _parted(self._entries.values(), now, self._max_wait_s)
        return late + [entry for _, entry in _planned(others, now + start_s)]

    def _give_up(self, now: float) -> None:
        for entry in [e for e in self._hopeful.values() if now + e.prefill_s > e.due_at]:
            self._hopeless[entry.request_id] = self._hopeful.pop(entry.request_id)
            self._shortest.push(entry)


def make_order(name: QueueOrderName, max_wait_s: float) -> QueueOrder:
    match name:
        case "first_come":
            return KeyedOrder(_age, max_wait_s)
        case "cached_first":
            return KeyedOrder(_most_cached, max_wait_s)
        case "shortest_remaining":
            return KeyedOrder(_length, max_wait_s)
        case "moore_hodgson":
            return MooreHodgson(max_wait_s)
    assert_never(name)


def on_time(entries: Iterable[Queued], start_at: float) -> tuple[list[Queued], list[Queued]]:
    """Moore-Hodgson over one worker that is free from start_at on: the largest set that can be on time, as due, and the
    rest, shortest first. Where a request makes the set late, the longest one so far is given up."""
    kept: list[tuple[float, str, Queued]] = []  # longest first
    late: list[Queued] = []
    ends_at = start_at
    for entry in sorted(entries, key=lambda e: (e.due_at, e.since, e.request_id)):
        heappush(kept, (-entry.prefill_s, entry.request_id, entry))
        ends_at += entry.prefill_s
        if ends_at > entry.due_at:
            longest = heappop(kept)[2]
            ends_at -= longest.prefill_s
            late.append(longest)
    chosen = sorted((item[2] for item in kept), key=lambda e: (e.due_at, e.since, e.request_id))
    return chosen, sorted(late, key=_length_then_id)


def _planned(entries: Iterable[Queued], start_at: float) -> list[Planned]:
    """Priority by priority, the highest first."""
    levels: dict[int, list[Queued]] = {}
    for entry in entries:
        levels.setdefault(entry.priority, []).append(entry)
    order: list[Planned] = []
    for priority in sorted(levels, reverse=True):
        chosen, late = on_time(levels[priority], start_at)
        order += [(False, entry) for entry in chosen] + [(True, entry) for entry in late]
        start_at += sum(entry.prefill_s for entry in levels[priority])
    return order


def _place(planned: Planned) -> tuple[int, bool, float, float, str]:
    """Of the heads of two plans: on time before late, and among late ones the shorter."""
    is_late, entry = planned
    return -entry.priority, is_late, *_length_then_id(entry)


def _overdue(by_age: LazyHeap, now: float, max_wait_s: float) -> Queued | None:
    oldest = by_age.least()
    return oldest if oldest is not None and now - oldest.since > max_wait_s else None


def _parted(entries: Iterable[Queued], now: float, max_wait_s: float) -> tuple[list[Queued], list[Queued]]:
    """Those that have waited too long, oldest first, and the others."""
    late: list[Queued] = []
    others: list[Queued] = []
    for entry in entries:
        (late if now - entry.since > max_wait_s else others).append(entry)
    return sorted(late, key=lambda e: (_age(e), e.request_id)), others


def _after_priority(key: Callable[[Queued], Key]) -> Callable[[Queued], Key]:
    return lambda entry: (-entry.priority, *key(entry))


def _age(entry: Queued) -> Key:
    return (entry.since,)


def _most_cached(entry: Queued) -> Key:
    return -entry.num_cached_tokens, entry.since


def _length(entry: Queued) -> Key:
    return entry.prefill_s, entry.since


def _length_then_id(entry: Queued) -> tuple[float, float, str]:
    return entry.prefill_s, entry.since, entry.request_id
