"""The home's side of a return: another worker has computed a prefix that is looked for here; what is lacking of it here
is fetched in the background. A return is a pull that no request waits for: whatever goes wrong, it is dropped."""

from __future__ import annotations

from collections.abc import Callable
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
from engine.kv_cache_manager import KVCacheManager
from engine.scheduler import Scheduler
from protos.types import TransferKind


@dataclass(slots=True, eq=False)
class _Return:
    """Brings block_hashes[first_block:]; those before were here when it was asked for."""

    block_hashes: tuple[bytes, ...]  # of the prefix, from its first block on
    first_block: int
    since: float
    num_granted_to: int | None = None  # the grant ends before this place in block_hashes; None: nothing is granted yet


class ReturnDestination:
    """Invariant: `_open` has the returns that were asked for and have not ended, never more than max_returns. Granted
    blocks are the return's lease until it has arrived or is lost, also when it was given up."""

    def __init__(
        self,
        config: SchedulerConfig,
        scheduler: Scheduler,
        manager: KVCacheManager,
        new_pull_id: Callable[[], bytes] | None,
    ) -> None:
        self._config = config.pulls
        self._scheduler = scheduler
        self._manager = manager
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
        num_held = self._manager.num_cached(hashes)
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
        if one.num_granted_to is not None:
            return []  # repeated
        num_asked = len(one.block_hashes) - one.first_block
        if not 0 < event.num_blocks <= num_asked:
            reason = f"{event.num_blocks} blocks offered, {num_asked} were asked for"
        else:
            hashes = one.block_hashes[: one.first_block + event.num_blocks]
            num_spare_blocks = self._scheduler.num_spoken_for_blocks
            granted = self._manager.grant_prefix(event.transfer_id, hashes, one.first_block, num_spare_blocks)
            if granted is not None:
                one.num_granted_to = len(hashes)
                num_held, block_ids = granted
                return [GrantTransfer(event.transfer_id, num_held - one.first_block, tuple(block_ids))]
            reason = f"no room for {event.num_blocks} blocks that are returned, or those before them are gone"
        del self._open[event.transfer_id]
        return [RefuseTransfer(event.transfer_id, reason)]

    def arrived(self, transfer_id: bytes) -> None:
        """Its blocks were asked for by hash, so they may be found by these hashes from now on."""
        one = self._open[transfer_id]
        if one.num_granted_to is None:
            return  # nothing was granted that could have arrived
        self._manager.cache_leased(transfer_id, one.block_hashes[: one.num_granted_to])
        del self._open[transfer_id]
        self._manager.release_lease(transfer_id)

    def refused(self, transfer_id: bytes) -> None:
        """The source sends nothing. A word that comes after a grant is wrong: what is granted may be written to."""
        if self._open[transfer_id].num_granted_to is None:
            del self._open[transfer_id]

    def lost(self, transfer_id: bytes) -> None:
        """Nothing writes to the granted blocks any more."""
        del self._open[transfer_id]
        self._manager.release_lease(transfer_id)

    def end_all(self, reason: str) -> list[Effect]:
        return [self._give_up(transfer_id, reason) for transfer_id in list(self._open)]

    # --- inside -------------------------------------------------------------------------------------------------------

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
