"""The taking side of a handoff: waits for the KV of an announced request, makes room when the source has begun, and
runs the request when all of it has arrived, or computes it here when it is lost."""

from __future__ import annotations

from engine.config import SchedulerConfig
from engine.events import (
    AbortTransfer,
    Effect,
    ExpectTransfer,
    GrantTransfer,
    RefuseTransfer,
    TransferArrived,
    TransferLost,
    TransferOffered,
)
from engine.kv_cache_manager import KVCacheManager
from engine.request import Request, RequestStatus
from engine.scheduler import Scheduler
from protos.types import ServingMode


class HandoffDestination:
    """Invariant: `_awaited` has exactly the requests that wait for a handoff, by transfer. They have no table: granted
    blocks are the transfer's lease until it has arrived or is lost."""

    def __init__(self, config: SchedulerConfig, scheduler: Scheduler, manager: KVCacheManager) -> None:
        self._config = config
        self._scheduler = scheduler
        self._manager = manager
        self._awaited: dict[bytes, Request] = {}

    def __len__(self) -> int:
        return len(self._awaited)

    def expect(self, request: Request) -> list[Effect]:
        assert request.handoff_from is not None
        request.status = RequestStatus.WAITING_FOR_REMOTE_KV
        self._awaited[request.handoff_from.transfer_id] = request
        return [ExpectTransfer(request.handoff_from, request.request_id, request.attempt)]

    def offered(self, event: TransferOffered, request: Request | None) -> list[Effect]:
        """Grant room for the whole prompt, or refuse with the numbers. `request` is this life of event.request_id."""
        if (
            request is None
            or request.attempt != event.attempt
            or request.handoff_from is None
            or request.handoff_from.transfer_id != event.transfer_id
        ):
            reason = f"request {event.request_id} attempt {event.attempt} does not await this transfer here"
            return [RefuseTransfer(event.transfer_id, reason)]
        if event.transfer_id not in self._awaited or self._manager.is_leasing(event.transfer_id):
            return []  # late or repeated
        num_blocks = self._config.num_blocks_for(request.num_given_tokens)
        if event.num_blocks != num_blocks:
            reason = f"{event.num_blocks} blocks offered, {request.num_given_tokens} tokens have {num_blocks}"
            return [RefuseTransfer(event.transfer_id, reason)]
        return [self._grant(event.transfer_id, request, num_blocks)]

    def arrived(self, event: TransferArrived, now: float) -> None:
        """Go on from the KV that came. Its tokens were sent to the router by the source."""
        request = self._awaited.get(event.transfer_id)
        if request is None:
            self._manager.release_lease(event.transfer_id)  # ended meanwhile; all is written, so all is quiet
            return
        if not self._manager.is_leasing(event.transfer_id):
            return  # nothing was granted that could have arrived
        if not event.token_ids or event.first_index != request.num_committed_tokens + len(event.token_ids):
            reason = (
                f"the transfer goes on at index {event.first_index} after {len(event.token_ids)} tokens, "
                f"the request at index {request.num_committed_tokens}"
            )
            self.lost(TransferLost(event.transfer_id, reason), now)
            return
        del self._awaited[event.transfer_id]
        self._manager.adopt(request, event.transfer_id)
        self._manager.release_lease(event.transfer_id)
        self._note_arrival(request, event, now)
        self._manager.cache_full_blocks(request)
        self._scheduler.resume(request)

    def lost(self, event: TransferLost, now: float) -> None:
        """Nothing writes to the granted blocks any more; compute the prompt here."""
        self._manager.release_lease(event.transfer_id)
        request = self._awaited.pop(event.transfer_id, None)
        if request is None:
            return
        request.mode, request.mode_reason = ServingMode.RECOMPUTED, event.reason
        request.num_held_tokens = 0
        request.queued_at = now
        self._scheduler.add(request)

    def end(self, request: Request, reason: str) -> list[Effect]:
        """The request ends here. Granted blocks stay leased until the transfer is lost."""
        if request.status is not RequestStatus.WAITING_FOR_REMOTE_KV:
            return []
        assert request.handoff_from is not None
        del self._awaited[request.handoff_from.transfer_id]
        return [AbortTransfer(request.handoff_from.transfer_id, reason)]

    def _grant(self, transfer_id: bytes, request: Request, num_blocks: int) -> GrantTransfer | RefuseTransfer:
        num_spare_blocks = self._scheduler.num_spoken_for_blocks
        granted = self._manager.grant(transfer_id, request, num_spare_blocks)
        if granted is None:
            reason = (
                f"{num_blocks} blocks needed, {self._manager.num_available_blocks} of {self._manager.num_blocks} "
                f"available, {num_spare_blocks} of them spoken for"
            )
            return RefuseTransfer(transfer_id, reason)
        num_held_blocks, block_ids = granted
        request.num_held_tokens = min(num_held_blocks * self._config.block_size, request.num_given_tokens)
        return GrantTransfer(transfer_id, num_held_blocks, tuple(block_ids))

    def _note_arrival(self, request: Request, event: TransferArrived, now: float) -> None:
        request.num_computed_tokens = request.num_given_tokens
        request.token_ids.extend(event.token_ids)
        request.first_scheduled_at = now
        request.mode = ServingMode.DISAGGREGATED
        request.num_kv_bytes = event.num_bytes
        request.transfer_s = event.transfer_s
        request.transfer_exposed_s = event.exposed_s
