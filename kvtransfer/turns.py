"""Whose chunk goes next where several transfers wait for one link's staging slots. Pure; knows no slot by number."""

from __future__ import annotations

from collections import Counter, deque
from typing import Generic, Protocol, TypeVar


class Waiting(Protocol):
    @property
    def transfer_id(self) -> bytes: ...

    @property
    def urgency(self) -> int:
        """Less is more; the same for all chunks of a transfer."""


Chunk = TypeVar("Chunk", bound=Waiting)


class Turns(Generic[Chunk]):
    """The most urgent transfers go first, and take turns: of them next is the one that has the fewest slots, then the
    one whose turn was the longest ago. So a long transfer delays a short one by the chunks that have slots, however
    long it is. Invariant: `_queues` has the transfers that wait, none of them empty; `_num_held` the chunks between
    `take` and `give_back`."""

    def __init__(self) -> None:
        self._queues: dict[bytes, deque[Chunk]] = {}  # longest without a turn first
        self._num_held: Counter[bytes] = Counter()

    def wait(self, chunk: Chunk) -> None:
        self._queues.setdefault(chunk.transfer_id, deque()).append(chunk)

    def take(self, num_free: int, num_kept: int = 1) -> Chunk | None:
        """For one of num_free slots; the last num_kept wait for a transfer that has none, where its turn has come."""
        if not self._queues or not num_free:
            return None
        next_id = min(self._queues, key=lambda each: (self._queues[each][0].urgency, self._num_held[each]))
        if num_free <= num_kept and self._num_held[next_id]:
            return None
        queue = self._queues.pop(next_id)
        chunk = queue.popleft()
        if queue:
            self._queues[next_id] = queue
        self._num_held[next_id] += 1
        return chunk

    def give_back(self, chunk: Chunk) -> None:
        self._num_held[chunk.transfer_id] -= 1
        if not self._num_held[chunk.transfer_id]:
            del self._num_held[chunk.transfer_id]

    def drop(self, transfer_id: bytes) -> list[Chunk]:
        """Those that wait; who has a slot gives it back by itself."""
        return list(self._queues.pop(transfer_id, ()))
