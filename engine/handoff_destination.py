"""The taking side of a handoff or a migration: waits for the KV of an announced request, makes room when the source has
begun, and runs the request when all of it has arrived. Where it is lost, a handoff is computed here; a migration is
dropped, since its source has the request (migration_source.py)."""

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
from protos.types import ServingMode, TransferKind


class HandoffDestination:
    """Invariant: `_awaited` has exactly the requests that wait for a handoff or a migration, by transfer. They have no
    table: granted blocks are the transfer's lease until it has arrived or is lost."""

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
        refusal = self._refusal(request, event.num_blocks)
        if refusal:
            return [RefuseTransfer(event.transfer_id, refusal)]
        return [self._grant(event.transfer_id, request, event.num_blocks)]

    def arrived(self, event: TransferArrived, now: float) -> None:
        """Go on from the KV that came. Its tokens were sent to the router by the source. What has arrived is this
        worker's to answer for, so where it does not fit it is computed, be it a migration."""
        request = self._awaited.get(event.transfer_id)
        if request is None:
            self._manager.release_lease(event.transfer_id)  # ended meanwhile; all is written, so all is quiet
            return
        if not self._manager.is_leasing(event.transfer_id):
            return  # nothing was granted that could have arrived
        del self._awaited[event.transfer_id]
        token_ids = self._new_tokens(request, event)
        if token_ids is None:
            reason = (
                f"the transfer goes on at index {event.first_index} after {len(event.token_ids)} tokens, "
                f"the request at index {request.num_committed_tokens}"
            )
            self._manager.release_lease(event.transfer_id)
            self._recompute(request, reason, now)
            return
        request.token_ids.extend(token_ids)
        request.num_computed_tokens = request.num_tokens - 1
        self._manager.adopt(request, event.transfer_id, self._config.num_blocks_for(request.num_computed_tokens))
        self._manager.release_lease(event.transfer_id)
        self._note_arrival(request, event, now)
        self._manager.cache_full_blocks(request)
        self._scheduler.resume(request)

    def lost(self, event: TransferLost, now: float) -> Request | None:
        """Nothing writes to the granted blocks any more; compute the prompt here, or return the request where it is to
        be dropped."""
        self._manager.release_lease(event.transfer_id)
        request = self._awaited.pop(event.transfer_id, None)
        if request is None or _migrates(request):
            return request
        self._recompute(request, event.reason, now)
        return None

    def _recompute(self, request: Request, reason: str, now: float) -> None:
        request.mode, request.mode_reason = ServingMode.RECOMPUTED, reason
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

    def _refusal(self, request: Request, num_blocks: int) -> str:
        """Why what is offered cannot be taken, whatever room there is. A migration offers more than its request has."""
        num_given = request.num_given_tokens
        least = most = self._config.num_blocks_for(num_given)
        if _migrates(request):
            if len(self._scheduler.running) >= self._config.max_num_seqs:
                return f"{len(self._scheduler.running)} requests run here, the most that may"
            most = self._config.num_blocks_for(self._config.max_model_len)
        return "" if least <= num_blocks <= most else f"{num_blocks} blocks offered, {num_given} tokens have {least}"

    def _grant(self, transfer_id: bytes, request: Request, num_blocks: int) -> GrantTransfer | RefuseTransfer:
        num_spare_blocks = self._scheduler.num_spoken_for_blocks
        # What a migration commits may be as little as the KV of all given tokens but the last.
        max_held_tokens = request.num_given_tokens - _migrates(request)
        granted = self._manager.grant(transfer_id, request, num_blocks, max_held_tokens, num_spare_blocks)
        if granted is None:
            reason = (
                f"{num_blocks} blocks needed, {self._manager.num_available_blocks} of {self._manager.num_blocks} "
                f"available, {num_spare_blocks} of them spoken for"
            )
            return RefuseTransfer(transfer_id, reason)
        num_held_blocks, block_ids = granted
        request.num_held_tokens = min(num_held_blocks * self._config.block_size, request.num_given_tokens)
        return GrantTransfer(transfer_id, num_held_blocks, tuple(block_ids))

    def _new_tokens(self, request: Request, event: TransferArrived) -> tuple[int, ...] | None:
        """What the commit brings beyond the tokens that the request was given; None where the two do not fit."""
        known = request.num_committed_tokens - (event.first_index - len(event.token_ids))
        if not 0 <= known <= len(event.token_ids):
            return None
        new = event.token_ids[known:]
        if not _migrates(request):
            return new if known == 0 and new else None
        given_ids = tuple(request.token_ids[request.num_given_tokens - known :])
        num_blocks = self._config.num_blocks_for(request.num_given_tokens + len(new) - 1)
        return new if event.token_ids[:known] == given_ids and event.num_blocks == num_blocks else None

    def _note_arrival(self, request: Request, event: TransferArrived, now: float) -> None:
        request.first_scheduled_at = now
        request.mode = ServingMode.DISAGGREGATED
        request.num_kv_bytes = event.num_bytes
        request.transfer_s = event.transfer_s
        request.transfer_exposed_s = event.exposed_s


def _migrates(request: Request) -> bool:
    return request.handoff_from is not None and request.handoff_from.kind is TransferKind.MIGRATE
