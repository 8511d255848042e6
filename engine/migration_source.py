"""The leaving side of a migration: sends the blocks of a running decode while it goes on, takes it off its worker
between two steps when hardly anything is left, sends the rest and commits with its tokens. Knows nothing of the other
worker but what has been sent to it.

Who has the request? Until the commit this worker: without one the destination can never take it, so whatever goes wrong
before (refused, lost, outgrown, preempted) only ends the migration, and the request never notices. From the commit on
this worker cannot know: the commit may have arrived although no ack was heard. So it keeps the request with its blocks,
computes nothing, and waits for the router, whose commit log knows who has said what:

- Abort: the destination's first token is committed. Ack or not, it has the request.
- Retarget to nobody: go on here. The router has ceased to listen to the destination, because this worker said that the
  transfer failed, or because the destination died; what it may still say counts for nothing, and it is aborted.

Exactly one of the two comes, since the destination goes on or dies, or the transfer ends without an ack (closed), which
is told to the router. The ack itself only says that the blocks are not read any more."""

from __future__ import annotations

from dataclasses import dataclass

from engine.config import SchedulerConfig
from engine.events import AbortTransfer, CommitTransfer, Effect, OpenTransfer, SendBlocks
from engine.kv_cache_manager import KVCacheManager
from engine.request import Request, RequestStatus
from engine.scheduler import Scheduler
from protos.types import Migrate, MigrationFailed, TransferFailure, TransferKind

# The destination was given the tokens that the router had in the beginning, so this many are more than it lacks; and
# fewer than a commit may have (kvtransfer/messages.py).
MAX_NUM_COMMIT_TOKENS = 2048


@dataclass(slots=True, eq=False)
class _Migration:
    transfer_id: bytes
    request: Request
    num_offered_blocks: int
    num_preemptions: int  # of the request when it began
    num_given_blocks: int = 0  # to SendBlocks
    num_sent_blocks: int | None = None  # None: nothing is granted yet
    is_committed: bool = False
    is_open: bool = True  # the transfer


class MigrationSource:
    """Invariant: `_by_request` has the requests that are leaving, `_by_transfer` the same by their open transfers.
    Committed ones are parked: in no queue, their blocks held. What was given to SendBlocks stays leased until the
    transfer is closed, also when its request has long ended."""

    def __init__(self, config: SchedulerConfig, scheduler: Scheduler, manager: KVCacheManager) -> None:
        self._config = config
        self._scheduler = scheduler
        self._manager = manager
        self._by_request: dict[Request, _Migration] = {}
        self._by_transfer: dict[bytes, _Migration] = {}

    def __contains__(self, request: Request) -> bool:
        return request in self._by_request

    # --- the router's word --------------------------------------------------------------------------------------------

    def start(self, request: Request, migrate: Migrate) -> list[Effect]:
        """The latest word counts; one that is repeated changes nothing."""
        transfer_id = migrate.migrate_to.transfer_id
        if transfer_id in request.opened_transfer_ids:
            return []
        refusal = self._refusal(request)
        if refusal:
            return [MigrationFailed(request.request_id, request.attempt, transfer_id, refusal)]
        effects = self.end(request, "another migration is wanted")
        num_blocks = self._num_blocks_to_offer(request)
        migration = _Migration(transfer_id, request, num_blocks, request.num_preemptions)
        request.opened_transfer_ids.add(transfer_id)
        self._by_request[request] = self._by_transfer[transfer_id] = migration
        offer = OpenTransfer(migrate.migrate_to, request.request_id, request.attempt, num_blocks, TransferKind.MIGRATE)
        return [*effects, offer]

    def stay(self, request: Request) -> list[Effect]:
        """It goes on here, whatever has become of the transfer."""
        was_committed = self._by_request[request].is_committed
        effects = self.end(request, "the router keeps it here")
        if was_committed:
            self._scheduler.resume(request)
        return effects

    def end(self, request: Request, reason: str) -> list[Effect]:
        """The request ends here, or the migration does. Nothing happens where there is none."""
        migration = self._by_request.pop(request, None)
        if migration is None or not migration.is_open:
            return []
        del self._by_transfer[migration.transfer_id]
        return [AbortTransfer(migration.transfer_id, reason)]

    # --- steps --------------------------------------------------------------------------------------------------------

    def end_preempted(self) -> list[Effect]:
        """Their blocks are gone, so they are computed again before there is anything to send."""
        gone = [each for each in self._by_request.values() if each.request.num_preemptions > each.num_preemptions]
        return [effect for each in gone for effect in self._give_up(each, "it was preempted")]

    def after_step(self, request: Request, has_sampled: bool) -> list[Effect]:
        """Send what has become full; where all but about a block has been sent, take the request off and commit."""
        migration = self._by_request.get(request)
        if migration is None or migration.num_sent_blocks is None:
            return []
        num_blocks = self._config.num_blocks_for(request.num_computed_tokens)
        if num_blocks > migration.num_offered_blocks:
            return self._give_up(migration, f"it has outgrown the {migration.num_offered_blocks} blocks on offer")
        is_tail = num_blocks - migration.num_sent_blocks <= self._config.max_migration_tail_blocks
        return self._commit(migration, num_blocks) if has_sampled and is_tail else self._send_full(migration)

    # --- the transfer's way, for any id -------------------------------------------------------------------------------

    def sent(self, transfer_id: bytes, num_blocks: int) -> list[Effect]:
        """So many are at the destination, or on their last way there. The first such word is its grant."""
        migration = self._by_transfer.get(transfer_id)
        if migration is None:
            return []
        migration.num_sent_blocks = num_blocks
        return [] if migration.is_committed else self._send_full(migration)

    def refused(self, transfer_id: bytes, reason: str) -> list[Effect]:
        """Nothing was taken."""
        migration = self._by_transfer.pop(transfer_id, None)
        return [] if migration is None else self._fail(migration, reason)

    def closed(self, transfer_id: bytes, failure: TransferFailure | None) -> list[Effect]:
        """The blocks are quiet."""
        self._manager.release_lease(transfer_id)
        migration = self._by_transfer.pop(transfer_id, None)
        if migration is None:
            return []
        migration.is_open = False
        if failure is None and migration.is_committed:
            return []
        return self._fail(migration, f"the transfer ended: {failure}")

    # --- inside -------------------------------------------------------------------------------------------------------

    def _refusal(self, request: Request) -> str:
        migration = self._by_request.get(request)
        if migration is not None and migration.is_committed:
            return "it is leaving already"
        if request.status is not RequestStatus.RUNNING or request.handoff_to is not None:
            return f"it does not decode here: {request.status}"
        return "" if request.first_token_at is not None else "it has no token of its own here yet"

    def _num_blocks_to_offer(self, request: Request) -> int:
        """With room for what it gets while they move: KV moves some ten times as fast as it is made at the least, and a
        grant may take a few steps. Never more than the request can come to need."""
        num_blocks = self._config.num_blocks_for(request.num_tokens)
        most = min(request.num_prompt_tokens + request.sampling_params.max_tokens, self._config.max_model_len)
        return min(num_blocks + 2 + num_blocks // 8, self._config.num_blocks_for(most - 1))

    def _send_full(self, migration: _Migration) -> list[Effect]:
        num_full_blocks = migration.request.num_computed_tokens // self._config.block_size
        return self._send_until(migration, min(num_full_blocks, migration.num_offered_blocks))

    def _send_until(self, migration: _Migration, end: int) -> list[Effect]:
        start = migration.num_given_blocks
        if end <= start:
            return []
        block_ids = self._manager.block_table(migration.request)[start:end]
        self._manager.lease(migration.transfer_id, block_ids)
        migration.num_given_blocks = end
        return [SendBlocks(migration.transfer_id, start, tuple(block_ids))]

    def _commit(self, migration: _Migration, num_blocks: int) -> list[Effect]:
        """The rest goes out, the partial tail included; nothing is computed for the request here any more."""
        request = migration.request
        self._scheduler.park(request)
        migration.is_committed = True
        effects = self._send_until(migration, num_blocks)
        num_tokens = min(request.num_output_tokens, MAX_NUM_COMMIT_TOKENS)
        token_ids = tuple(request.token_ids[request.num_tokens - num_tokens :])
        return [*effects, CommitTransfer(migration.transfer_id, request.num_output_tokens, token_ids)]

    def _give_up(self, migration: _Migration, reason: str) -> list[Effect]:
        return [*self.end(migration.request, reason), self._failed(migration, reason)]

    def _fail(self, migration: _Migration, reason: str) -> list[Effect]:
        """The transfer has ended without an ack. A request that was committed waits on, for the router's word."""
        if not migration.is_committed:
            del self._by_request[migration.request]
        return [self._failed(migration, reason)]

    def _failed(self, migration: _Migration, reason: str) -> MigrationFailed:
        request = migration.request
        return MigrationFailed(request.request_id, request.attempt, migration.transfer_id, reason)
