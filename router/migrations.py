"""The router's part in a migration: tells both workers, and decides which of them has the request. Where one should go,
and when, others say (MigrationWanted).

The source (engine/migration_source.py) has the request until the destination's first token is committed here; up to
then the destination may be dropped at any time, and the source goes on from where it is. Committed means that every
token before it has come from the source, so that nothing of it is waited for any more: it is told to forget the
request. What comes later from the one that was given up belongs to no worker of the attempt and counts for nothing.
Where the source is lost before, so is the attempt: nobody knows whether the destination has all it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from protos.types import Abort, FinishReason, Handoff, Migrate, MigrationFailed, Retarget, TokenOutput, TransferKind
from router.cluster_view import ClusterView, WorkerView
from router.config import RouterConfig
from router.events import Effect, MigrationWanted, Send
from router.in_flight import Attempt, InFlight, Migration
from router.statistics import RouterStatistics

# Until a worker that was told to forget a request has, unless it stalls: a word that is overtaken by the next one ends
# the next. After a longer stall the destination says that it has dropped the request, which costs an attempt.
RETURN_PAUSE_S = 0.5


class Migrations:
    """Invariant: a request has at most one migration, from the worker that decodes it now to another one; both are
    charged for it."""

    def __init__(
        self,
        config: RouterConfig,
        view: ClusterView,
        statistics: RouterStatistics,
        make_transfer_id: Callable[[], bytes],
        note_failed: Callable[[str, str, float], None],
    ) -> None:
        """note_failed(from, to, now) is told of every migration that comes to nothing."""
        self._statistics = statistics
        self._block_size = config.block_size
        self._view = view
        self._make_transfer_id = make_transfer_id
        self._note_failed = note_failed

    def start(self, in_flight: InFlight | None, wanted: MigrationWanted, now: float) -> list[Effect]:
        """Nothing happens where it cannot be."""
        attempt = in_flight.attempt if in_flight else None
        to = self._view.workers.get(wanted.to_worker_id)
        if in_flight is None or attempt is None or to is None or not self._can_go(in_flight, attempt, to, now):
            return []
        source = attempt.plan.decoding_worker
        transfer_id = self._make_transfer_id()
        attempt.migration = Migration(transfer_id, to, len(in_flight.log), wanted.reason)
        attempt.begin_life(to)
        to.place_to_decode(in_flight.request_id, -(-in_flight.num_tokens // self._block_size), in_flight)
        submit = in_flight.submit_migrating(attempt, Handoff(transfer_id, source.ref, TransferKind.MIGRATE), now)
        offer = Handoff(transfer_id, to.ref, TransferKind.MIGRATE)
        migrate = Migrate(in_flight.request_id, attempt.number, offer)
        return [Send(to.worker_id, submits=(submit,)), Send(source.worker_id, migrates=(migrate,))]

    def heard(self, in_flight: InFlight, attempt: Attempt, output: TokenOutput, now: float) -> list[Effect] | None:
        """From the destination. None: it counts like any other output."""
        migration = attempt.migration
        assert migration is not None
        if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT) and migration.reported_index is None:
            return self.cancel(in_flight, attempt, now)
        if output.index + len(output.token_ids) <= migration.first_index:
            return []  # from the time before it left this worker, if it ever was there
        if migration.reported_index is None or output.index < migration.reported_index:
            migration.reported_index = output.index
        return None

    def settle(self, in_flight: InFlight, now: float) -> list[Effect]:
        """After every commit: the destination has the request once a token of its own is committed."""
        attempt = in_flight.attempt
        migration = attempt.migration if attempt else None
        if attempt is None or migration is None or migration.reported_index is None:
            return []
        if len(in_flight.log) <= migration.reported_index:
            return []  # a token of the source is still on its way
        self._statistics.num_migrations += 1
        plan, source = attempt.plan, attempt.plan.decoding_worker
        attempt.first_decode = attempt.first_decode or source
        attempt.num_migrations += 1
        attempt.migration_pause_s += now - in_flight.last_token_at
        decode = None if migration.to is plan.prefill else migration.to
        reason = f"migrated from {source.worker_id}: {migration.reason}"
        attempt.plan, attempt.migration = replace(plan, decode=decode, decode_reason=reason), None
        source.note_refused(in_flight.request_id)
        return self._abort_at(source, in_flight, attempt, now)

    def failed(self, in_flight: InFlight, attempt: Attempt, failed: MigrationFailed, now: float) -> list[Effect]:
        """By the source. Where the destination has spoken, it has the request, whatever the source thinks."""
        migration = attempt.migration
        if migration is None or migration.transfer_id != failed.transfer_id or migration.reported_index is not None:
            return []
        return self.cancel(in_flight, attempt, now)

    def cancel(self, in_flight: InFlight, attempt: Attempt, now: float) -> list[Effect]:
        """The source goes on."""
        migration, attempt.migration = attempt.migration, None
        assert migration is not None
        self._statistics.num_failed_migrations += 1
        migration.to.note_refused(in_flight.request_id)
        stay = Retarget(in_flight.request_id, attempt.number, None)
        source = attempt.plan.decoding_worker
        self._note_failed(source.worker_id, migration.to.worker_id, now)
        return [*self._abort_at(migration.to, in_flight, attempt, now), Send(source.worker_id, retargets=(stay,))]

    def _can_go(self, in_flight: InFlight, attempt: Attempt, to: WorkerView, now: float) -> bool:
        source = attempt.plan.decoding_worker
        decodes = source.worker_id in attempt.reported and in_flight.log.finish_reason is None
        is_elsewhere = to is not source and self._view.takes_work(to.worker_id)
        has_forgotten = now - attempt.left_at.get(to.worker_id, float("-inf")) >= RETURN_PAUSE_S
        return decodes and is_elsewhere and has_forgotten and attempt.migration is None

    def _abort_at(self, view: WorkerView, in_flight: InFlight, attempt: Attempt, now: float) -> list[Effect]:
        attempt.left_at[view.worker_id] = now
        abort = Abort(in_flight.request_id, attempt.number)
        return [Send(view.worker_id, aborts=(abort,))] if self._view.is_live(view) else []
