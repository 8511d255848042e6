"""Workers kept in the order in which a policy prefers them, so that to choose one costs the same among two and among
thousands. Knows the order only from the key it is given."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
Key = tuple[int, int, str]  # ends in the worker's id: no two are equal


class Ranking(Generic[T]):
    """Invariant: `_keys` is sorted, and `members[i]` had the key `_keys[i]` when it was last put."""

    def __init__(self, key: Callable[[T], Key]) -> None:
        self.members: list[T] = []  # most preferred first
        self._key = key
        self._keys: list[Key] = []
        self._key_of: dict[str, Key] = {}

    def put(self, worker_id: str, member: T) -> None:
        """Where its key now belongs, whether it is new or has moved."""
        key = self._key(member)
        if self._key_of.get(worker_id) == key:
            return
        self.remove(worker_id)
        place = bisect_left(self._keys, key)
        self._keys.insert(place, key)
        self.members.insert(place, member)
        self._key_of[worker_id] = key

    def remove(self, worker_id: str) -> None:
        key = self._key_of.pop(worker_id, None)
        if key is not None:
            place = bisect_left(self._keys, key)
            del self._keys[place], self.members[place]
