"""One worker without its model and its network: events in, effects out. Decides what is computed, what is sent where
and when blocks are free; a shell runs the steps, moves the KV and talks to the router."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count

from engine.config import SchedulerConfig
from engine.events import (
    BlocksSent,
    Copied,
    CopyLost,
    Effect,
    Event,
    OfferReturn,
    PullRefused,
    PullRequested,
    ReturnOffered,
    Submitted,
    TransferArrived,
    TransferClosed,
    TransferLost,
    TransferOffered,
    TransferRefused,
)
from engine.handoff_destination import HandoffDestination
from engine.handoff_source import HandoffSource
from engine.host_cache import HostCache
from engine.host_loads import HostLoads
from engine.host_saves import HostSaves
from engine.kv_cache_manager import KVCacheManager, Ledger
from engine.migration_source import MigrationSource
from engine.prefill_speed import PrefillSpeed
from engine.pull_destination import PullDestination
from engine.pull_source import PullSource
from engine.pull_speed import PullSpeed
from engine.request import Request, RequestStatus
from engine.return_destination import ReturnDestination
from engine.scheduler import Progress, Scheduler
from engine.scheduler_output import SchedulerOutput, StepResult
from protos.types import (
    Abort,
    FinishReason,
    GenerateRequest,
    HandoffRefused,
    Migrate,
    Retarget,
    TokenOutput,
    WorkerStats,
)


class WorkerCore:
    """Invariant: every request here stands in `_requests`, one life of it at a time; blocks are held by those requests,
    by lives that ended during the step under way, or leased to transfers and copies.

    Events may come at any time, also while a step is under way. Late, repeated and unknown ones change nothing."""

    def __init__(
        self,
        config: SchedulerConfig,
        num_blocks: int,
        hash_key: bytes,
        model_fingerprint: str,
        worker_id: str = "",
        new_pull_id: Callable[[], bytes] | None = None,
    ) -> None:
        """worker_id and new_pull_id (128 random bits, used once) are needed where the config has pulls."""
        self._config = config
        self._worker_id = worker_id
        self._gives_returns = config.pulls is not None and config.pulls.max_returns > 0
        self._manager = KVCacheManager(config, num_blocks, hash_key, model_fingerprint)
        self._scheduler = Scheduler(config, self._manager)
        self._source = HandoffSource(config, self._scheduler, self._manager)
        self._destination = HandoffDestination(config, self._scheduler, self._manager)
        self._migrations = MigrationSource(config, self._scheduler, self._manager)
        self._speed = PrefillSpeed(config.max_num_batched_tokens)
        self._pull_speed = PullSpeed(config.pulls, config.kv_nbytes_per_token)
        copy_numbers = count()

        def new_copy_id() -> bytes:
            return next(copy_numbers).to_bytes(8)  # leases go by it, too: ids of transfers are longer

        host = HostCache(config.host)
        self._host = host
        self._saves = HostSaves(config.host, self._manager, host, new_copy_id)
        self._loads = HostLoads(config, self._scheduler, self._manager, host, self._speed, new_copy_id)
        self._pull_source = PullSource(config, self._manager, host)
        self._pulls = PullDestination(
            config, self._scheduler, self._manager, self._speed, self._pull_speed, worker_id, new_pull_id
        )
        self._returns = ReturnDestination(config, self._scheduler, self._manager, host, new_pull_id)
        self._requests: dict[str, Request] = {}
        self._arrivals = count()

    # --- events ---------------------------------------------------------------------------------------------------

    def on(self, event: Event, now: float) -> list[Effect]:
        return [*self._on(event, now), *self._saves.start()]

    def _on(self, event: Event, now: float) -> list[Effect]:
        match event:
            case Submitted(request):
                return self._submit(request, now)
            case Abort():
                return self._abort(event)
            case Retarget():
                return self._retarget(event)
            case Migrate():
                return self._migrate(event)
            case BlocksSent(transfer_id, num_blocks):
                return self._migrations.sent(transfer_id, num_blocks)
            case PullRequested():
                return self._pull_source.requested(event)
            case ReturnOffered():
                return self._returns.announced(event, now)
            case PullRefused() if self._returns.awaits(event.pull_id):
                self._returns.refused(event.pull_id)
                return []
            case PullRefused():
                return self._pulls.refused(event, now)
            case TransferOffered() | TransferArrived() | TransferLost() if self._pulls.awaits(event.transfer_id):
                return self._on_pull(event, now)
            case TransferOffered() | TransferArrived() | TransferLost() if self._returns.awaits(event.transfer_id):
                return self._on_return(event)
            case TransferOffered():
                return self._destination.offered(event, self._requests.get(event.request_id))
            case TransferArrived():
                self._destination.arrived(event, now)
                return []
            case TransferLost():
                return self._transfer_lost(event, now)
            case TransferRefused() | TransferClosed() if self._pull_source.ended(event.transfer_id):
                return []
            case TransferRefused():
                return self._transfer_refused(event)
            case TransferClosed():
                return self._transfer_closed(event)
            case Copied() | CopyLost():
                return self._on_copy(event, now)

    def abort_all(self, now: float, reason: str) -> list[Effect]:
        """Self-fencing: everything ends here without a word to the router, which may have given it to others."""
        effects: list[Effect] = []
        for request in list(self._requests.values()):
            effects += self._end(request, reason)
        return effects + self._pull_source.end_all(reason) + self._returns.end_all(reason)

    def _submit(self, generate: GenerateRequest, now: float) -> list[Effect]:
        effects: list[Effect] = []
        older = self._requests.get(generate.request_id)
        if older is not None:
            if older.attempt >= generate.attempt:
                return []
            effects += self._end(older, f"attempt {generate.attempt} has come")
        request = Request(generate, next(self._arrivals), now)
        refusal = self._scheduler.refusal(request)
        if refusal:
            return [*effects, _last_output(request, FinishReason.ERROR, refusal)]
        self._requests[request.request_id] = request
        if request.handoff_from is not None:
            return effects + self._destination.expect(request)
        return effects + self._find_prefix(request, now)

    def _find_prefix(self, request: Request, now: float) -> list[Effect]:
        """What is in host memory comes first; what is still lacking then comes from another worker, or is computed."""
        loading = self._loads.add(request, now)
        return self._pulls.add(request, now) if loading is None else [*loading]

    def _on_pull(self, event: TransferOffered | TransferArrived | TransferLost, now: float) -> list[Effect]:
        match event:
            case TransferOffered():
                return self._pulls.offered(event, now)
            case TransferArrived():
                return self._pulls.arrived(event, now)
            case TransferLost():
                return self._pulls.lost(event, now)

    def _on_return(self, event: TransferOffered | TransferArrived | TransferLost) -> list[Effect]:
        match event:
            case TransferOffered():
                return self._returns.offered(event)
            case TransferArrived():
                self._returns.arrived(event.transfer_id)
            case TransferLost():
                self._returns.lost(event.transfer_id)
        return []

    def _on_copy(self, event: Copied | CopyLost, now: float) -> list[Effect]:
        copy_id, effects = event.copy_id, list[Effect]()
        match event:
            case Copied() if self._saves.awaits(copy_id):
                self._saves.copied(copy_id)
            case CopyLost() if self._saves.awaits(copy_id):
                self._saves.lost(copy_id)
            case Copied() if self._loads.awaits(copy_id):
                for request in self._loads.copied(copy_id):
                    effects += self._find_prefix(request, now)
            case CopyLost() if self._loads.awaits(copy_id):
                for request in self._loads.lost(copy_id):
                    effects += self._pulls.add(request, now)
        return effects

    def _abort(self, event: Abort) -> list[Effect]:
        request = self._find(event.request_id, event.attempt)
        return [] if request is None else self._end(request, "aborted")

    def _retarget(self, event: Retarget) -> list[Effect]:
        request = self._find(event.request_id, event.attempt)
        if request is None:
            return []
        if request in self._migrations:
            return self._migrations.stay(request) if event.handoff_to is None else []
        return self._source.retarget(request, event.handoff_to)

    def _migrate(self, event: Migrate) -> list[Effect]:
        request = self._find(event.request_id, event.attempt)
        return [] if request is None else self._migrations.start(request, event)

    def _transfer_lost(self, event: TransferLost, now: float) -> list[Effect]:
        """The request of a migration is the source's still, and nobody's here. A router that has taken a late word of
        an earlier life here for its arrival must hear of it: nobody would go on with the request."""
        dropped = self._destination.lost(event, now)
        if dropped is None:
            return []
        del self._requests[dropped.request_id]
        self._scheduler.remove(dropped)
        return [_last_output(dropped, FinishReason.ABORT, event.reason)]

    def _transfer_refused(self, event: TransferRefused) -> list[Effect]:
        request = self._source.refused(event.transfer_id, event.reason)
        if request is None:
            return self._migrations.refused(event.transfer_id, event.reason)
        return [HandoffRefused(request.request_id, request.attempt, event.reason)]

    def _transfer_closed(self, event: TransferClosed) -> list[Effect]:
        request = self._source.closed(event.transfer_id)
        if request is None:
            return self._migrations.closed(event.transfer_id, event.failure)
        del self._requests[request.request_id]
        return []

    # --- steps ----------------------------------------------------------------------------------------------------

    @property
    def deadline(self) -> float | None:
        """When to call schedule at the latest, even where no event comes: a pull will be late then."""
        return self._pulls.deadline

    def schedule(self, now: float) -> tuple[SchedulerOutput | None, list[Effect]]:
        """The next step (None: nothing to compute) and the transfers to open or to give up before it runs.

        update_from_output must follow before the next call."""
        effects = [*self._pulls.expire(now), *self._loads.add_next(now)]
        output = self._scheduler.schedule(now)
        effects += self._migrations.end_preempted()
        for scheduled in output.scheduled if output else ():
            request = self._requests[scheduled.request_id]
            if request.handoff_to is not None and not request.opened_transfer_ids:
                effects += self._source.open(request)
        return output, [*effects, *self._saves.start()]

    def update_from_output(self, output: SchedulerOutput, result: StepResult, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for progress in self._scheduler.update_from_output(output, result, now):
            effects += self._after_progress(progress)
        return [*effects, *self._saves.start()]

    def note_step(self, output: SchedulerOutput, duration_s: float) -> None:
        """What the step took, to know what steps cost here."""
        self._speed.note_step(output, duration_s)
        self._pull_speed.note_step()

    def _after_progress(self, progress: Progress) -> list[Effect]:
        request = progress.request
        is_prefilled = request.num_output_tokens - len(progress.token_ids) == request.num_committed_tokens
        if self._gives_returns and progress.token_ids and is_prefilled:
            return [*self._after_work(progress), *self._offer_return(request)]
        return self._after_work(progress)

    def _after_work(self, progress: Progress) -> list[Effect]:
        request = progress.request
        if request.finish_reason is not None:
            return self._finish(progress)
        if request.handoff_to is None:
            moves = self._migrations.after_step(request, bool(progress.token_ids))
            leaves = request.status is RequestStatus.HANDING_OFF
            return [_token_output(progress, accounts=leaves), *moves] if progress.token_ids else moves
        if not progress.token_ids:
            return self._source.send_computed(request)
        return [_token_output(progress, accounts=True), *self._source.hand_off(request)]

    def _finish(self, progress: Progress) -> list[Effect]:
        request = progress.request
        if request.handoff_to is not None:
            request.mode_reason = "finished with its first token"
        return [_token_output(progress, accounts=True), *self._end(request, "finished"), *self._offer_answer(request)]

    def _offer_return(self, request: Request) -> list[Effect]:
        """Its first token is out, and the blocks of its prompt are in the cache."""
        home = request.return_worker_id
        hashes = self._manager.given_prefix(request) if home not in ("", self._worker_id) else ()
        return [OfferReturn(home, request.request_id, request.attempt, hashes)] if hashes else []

    def _offer_answer(self, request: Request) -> list[Effect]:
        """To where its prompt was computed or brought, for the next turn: what was generated is only here."""
        pulls, handoff, hashes = self._config.pulls, request.handoff_from, tuple[bytes, ...]()
        if pulls is not None and pulls.max_returns and pulls.returns_answers and handoff is not None:
            hashes = self._manager.computed_prefix(request)
        if handoff is None or len(hashes) <= request.num_given_tokens // self._config.block_size:
            return []
        home = request.return_worker_id or handoff.peer.worker_id
        return [OfferReturn(home, request.request_id, request.attempt, hashes)]

    # --- what others may know -------------------------------------------------------------------------------------

    def ledger(self) -> Ledger:
        ledger, host = self._manager.ledger(), self._host
        return replace(
            ledger,
            balanced=ledger.balanced and host.is_balanced,
            host_cached=host.num_cached_blocks,
            host_leased=host.num_leased_blocks,
            host_total=host.num_blocks,
        )

    def stats(self) -> WorkerStats:
        """Recomputes the ledger, so not for every step. warm_links are the transfer agent's to add."""
        ledger = self.ledger()
        queued = (*self._scheduler.waiting, *self._scheduler.running, *self._pulls.requests, *self._loads.requests)
        return WorkerStats(
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting) + len(self._destination) + len(self._pulls) + len(self._loads),
            num_blocks=ledger.total,
            num_free_blocks=ledger.free,
            num_cached_blocks=ledger.cached,
            num_held_blocks=ledger.held,
            num_leased_blocks=ledger.leased,
            ledger_balanced=ledger.balanced,
            num_pending_prefill_tokens=sum(request.num_pending_prefill_tokens for request in queued),
            prefill_s_per_token=self._speed.s_per_token,
            num_steps=self._scheduler.num_steps,
            num_host_blocks=ledger.host_total,
            num_cached_host_blocks=ledger.host_cached,
            num_host_loaded_tokens=self._loads.num_loaded_tokens,
            step_moments=self._speed.moments(),
            prefill_cost=self._speed.cost,
            pull_cost=self._pull_speed.cost,
            pulls=self._pulls.stats,
            max_num_seqs=self._config.max_num_seqs,
        )

    # --- inside ---------------------------------------------------------------------------------------------------

    def _find(self, request_id: str, attempt: int) -> Request | None:
        request = self._requests.get(request_id)
        return request if request is not None and request.attempt == attempt else None

    def _end(self, request: Request, reason: str) -> list[Effect]:
        """Forget the request; its transfers end too."""
        del self._requests[request.request_id]
        effects: list[Effect] = []
        if request in self._loads:
            self._loads.end(request)
        elif request in self._pulls:
            effects = self._pulls.end(request, reason)
        else:
            effects = self._source.end(request, reason) + self._destination.end(request, reason)
            effects += self._migrations.end(request, reason)
        self._scheduler.remove(request)
        return effects


def _token_output(progress: Progress, accounts: bool = False) -> TokenOutput:
    """accounts: this is the worker's last word on the request."""
    request = progress.request
    decoded_here = request.handoff_to is None or request.finish_reason is not None
    return TokenOutput(
        request_id=request.request_id,
        attempt=request.attempt,
        index=request.num_output_tokens - len(progress.token_ids),
        token_ids=progress.token_ids,
        logprobs=progress.logprobs,
        finish_reason=request.finish_reason,
        account=request.account(decoded_here) if accounts else None,
    )


def _last_output(request: Request, finish_reason: FinishReason, error: str) -> TokenOutput:
    return TokenOutput(
        request_id=request.request_id,
        attempt=request.attempt,
        index=request.num_output_tokens,
        token_ids=(),
        finish_reason=finish_reason,
        error=error,
    )
