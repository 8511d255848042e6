"""The giving side of pulls and returns: leases the blocks that another worker asks for and sends them, as far as they
are in the prefix cache, be it on the device or in host memory: nothing is loaded for it. Knows no requests of its own:
a prefix is named by its hashes."""

from __future__ import annotations

from engine.config import SchedulerConfig
from engine.events import AbortTransfer, CommitTransfer, Effect, OpenTransfer, PullRequested, RefusePull, SendBlocks
from engine.host_cache import HostCache
from engine.kv_cache_manager import KVCacheManager
from protos.types import Handoff, TransferKind


class PullSource:
    """Invariant: `_served` has the pulls and returns whose blocks are leased, from their offer until it is refused or
    closed; never more than max_served of the ones and max_returns of the others."""

    def __init__(self, config: SchedulerConfig, manager: KVCacheManager, host: HostCache) -> None:
        self._config = config
        self._manager = manager
        self._host = host
        self._served: dict[bytes, TransferKind] = {}

    def requested(self, event: PullRequested) -> list[Effect]:
        """Offer, send and commit at once: everything there is to send has been computed."""
        pull_id = event.pull_id
        if pull_id in self._served or self._manager.is_leasing(pull_id):
            return []  # repeated
        refusal = self._refusal(event.kind)
        block_ids = [] if refusal else self._lease(pull_id, event.block_hashes)
        if not block_ids:
            return [RefusePull(pull_id, event.destination, refusal or "the first block asked for is not here")]
        self._served[pull_id] = event.kind
        handoff = Handoff(pull_id, event.destination)
        return [
            OpenTransfer(handoff, event.request_id, event.attempt, len(block_ids), event.kind),
            SendBlocks(pull_id, 0, tuple(block_ids)),
            CommitTransfer(pull_id, 0, ()),
        ]

    def ended(self, transfer_id: bytes) -> bool:
        """Nothing reads its blocks any more. False where it is none that is served here."""
        if transfer_id not in self._served:
            return False
        if self._served.pop(transfer_id) is TransferKind.RETURN:
            self._manager.release_copies(transfer_id)
        else:
            self._manager.release_lease(transfer_id)
        self._host.release(transfer_id)
        return True

    def end_all(self, reason: str) -> list[Effect]:
        """The blocks stay leased until each transfer is closed."""
        return [AbortTransfer(pull_id, reason) for pull_id in sorted(self._served)]

    def _lease(self, pull_id: bytes, hashes: tuple[bytes, ...]) -> list[int]:
        """Those on the device, and behind them those in host memory, numbered after all of the device's."""
        on_device = self._manager.lease_cached(pull_id, hashes)
        in_host = self._host.lease_cached(pull_id, hashes[len(on_device) :])
        return [*on_device, *(self._manager.num_blocks + block_id for block_id in in_host)]

    def _refusal(self, kind: TransferKind) -> str:
        if self._config.pulls is None:
            return "pulls are off here"
        name = "max_returns" if kind is TransferKind.RETURN else "max_served"
        num_served, limit = list(self._served.values()).count(kind), getattr(self._config.pulls, name)
        return f"{num_served} {kind}s are served already, {name} is {limit}" if num_served >= limit else ""
