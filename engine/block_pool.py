"""Which KV blocks are in use, which are cached, which are free. Ids only: who uses them is known to KVCacheManager, the
tensors live in paged_kv_cache.py."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class BlockPool:
    """Invariant: a block with ref_cnt 0 is either free or cached (it has a hash), a block with ref_cnt > 0 is neither.

    A block in use may have a hash too: then others can acquire it. At most one block has a given hash."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        self.num_blocks = num_blocks
        self.ref_cnt = [0] * num_blocks
        self.free: list[int] = list(range(num_blocks))
        self.cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._block_hash: dict[int, bytes] = {}
        self._block_by_hash: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self.free)

    @property
    def num_available(self) -> int:
        """Free blocks and those that can be made free."""
        return len(self.free) + len(self.cached)

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Take num_blocks blocks, evicting the least recently used cached ones where free ones are short; or None (and
        no change) where they are not there."""
        if num_blocks > self.num_available:
            return None
        while len(self.free) < num_blocks:
            self._evict_one()
        taken = [self.free.pop() for _ in range(num_blocks)]
        for block_id in taken:
            self.ref_cnt[block_id] = 1
        return taken

    def acquire(self, block_ids: Sequence[int]) -> None:
        """One more use of blocks that are cached or in use."""
        for block_id in block_ids:
            if self.ref_cnt[block_id] == 0:
                del self.cached[block_id]
            self.ref_cnt[block_id] += 1

    def release(self, block_ids: Sequence[int]) -> None:
        """One use less. Last block first, so that of an unused chain the tail is evicted before what it hangs on."""
        for block_id in reversed(block_ids):
            assert self.ref_cnt[block_id] > 0, block_id
            self.ref_cnt[block_id] -= 1
            if self.ref_cnt[block_id] > 0:
                continue
            if block_id in self._block_hash:
                self.cached[block_id] = None
            else:
                self.free.append(block_id)

    def demote(self, block_ids: Sequence[int]) -> None:
        """Evict these next, last block first, as far as they are not in use."""
        for block_id in block_ids:
            if block_id in self.cached:
                self.cached.move_to_end(block_id, last=False)

    def refresh(self, block_ids: Sequence[int]) -> None:
        """Evict these after all others, first block first, as far as they are not in use."""
        for block_id in block_ids:
            if block_id in self.cached:
                self.cached.move_to_end(block_id)

    def name(self, block_id: int, block_hash: bytes) -> None:
        """From now on the block is found by its hash. Where another block has it already, that one stays the one."""
        assert self.ref_cnt[block_id] > 0, block_id
        if block_hash not in self._block_by_hash:
            assert block_id not in self._block_hash, block_id
            self._block_by_hash[block_hash] = block_id
            self._block_hash[block_id] = block_hash

    def find(self, block_hash: bytes) -> int | None:
        return self._block_by_hash.get(block_hash)

    def _evict_one(self) -> None:
        block_id, _ = self.cached.popitem(last=False)
        del self._block_by_hash[self._block_hash.pop(block_id)]
        self.free.append(block_id)
