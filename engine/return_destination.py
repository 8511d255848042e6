"""The home's side of a return: another worker has computed a prefix that is looked for here; what is lacking of it here
is fetched in the background. A return is a pull that no request waits for: whatever goes wrong, it is dropped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.config import SchedulerConfig
from engine.events import (
    AbortTransfer,
    Effect,
    GrantTransfer,
    RefuseTransfer,
    RequestPull,
    ReturnOffered,
    TransferOffered,
)
from engine.host_cache import HostCache
from engine.kv_cache_manager import KVCacheManager
from engine.scheduler import Scheduler
from protos.types import TransferKind


@dataclass(slots=True, eq=False)
class _Return:
    """Brings block_hashes[first_block:]; those before were here, in one memory or the other, when it was asked for."""

    block_hashes: tuple[bytes, ...]  # of the prefix, from its first block on
    first_block: int
    since: float
    leased: range | None = None  # places in block_hashes that the grant covers; None: nothing is granted yet


class ReturnDestination:
    """Invariant: `_open` has the returns that were asked for and have not ended, never more than max_returns. Granted
    blocks are the return's lease until it has arrived or is lost, also when it was given up."""

    def __init__(
        self,
        config: SchedulerConfig,
        scheduler: Scheduler,
        manager: KVCacheManager,
        host: HostCache,
        new_pull_id: Callable[[], bytes] | None,
    ) -> None:
        self._config = config.pulls
        self._scheduler = scheduler
        self._manager = manager
        self._host = host
        self._new_pull_id = new_pull_id
        self._open: dict[bytes, _Return] = {}

    def awaits(self, transfer_id: bytes) -> bool:
        return transfer_id in self._open

    def announced(self, event: ReturnOffered, now: float) -> list[Effect]:
        """Ask for what is lacking here, unless enough returns are open, or one of them ends with the same block."""
        if self._config is None or not self._config.max_returns:
            return []
        effects = self._give_up_late(now)
        hashes = event.block_hashes
        num_held = self._num_held(hashes)
        is_coming = any(hashes[-1:] == each.block_hashes[-1:] for each in self._open.values())
        if num_held == len(hashes) or is_coming or len(self._open) >= self._config.max_returns:
            return effects
        assert self._new_pull_id is not None
        pull_id = self._new_pull_id()
        self._open[pull_id] = _Return(hashes, num_held, now)
        asked = hashes[num_held:]
        source = event.source_worker_id
        return [*effects, RequestPull(pull_id, source, event.request_id, event.attempt, asked, TransferKind.RETURN)]

    # --- for ids that `awaits` knows ----------------------------------------------------------------------------------

    def offered(self, event: TransferOffered) -> list[Effect]:
        """Take it into free and evictable blocks that nobody who is here needs, or not at all."""
        one = self._open[event.transfer_id]
        if one.leased is not None:
            return []  # repeated
        num_asked = len(one.block_hashes) - one.first_block
        if not 0 < event.num_blocks <= num_asked:
            reason = f"{event.num_blocks} blocks offered, {num_asked} were asked for"
        else:
            granted = self._grant(event.transfer_id, one, event.num_blocks)
            if granted is not None:
                return [granted]
            reason = f"no room for {event.num_blocks} blocks that are returned, or those before them are gone"
        del self._open[event.transfer_id]
        return [RefuseTransfer(event.transfer_id, reason)]

    def arrived(self, transfer_id: bytes) -> None:
        """Its blocks were asked for by hash, so they may be found by these hashes from now on."""
        one = self._open[transfer_id]
        if one.leased is None:
            return  # nothing was granted that could have arrived
        self._manager.cache_leased(transfer_id, one.block_hashes[one.leased.start : one.leased.stop])
        del self._open[transfer_id]
        self._manager.release_lease(transfer_id)
        self._manager.note_unused(one.block_hashes[: one.leased.stop])

    def refused(self, transfer_id: bytes) -> None:
        """The source sends nothing. A word that comes after a grant is wrong: what is granted may be written to."""
        if self._open[transfer_id].leased is None:
            del self._open[transfer_id]

    def lost(self, transfer_id: bytes) -> None:
        """Nothing writes to the granted blocks any more."""
        del self._open[transfer_id]
        self._manager.release_lease(transfer_id)

    def end_all(self, reason: str) -> list[Effect]:
        return [self._give_up(transfer_id, reason) for transfer_id in list(self._open)]

    # --- inside -------------------------------------------------------------------------------------------------------

    def _num_held(self, hashes: Sequence[bytes]) -> int:
        """How many of these blocks are here, in one memory or the other: from the first on the device, then in host
        memory, then on the device again."""
        num_held = self._manager.num_cached(hashes)
        num_held += self._host.num_cached(hashes[num_held:])
        return num_held + self._manager.num_cached(hashes[num_held:])

    def _grant(self, transfer_id: bytes, one: _Return, num_blocks: int) -> GrantTransfer | None:
        """None where there is no room, or those before its blocks are gone. Those before are leased with its own as
        long as they are on the device; where they are in host memory, its own may stand alone there."""
        before, stop = one.block_hashes[: one.first_block], one.first_block + num_blocks
        if self._num_held(before) < len(before):
            return None
        start = 0 if self._manager.num_cached(before) == len(before) else one.first_block
        num_spare_blocks = self._scheduler.num_spoken_for_blocks
        granted = self._manager.grant_prefix(
            transfer_id, one.block_hashes[start:stop], one.first_block - start, num_spare_blocks
        )
        if granted is None:
            return None
        num_held, block_ids = granted
        one.leased = range(start, stop)
        return GrantTransfer(transfer_id, start + num_held - one.first_block, tuple(block_ids))

    def _give_up_late(self, now: float) -> list[Effect]:
        """Nobody waits for a late one, but it takes the place of another."""
        assert self._config is not None
        latest = now - self._config.deadline_s
        late = [transfer_id for transfer_id, each in self._open.items() if each.since <= latest]
        return [self._give_up(transfer_id, "late") for transfer_id in late]

    def _give_up(self, transfer_id: bytes, reason: str) -> Effect:
        """TransferLost or TransferArrived releases the lease."""
        del self._open[transfer_id]
        return AbortTransfer(transfer_id, reason)
