"""Which blocks of host memory hold which part of a prefix: the second tier of the prefix cache. Ids and hashes only;
what is copied when is decided by host_saves.py and host_loads.py.

A block may be in both tiers: what is loaded to the device stays here too, so that the device can evict it again without
a copy. That costs this tier what the device holds of it: a tenth, where it is ten times as large."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain

from engine.block_pool import BlockPool
from engine.config import HostTierConfig


class HostCache:
    """Invariant: ref_cnt of a block = how often it stands in the leases; every other block is free or cached."""

    def __init__(self, config: HostTierConfig | None) -> None:
        """None: a tier without blocks, in which nothing is found."""
        self._pool = None if config is None else BlockPool(config.num_blocks)
        self._leases: dict[bytes, list[int]] = {}

    @property
    def num_blocks(self) -> int:
        return 0 if self._pool is None else self._pool.num_blocks

    def __contains__(self, block_hash: bytes) -> bool:
        return self._pool is not None and self._pool.find(block_hash) is not None

    def num_cached(self, hashes: Sequence[bytes]) -> int:
        """How many of these blocks are here, from the first on."""
        return next((place for place, each in enumerate(hashes) if each not in self), len(hashes))

    def lease_cached(self, lease_id: bytes, hashes: Sequence[bytes]) -> list[int]:
        """Keep the first of these blocks, as far as they are here without a gap, until release; empty (and no lease)
        where none is."""
        assert lease_id not in self._leases
        if self._pool is None:
            return []
        found: list[int] = []
        for block_hash in hashes:
            block_id = self._pool.find(block_hash)
            if block_id is None:
                break
            found.append(block_id)
        if found:
            self._pool.acquire(found)
            self._leases[lease_id] = found
        return found

    def lease_new(self, lease_id: bytes, num_blocks: int) -> list[int]:
        """Blocks to write to, evicting the least recently used; fewer where all others are leased."""
        assert self._pool is not None and lease_id not in self._leases
        taken = self._pool.allocate(min(num_blocks, self._pool.num_available))
        assert taken is not None
        if taken:
            self._leases[lease_id] = taken
        return taken

    def name(self, lease_id: bytes, hashes: Sequence[bytes]) -> None:
        """The blocks from lease_new hold what these hashes say: from now on they are found."""
        assert self._pool is not None
        for block_id, block_hash in zip(self._leases[lease_id], hashes, strict=True):
            self._pool.name(block_id, block_hash)

    def release(self, lease_id: bytes) -> None:
        """Its blocks are quiet. Nothing happens where it leases none."""
        if lease_id in self._leases:
            assert self._pool is not None
            self._pool.release(self._leases.pop(lease_id))

    def refresh(self, hashes: Sequence[bytes]) -> None:
        """This prefix has just been used: evict its blocks after all others, the last one first."""
        assert self._pool is not None
        found = (self._pool.find(each) for each in reversed(hashes))
        self._pool.refresh([block_id for block_id in found if block_id is not None])

    # --- ledger -----------------------------------------------------------------------------------------------------

    @property
    def num_cached_blocks(self) -> int:
        return 0 if self._pool is None else len(self._pool.cached)

    @property
    def num_leased_blocks(self) -> int:
        return len(set(chain.from_iterable(self._leases.values())))

    @property
    def is_balanced(self) -> bool:
        """Every block is free, cached or leased, none of them twice, and ref_cnt is what the leases show.

        There may be a hundred thousand blocks, and this is asked several times a second: no loop of ours over all."""
        if self._pool is None:
            return not self._leases
        uses = Counter(chain.from_iterable(self._leases.values()))
        free, cached, ref_cnt = set(self._pool.free), self._pool.cached.keys(), self._pool.ref_cnt
        return (
            len(self._pool.free) + len(cached) + len(uses) == self.num_blocks
            and len(free) == len(self._pool.free)
            and cached.isdisjoint(free)
            and uses.keys().isdisjoint(free)
            and uses.keys().isdisjoint(cached)
            and len(ref_cnt) - ref_cnt.count(0) == len(uses)
            and all(ref_cnt[block_id] == count for block_id, count in uses.items())
        )
