"""What is copied from the device to host memory, and when: what nobody uses any more, before the device evicts it.

Blocks in use cannot be evicted, so nothing is copied while a request runs; when it ends, what host memory lacks of it
goes there in the background, its last block first, as the device would evict it. Eviction then waits for nothing: where
the copy came too late, a block is lost and computed again."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.config import HostTierConfig
from engine.events import CopyBlocks, CopyDirection
from engine.host_cache import HostCache
from engine.kv_cache_manager import KVCacheManager

# Prefixes that wait for their turn. Where copying is slower than computing, the oldest are given up: the device evicts
# them next.
MAX_WAITING = 256


@dataclass(slots=True, eq=False)
class _Chain:
    """A prefix that is being saved: its blocks [0, num_left) are still to be looked at."""

    hashes: Sequence[bytes]
    num_left: int
    num_saves: int = 0  # under way


@dataclass(frozen=True, slots=True)
class _Save:
    chain: _Chain
    hashes: tuple[bytes, ...]


class HostSaves:
    """Invariant: every save in `_saves` leases its blocks in both tiers under its id, until it has been copied or is
    lost; together they never have more than max_saving_blocks; no hash is in two of them."""

    def __init__(
        self,
        config: HostTierConfig | None,
        manager: KVCacheManager,
        host: HostCache,
        new_copy_id: Callable[[], bytes],
    ) -> None:
        self._max_saving_blocks = 0 if config is None else config.max_saving_blocks
        self._manager = manager
        self._host = host
        self._new_copy_id = new_copy_id
        self._chains: deque[_Chain] = deque(maxlen=MAX_WAITING)
        self._saves: dict[bytes, _Save] = {}
        self._saving: set[bytes] = set()  # hashes

    def awaits(self, copy_id: bytes) -> bool:
        return copy_id in self._saves

    def start(self) -> list[CopyBlocks]:
        """As much as the limit allows of what is out of use, the longest waiting first."""
        for hashes in self._manager.take_unused():
            self._host.refresh(hashes)
            self._chains.append(_Chain(hashes, len(hashes)))
        copies = []
        while self._chains and len(self._saving) < self._max_saving_blocks:
            chain = self._chains[0]
            save = self._next_of(chain)
            if save is not None:
                copies.append(save)
            if not chain.num_left:
                self._chains.popleft()
                self._refresh(chain)
        return copies

    def copied(self, copy_id: bytes) -> None:
        save = self._saves[copy_id]
        self._host.name(copy_id, save.hashes)
        self._end(copy_id)
        self._refresh(save.chain)

    def lost(self, copy_id: bytes) -> None:
        """What is in host memory now is anything."""
        self._end(copy_id)

    # --- inside -----------------------------------------------------------------------------------------------------

    def _next_of(self, chain: _Chain) -> CopyBlocks | None:
        """The last blocks of those left that are lacking there and still here, in the order of the prefix."""
        hashes = self._take_lacking(chain, self._max_saving_blocks - len(self._saving))
        copy_id = self._new_copy_id()
        to_write = self._host.lease_new(copy_id, len(hashes)) if hashes else []
        if not to_write:
            return None
        hashes = hashes[: len(to_write)]
        to_read = self._manager.lease_found(copy_id, hashes)
        chain.num_saves += 1
        self._saves[copy_id] = _Save(chain, hashes)
        self._saving.update(hashes)
        return CopyBlocks(copy_id, CopyDirection.TO_HOST, tuple(to_read), tuple(to_write))

    def _take_lacking(self, chain: _Chain, max_blocks: int) -> tuple[bytes, ...]:
        lacking: list[bytes] = []
        while chain.num_left and len(lacking) < max_blocks:
            chain.num_left -= 1
            each = chain.hashes[chain.num_left]
            if each not in self._host and each not in self._saving and each in self._manager:
                lacking.append(each)
        return tuple(reversed(lacking))

    def _refresh(self, chain: _Chain) -> None:
        """When all of it is there: its parts came in another order than they are to be evicted in."""
        if not chain.num_left and not chain.num_saves:
            self._host.refresh(chain.hashes)

    def _end(self, copy_id: bytes) -> None:
        save = self._saves.pop(copy_id)
        save.chain.num_saves -= 1
        self._saving.difference_update(save.hashes)
        self._host.release(copy_id)
        self._manager.release_lease(copy_id)
