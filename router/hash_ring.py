"""Which two workers a prefix calls home: two consistent-hash rings with independent hashes (DualMap, ICLR 2026,
section 4). Knows ids and keys only; not who is alive, loaded or warm."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence, Set
from hashlib import blake2b

RING_SIZE = 2**64  # points are in [0, RING_SIZE)


class HashRing:
    """Every worker stands at num_virtual_nodes points of a circle; a key belongs to the next point clockwise.

    Invariant: the points depend on the set of workers only, not on the order in which they came and went."""

    def __init__(self, seed: int, num_virtual_nodes: int) -> None:
        self._hash_key = seed.to_bytes(8, "little", signed=True)
        self._num_virtual_nodes = num_virtual_nodes
        self._points: list[tuple[int, str]] = []  # sorted

    @property
    def points(self) -> Sequence[tuple[int, str]]:
        """In ascending order, each with its owner: the keys after the point before it, up to it, are the owner's."""
        return self._points

    def add(self, worker_id: str) -> None:
        for point in self._points_of(worker_id):
            insort(self._points, (point, worker_id))

    def remove(self, worker_id: str) -> None:
        self._points = [entry for entry in self._points if entry[1] != worker_id]

    def walk(self, key: bytes) -> Iterator[str]:
        """Owners of the points from the key's place clockwise, once around; a worker appears once per point."""
        start = bisect_left(self._points, (self._hash(b"key", key), ""))
        for offset in range(len(self._points)):
            yield self._points[(start + offset) % len(self._points)][1]

    def _points_of(self, worker_id: str) -> Iterator[int]:
        for node in range(self._num_virtual_nodes):
            yield self._hash(b"node", node.to_bytes(4, "little") + worker_id.encode())

    def _hash(self, kind: bytes, data: bytes) -> int:
        digest = blake2b(data, key=self._hash_key, person=kind, digest_size=8).digest()
        return int.from_bytes(digest, "little")


class RingPair:
    """Two rings over the same workers. Two routers with equal members and settings name equal candidates."""

    def __init__(self, seed: int, num_virtual_nodes: int) -> None:
        self._first = HashRing(2 * seed, num_virtual_nodes)
        self._second = HashRing(2 * seed + 1, num_virtual_nodes)
        self._members: set[str] = set()

    @property
    def rings(self) -> tuple[HashRing, HashRing]:
        return self._first, self._second

    @property
    def members(self) -> Set[str]:
        return self._members

    def add(self, worker_id: str) -> None:
        if worker_id not in self._members:
            self._members.add(worker_id)
            self._first.add(worker_id)
            self._second.add(worker_id)

    def remove(self, worker_id: str) -> None:
        self._members.discard(worker_id)
        self._first.remove(worker_id)
        self._second.remove(worker_id)

    def candidates(self, key: bytes) -> tuple[str, ...]:
        """Two distinct workers; one where only one is there; none where there is none."""
        first = next(self._first.walk(key), None)
        if first is None:
            return ()
        # Where both rings name the same worker, the next distinct one on the second ring stands in.
        second = next((worker_id for worker_id in self._second.walk(key) if worker_id != first), None)
        return (first,) if second is None else (first, second)
