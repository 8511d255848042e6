"""What is copied from host memory back to the device, and who waits for it: a new request whose prefix goes on in host
memory waits for a load, unless computing it is quicker. Where there is no room for it yet, it is asked again when its
turn has come to be computed.

A load is a pull from oneself. What it brings goes into the prefix cache, and the request then goes on like any other:
whoever needs the memory meanwhile may have it, and what is missing is pulled or recomputed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from engine.config import HostTierConfig, SchedulerConfig
from engine.events import CopyBlocks, CopyDirection
from engine.host_cache import HostCache
from engine.kv_cache_manager import KVCacheManager
from engine.prefill_speed import PrefillSpeed
from engine.request import Request, RequestStatus
from engine.scheduler import Scheduler


@dataclass(slots=True, eq=False)
class _Load:
    """Brings block_hashes[first_block:]; those before are on the device and are leased with them."""

    block_hashes: tuple[bytes, ...]
    first_block: int
    requests: list[Request] = field(default_factory=list)

    @property
    def num_blocks(self) -> int:
        return len(self.block_hashes) - self.first_block


class HostLoads:
    """Invariant: every load in `_loads` leases its blocks in both tiers under its id, until it has been copied or is
    lost, whether or not anybody still waits for it. Every request in `_waiting` stands in `requests` of exactly that
    load, is in no queue of the scheduler and has no blocks."""

    def __init__(
        self,
        config: SchedulerConfig,
        scheduler: Scheduler,
        manager: KVCacheManager,
        host: HostCache,
        speed: PrefillSpeed,
        new_copy_id: Callable[[], bytes],
    ) -> None:
        self._config: HostTierConfig | None = config.host
        self._block_size = config.block_size
        self._scheduler = scheduler
        self._manager = manager
        self._host = host
        self._speed = speed
        self._new_copy_id = new_copy_id
        self._loads: dict[bytes, _Load] = {}
        self._load_by_hash: dict[bytes, _Load] = {}  # of every block that is under way
        self._waiting: dict[Request, _Load] = {}
        self.num_loaded_tokens = 0

    def __contains__(self, request: Request) -> bool:
        return request in self._waiting

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def requests(self) -> list[Request]:
        return list(self._waiting)

    def awaits(self, copy_id: bytes) -> bool:
        return copy_id in self._loads

    def add(self, request: Request, now: float) -> list[CopyBlocks] | None:
        """Wait for a load under way that brings what it lacks, or begin one; None where it need not wait."""
        return self._add(request, now, 0, self._scheduler.num_spoken_for_blocks)

    def add_next(self, now: float) -> list[CopyBlocks]:
        """The same for those whose turn it is in the scheduler's queue: when they came there was no room, or another
        had to go first."""
        copies: list[CopyBlocks] = []
        while self._config is not None and (request := self._scheduler.next_to_start) is not None:
            num_blocks = -(-request.num_tokens // self._block_size)  # all that it needs to start
            begun = self._add(request, now, num_blocks, len(self._scheduler.running))
            if begun is None:
                break
            self._scheduler.withdraw(request)
            copies += begun
        return copies

    def end(self, request: Request) -> None:
        """The request ends here. The load goes on: it takes less time than to give it up."""
        self._waiting.pop(request).requests.remove(request)

    def copied(self, copy_id: bytes) -> list[Request]:
        """Those that waited; they may lack more."""
        load = self._loads[copy_id]
        self._manager.cache_leased(copy_id, load.block_hashes)
        self.num_loaded_tokens += load.num_blocks * self._block_size
        return self._end(copy_id)

    def lost(self, copy_id: bytes) -> list[Request]:
        """What is in the device's blocks now is anything. Those that waited must not ask for the same again."""
        for request in self._loads[copy_id].requests:
            request.has_lost_load = True
        return self._end(copy_id)

    # --- inside -----------------------------------------------------------------------------------------------------

    def _add(self, request: Request, now: float, num_own_blocks: int, num_spare_blocks: int) -> list[CopyBlocks] | None:
        """There must be room for num_own_blocks, those of the load among them, and for num_spare_blocks more."""
        if self._config is None or request.has_lost_load:
            return None
        hashes, num_held = self._manager.prefix(request)
        if num_held == len(hashes):
            return None
        joined = self._load_by_hash.get(hashes[num_held])
        if joined is not None:
            self._wait(request, joined, now)
            return []
        stop = num_held + self._host.num_cached(hashes[num_held:])
        if not self._is_quicker(stop - num_held):
            return None
        load = _Load(hashes[:stop], num_held)
        copy = self._begin(load, num_spare_blocks + max(0, num_own_blocks - stop))
        if copy is None:
            return None
        self._wait(request, load, now)
        return [copy]

    def _is_quicker(self, num_blocks: int) -> bool:
        """Than computing, behind the loads that are under way."""
        assert self._config is not None
        num_blocks_before = sum(load.num_blocks for load in self._loads.values())
        load_s = (num_blocks_before + num_blocks) * self._block_size * self._config.s_per_token
        return load_s < num_blocks * self._block_size * self._speed.s_per_token

    def _begin(self, load: _Load, num_spare_blocks: int) -> CopyBlocks | None:
        """None where the device has no room that nobody who is here needs."""
        copy_id, hashes = self._new_copy_id(), load.block_hashes
        granted = self._manager.grant_prefix(copy_id, hashes, load.first_block, num_spare_blocks)
        if granted is None:
            return None
        num_held, to_write = granted
        assert num_held == load.first_block
        to_read = self._host.lease_cached(copy_id, hashes[num_held:])
        self._loads[copy_id] = load
        for block_hash in hashes[num_held:]:
            self._load_by_hash[block_hash] = load
        return CopyBlocks(copy_id, CopyDirection.TO_DEVICE, tuple(to_read), tuple(to_write))

    def _wait(self, request: Request, load: _Load, now: float) -> None:
        request.status = RequestStatus.WAITING_FOR_REMOTE_KV
        if request.pulling_since is None:
            request.pulling_since = now
        load.requests.append(request)
        self._waiting[request] = load

    def _end(self, copy_id: bytes) -> list[Request]:
        load = self._loads.pop(copy_id)
        for block_hash in load.block_hashes[load.first_block :]:
            if self._load_by_hash.get(block_hash) is load:
                del self._load_by_hash[block_hash]
        self._host.release(copy_id)
        self._manager.release_lease(copy_id)
        for request in load.requests:
            del self._waiting[request]
        return load.requests
