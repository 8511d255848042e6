"""The giving side of a handoff: opens the transfer when a prefill starts, sends blocks as they are computed, commits
with the first sampled token. Which blocks are quiet, the transfer says (TransferClosed); where to go instead, the
router (Retarget)."""

from __future__ import annotations

from engine.config import SchedulerConfig
from engine.events import AbortTransfer, CommitTransfer, Effect, OpenTransfer, SendBlocks
from engine.kv_cache_manager import KVCacheManager
from engine.request import Request, RequestStatus
from engine.scheduler import Scheduler
from protos.types import Handoff


class HandoffSource:
    """Invariant: `_requests` has a request under its open_transfer_id, and under nothing else. Blocks given to
    SendBlocks stay leased until the transfer is closed or refused, also when their request has long ended."""

    def __init__(self, config: SchedulerConfig, scheduler: Scheduler, manager: KVCacheManager) -> None:
        self._config = config
        self._scheduler = scheduler
        self._manager = manager
        self._requests: dict[bytes, Request] = {}

    def open(self, request: Request) -> list[Effect]:
        assert request.handoff_to is not None and request.open_transfer_id is None
        transfer_id = request.handoff_to.transfer_id
        self._requests[transfer_id] = request
        request.open_transfer_id = transfer_id
        request.opened_transfer_ids.add(transfer_id)
        request.num_sent_blocks = 0
        num_blocks = self._config.num_blocks_for(request.num_given_tokens)
        return [OpenTransfer(request.handoff_to, request.request_id, request.attempt, num_blocks)]

    def send_computed(self, request: Request) -> list[Effect]:
        """Send the blocks that have become full. After a preemption it goes on where it was."""
        return self._send_until(request, request.num_computed_tokens // self._config.block_size)

    def hand_off(self, request: Request) -> list[Effect]:
        """Its first token is sampled: everything left goes out, and the request is no longer scheduled here."""
        self._scheduler.park(request)
        return self._commit(request)

    def retarget(self, request: Request, handoff: Handoff | None) -> list[Effect]:
        """Hand over to another worker, or (None) decode here. A request that was not to be handed over, or is on its
        way there already, or was before (the word is late), stays as it is."""
        if request.handoff_to is None or request.handoff_to == handoff:
            return []
        if handoff is not None and handoff.transfer_id in request.opened_transfer_ids:
            return []
        effects = self._withdraw(request)
        request.handoff_to = handoff
        if handoff is None:
            request.mode_reason = request.mode_reason or "retargeted"
            if request.status is RequestStatus.HANDING_OFF:
                self._scheduler.resume(request)
            return effects
        if request.opened_transfer_ids:  # else it opens when it is first scheduled
            effects += self.open(request)
            effects += self.send_computed(request)
        if request.status is RequestStatus.HANDING_OFF:
            effects += self._commit(request)
        return effects

    def refused(self, transfer_id: bytes, reason: str) -> Request | None:
        """The destination took nothing, so nothing reads the blocks: the request, if it is still here, takes them back
        and waits for the router's word."""
        request = self._requests.pop(transfer_id, None)
        if request is not None:
            self._take_back(request)
            request.open_transfer_id = None
            request.mode_reason = reason
        self._manager.release_lease(transfer_id)
        return request

    def closed(self, transfer_id: bytes) -> Request | None:
        """The blocks are quiet. The request, where it is still here, is the destination's now: it ends here and is
        returned."""
        self._manager.release_lease(transfer_id)
        request = self._requests.pop(transfer_id, None)
        if request is not None:
            request.open_transfer_id = None
            self._scheduler.remove(request)
        return request

    def end(self, request: Request, reason: str) -> list[Effect]:
        """The request ends here. What has been sent stays leased until the transfer is closed."""
        transfer_id, request.open_transfer_id = request.open_transfer_id, None
        if transfer_id is None:
            return []
        del self._requests[transfer_id]
        return [AbortTransfer(transfer_id, reason)]

    def _send_until(self, request: Request, end: int) -> list[Effect]:
        """Send and lease blocks [num_sent_blocks, end)."""
        transfer_id, start = request.open_transfer_id, request.num_sent_blocks
        if transfer_id is None or end <= start:
            return []
        block_ids = self._manager.block_table(request)[start:end]
        self._manager.lease(transfer_id, block_ids)
        request.num_sent_blocks = end
        return [SendBlocks(transfer_id, start, tuple(block_ids))]

    def _commit(self, request: Request) -> list[Effect]:
        """Send the rest, the partial tail included, and commit: from here on the blocks are only leased. Nothing
        happens while no transfer is open."""
        if request.open_transfer_id is None:
            return []
        effects = self._send_until(request, self._config.num_blocks_for(request.num_given_tokens))
        sampled = tuple(request.token_ids[request.num_given_tokens :])
        effects.append(CommitTransfer(request.open_transfer_id, request.num_output_tokens, sampled))
        self._manager.free(request)
        return effects

    def _withdraw(self, request: Request) -> list[Effect]:
        if request.open_transfer_id is not None:
            self._take_back(request)
        return self.end(request, "retargeted")

    def _take_back(self, request: Request) -> None:
        """A request that was committed uses its blocks again; one that was not has never let go of them."""
        assert request.open_transfer_id is not None
        if request.status is RequestStatus.HANDING_OFF:
            self._manager.adopt(request, request.open_transfer_id)
