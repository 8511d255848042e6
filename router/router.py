"""The life of every request in flight, from arrival to its last word: dispatch, hand-over, failover, cancellation.
Decides when an attempt starts and ends. Where it runs is placement.py's, who waits for a worker and in which order
queues.py's; text, sockets and clocks are the shell's."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import assert_never

from protos.types import Abort, FinishReason, HandoffRefused, Logprobs, PeerRef, TokenOutput
from router.cluster_view import ClusterView, WorkerView
from router.commit_log import CommitLog
from router.config import RouterConfig
from router.events import (
    AbortRequested,
    Arrived,
    ClientCancelled,
    Deliver,
    DepthsPublished,
    Effect,
    Event,
    Fail,
    MigrationWanted,
    RefusedFor,
    Reported,
    Send,
    StopMatched,
    Tick,
    WorkerDown,
    WorkerDraining,
    WorkerUp,
)
from router.handoffs import Handoffs
from router.in_flight import Attempt, InFlight
from router.migrations import Migrations
from router.placement import Plan, Planner
from router.queues import Queues, is_sent_at_once
from router.reliever import Reliever
from router.statistics import RouterStatistics

RETRY_AFTER_S = 1.0


class Router:
    """Invariant: a request is in flight from Arrived until exactly one last word (a Deliver with a finish reason, a
    Fail, or its cancellation); between these each output index is delivered once and in order. Afterwards nothing
    here remembers it."""

    def __init__(self, config: RouterConfig, make_transfer_id: Callable[[], bytes]) -> None:
        self.view = ClusterView(config)
        self.statistics = RouterStatistics()
        self._config = config
        self.planner = Planner(config, self.view)
        self._queues = Queues(config, self.view, self.planner)
        self._handoffs = Handoffs(config, self.planner.decode, make_transfer_id)
        self._reliever = Reliever(config, self.view, self.planner.decode)
        self._migrations = Migrations(config, self.view, self.statistics, make_transfer_id, self._reliever.failed)
        self._make_transfer_id = make_transfer_id
        self._in_flight: dict[str, InFlight] = {}
        self._by_client_id: dict[tuple[str, str], list[str]] = {}  # (tenant, client's id) -> its choices in flight

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def find(self, tenant: str, client_request_id: str) -> tuple[str, ...]:
        """The internal ids of a caller's request in flight, one for each choice."""
        return tuple(self._by_client_id.get((tenant, client_request_id), ()))

    def on(self, event: Event, now: float) -> list[Effect]:
        effects = self._on(event, now)
        while (ready := self._queues.take_next(now)) is not None:
            effects += self._start_attempt(*ready, now)
        return effects

    def _on(self, event: Event, now: float) -> list[Effect]:
        match event:
            case Arrived():
                return self._arrived(event, now)
            case ClientCancelled(request_id):
                return self._cancelled(request_id)
            case AbortRequested(request_id):
                return self._ended_by_router(request_id, FinishReason.ABORT, now)
            case StopMatched(request_id):
                return self._ended_by_router(request_id, FinishReason.STOP, now)
            case WorkerUp(ref):
                return self._worker_up(ref, now)
            case WorkerDown():
                return self._worker_down(event, now)
            case WorkerDraining():
                return self._worker_draining(event, now)
            case Reported():
                return self._reported(event, now)
            case MigrationWanted(request_id):
                return self._migrations.start(self._in_flight.get(request_id), event, now)
            case DepthsPublished(depths):
                self.view.follow(depths)
                return []
            case Tick():
                self._rebalance(list(self.view.workers), now)
                wanted = self._reliever.wanted(self._in_flight.values(), now)
                return self._expire_waiting(now) + [each for one in wanted for each in self._on(one, now)]
        assert_never(event)

    # --- clients --------------------------------------------------------------------------------------------------

    def _arrived(self, event: Arrived, now: float) -> list[Effect]:
        request = event.request
        assert request.attempt == 0 and request.request_id not in self._in_flight, request.request_id
        client_key = (request.tenant, request.client_request_id)
        if client_key in self._by_client_id and request.choice_index == 0:
            message = f"request_id {client_key[1]!r} is in flight already"
            return [self._refuse(event, RefusedFor.DUPLICATE_ID, "ALREADY_EXISTS", message)]
        if len(self._in_flight) >= self._config.max_in_flight:
            message = f"{len(self._in_flight)} requests are in flight, the most that are taken"
            return [self._refuse(event, RefusedFor.MAX_IN_FLIGHT, "RESOURCE_EXHAUSTED", message, RETRY_AFTER_S)]
        prompt, given = request.token_ids[: request.num_prompt_tokens], request.token_ids[request.num_prompt_tokens :]
        log = CommitLog(self._config.max_pending_tokens, given)
        arrived_at = now if event.arrived_at is None else event.arrived_at
        template = replace(request, token_ids=prompt)
        in_flight = InFlight(template, event.links, log, arrived_at, event.beside, ready_since=now, waiting_since=now)
        plan = self._plan(in_flight)
        if plan and not event.beside:
            refused = self.planner.refusal(plan, request.priority, request.deadline_s)
            if refused:
                return [
                    self._refuse(event, refused.reason, "RESOURCE_EXHAUSTED", refused.message, refused.retry_after_s)
                ]
        self._in_flight[request.request_id] = in_flight
        self._by_client_id.setdefault(client_key, []).append(request.request_id)
        self.view.observe(event.links)
        if plan is None:
            return []
        effects = self._send_or_queue(in_flight, plan, now)
        if plan.ttft_s > self._config.ttft_slo_s:
            self._rebalance((plan.prefill.worker_id, *plan.home_worker_ids), now)
        return effects

    def _refuse(
        self, event: Arrived, reason: RefusedFor, code: str, message: str, retry_after_s: float | None = None
    ) -> Fail:
        self.statistics.num_failed += 1
        return Fail(event.request.request_id, code, message, retry_after_s, reason)

    def _cancelled(self, request_id: str) -> list[Effect]:
        in_flight = self._in_flight.get(request_id)
        if in_flight is None:
            return []
        self.statistics.num_cancelled += 1
        self._forget(in_flight)
        return self._end_attempt(in_flight)

    def _ended_by_router(self, request_id: str, finish_reason: FinishReason, now: float) -> list[Effect]:
        """The last word comes from here, and the workers are told to stop."""
        in_flight = self._in_flight.get(request_id)
        return [] if in_flight is None else self._finish(in_flight, finish_reason, (), now)

    # --- an attempt's start and end -------------------------------------------------------------------------------

    def _plan(self, in_flight: InFlight) -> Plan | None:
        beside = () if in_flight.num_attempts else in_flight.beside
        return self.planner.plan(in_flight.links, in_flight.num_tokens, in_flight.num_remaining_tokens, beside)

    def _dispatch(self, in_flight: InFlight, now: float) -> list[Effect]:
        """Place it where a worker is up; else the request goes on waiting for one to join."""
        plan = self._plan(in_flight)
        return [] if plan is None else self._send_or_queue(in_flight, plan, now)

    def _send_or_queue(self, in_flight: InFlight, plan: Plan, now: float) -> list[Effect]:
        if is_sent_at_once(plan):
            return self._start_attempt(in_flight, plan, now)
        self._queues.put(in_flight, plan)
        return []

    def _rebalance(self, worker_ids: Iterable[str], now: float) -> None:
        if self._config.rebalances:
            for worker_id in dict.fromkeys(worker_ids):
                self.statistics.num_rebalanced += self._queues.rebalance(self.view.workers[worker_id], now)

    def _start_attempt(self, in_flight: InFlight, plan: Plan, now: float) -> list[Effect]:
        assert in_flight.attempt is None and in_flight.queued is None
        in_flight.num_attempts += 1
        attempt = Attempt(in_flight.num_attempts, len(in_flight.log), plan, self._make_transfer_id())
        attempt.queued_s = now - in_flight.ready_since
        in_flight.attempt = attempt
        request_id = in_flight.request_id
        plan.prefill.charge(request_id, plan.num_prefill_tokens, plan.prefill_s)
        self.view.note_placed(plan.prefill, in_flight.links)
        submit = replace(in_flight.submit(attempt, now), handoff_to=attempt.handoff_to())
        # The decode worker first: it should know of the transfer when the prefill worker offers it.
        return [*self._handoffs.place(in_flight, attempt, now), Send(plan.prefill.worker_id, submits=(submit,))]

    def _end_attempt(self, in_flight: InFlight, done: Collection[str] = ()) -> list[Effect]:
        """No worker is to do anything more for it; those in `done` have stopped by themselves."""
        attempt = in_flight.attempt
        if attempt is None:
            return []
        for view in attempt.workers:
            view.release(in_flight.request_id)
        abort = Abort(in_flight.request_id, attempt.number)
        live = (view.worker_id for view in attempt.workers if self.view.is_live(view))
        return [Send(worker_id, aborts=(abort,)) for worker_id in live if worker_id not in done]

    def _fail_over(self, in_flight: InFlight, reason: str, now: float) -> list[Effect]:
        """This attempt is lost: resume behind the last committed token, on whatever workers are up."""
        effects = self._end_attempt(in_flight)
        in_flight.attempt, in_flight.last_failure = None, reason
        in_flight.ready_since = in_flight.waiting_since = now
        in_flight.log.start_over()
        if in_flight.num_remaining_tokens == 0:
            return effects + self._finish(in_flight, FinishReason.LENGTH, (), now)
        if in_flight.num_attempts >= self._config.max_attempts:
            message = f"{in_flight.num_attempts} attempts failed; the last one: {reason}"
            return effects + self._fail(in_flight, "UNAVAILABLE", message, RETRY_AFTER_S)
        self.statistics.num_failovers += 1
        return effects + self._dispatch(in_flight, now)

    def _finish(
        self,
        in_flight: InFlight,
        finish_reason: FinishReason,
        token_ids: tuple[int, ...],
        now: float,
        logprobs: tuple[Logprobs, ...] = (),
    ) -> list[Effect]:
        # Told by the workers, the end is known to those that have sent tokens; told by the router, to none.
        done = in_flight.attempt.reported if in_flight.attempt and in_flight.log.is_complete else ()
        deliver = Deliver(
            in_flight.request_id,
            len(in_flight.log) - len(token_ids),
            token_ids,
            in_flight.num_cached_tokens,
            finish_reason,
            in_flight.account(now),
            logprobs,
            in_flight.worker_ids,
        )
        self.statistics.num_finished += 1
        if finish_reason is not FinishReason.ABORT:
            self.planner.decode.note_output(len(in_flight.log))
        decoding = in_flight.attempt and in_flight.attempt.plan.decoding_worker
        if decoding and decoding.worker_id in done:  # the last token has no KV
            self.view.note_answer(decoding, in_flight.links, in_flight.num_tokens - 1)
        self._forget(in_flight)
        return [deliver, *self._end_attempt(in_flight, done)]

    def _fail(self, in_flight: InFlight, code: str, message: str, retry_after_s: float | None = None) -> list[Effect]:
        self.statistics.num_failed += 1
        self._forget(in_flight)
        return [Fail(in_flight.request_id, code, message, retry_after_s), *self._end_attempt(in_flight)]

    def _forget(self, in_flight: InFlight) -> None:
        self._queues.leave(in_flight)
        request = in_flight.template
        del self._in_flight[request.request_id]
        client_key = (request.tenant, request.client_request_id)
        self._by_client_id[client_key].remove(request.request_id)
        if not self._by_client_id[client_key]:
            del self._by_client_id[client_key]

    # --- workers --------------------------------------------------------------------------------------------------

    def _worker_up(self, ref: PeerRef, now: float) -> list[Effect]:
        effects: list[Effect] = []
        known = self.view.workers.get(ref.worker_id)
        if known is not None:
            if known.ref.incarnation == ref.incarnation:
                return []
            down = WorkerDown(ref.worker_id, known.ref.incarnation, "a new incarnation took its place")
            effects += self._worker_down(down, now)
        self.view.add(ref)
        for in_flight in [r for r in self._in_flight.values() if r.waits_for_a_worker]:
            effects += self._dispatch(in_flight, now)
        return effects

    def _worker_down(self, event: WorkerDown, now: float) -> list[Effect]:
        view = self.view.find(event.worker_id, event.incarnation)
        if view is None:
            return []
        self.view.remove(event.worker_id)
        effects: list[Effect] = []
        for in_flight in list(self._in_flight.values()):
            attempt = in_flight.attempt
            if attempt is not None and attempt.migration is not None and attempt.migration.to is view:
                effects += self._migrations.cancel(in_flight, attempt, now)
            elif attempt is not None and attempt.needs(view, len(in_flight.log)):
                effects += self._fail_over(in_flight, f"worker {event.worker_id} was lost: {event.reason}", now)
        return effects + self._place_queue_anew(view, now)

    def _worker_draining(self, event: WorkerDraining, now: float) -> list[Effect]:
        """What was sent there goes on; what only waits for it goes elsewhere at once."""
        view = self.view.find(event.worker_id, event.incarnation)
        if view is None or not self.view.takes_work(event.worker_id):
            return []
        self.view.drain(view)
        return self._place_queue_anew(view, now)

    def _place_queue_anew(self, view: WorkerView, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for in_flight in list(self._in_flight.values()):
            if in_flight.queued is not None and in_flight.queued.prefill is view:
                self._queues.leave(in_flight)
                in_flight.waiting_since = now
                effects += self._dispatch(in_flight, now)
        return effects

    def num_needing(self, view: WorkerView) -> int:
        """Requests that its loss would cost an attempt, or a place in a queue."""
        found = 0
        for in_flight in self._in_flight.values():
            attempt, queued = in_flight.attempt, in_flight.queued
            is_queued = queued is not None and queued.prefill is view
            found += is_queued or (attempt is not None and attempt.needs(view, len(in_flight.log)))
        return found

    def _reported(self, event: Reported, now: float) -> list[Effect]:
        view = self.view.find(event.worker_id, event.incarnation)
        report = event.report
        if view is None:
            self.statistics.num_stale_reports += len(report.outputs) + len(report.refusals)
            return []
        if report.stats is not None:
            self.view.note_stats(view, report.stats)
        effects: list[Effect] = []
        for output in report.outputs:
            effects += self._output(view, output, now)
        for refusal in report.refusals:
            effects += self._refused(view, refusal, now)
        for failed in report.failed_migrations:
            if (current := self._current(view, failed.request_id, failed.attempt)) is not None:
                effects += self._migrations.failed(*current, failed, now)
        return effects

    def _current(self, view: WorkerView, request_id: str, number: int) -> tuple[InFlight, Attempt] | None:
        """The attempt that a report speaks of, if it is the current one and this worker is part of it."""
        in_flight = self._in_flight.get(request_id)
        attempt = in_flight.attempt if in_flight else None
        if in_flight and attempt and attempt.number == number and attempt.involves(view):
            return in_flight, attempt
        self.statistics.num_stale_reports += 1
        return None

    def _output(self, view: WorkerView, output: TokenOutput, now: float) -> list[Effect]:
        current = self._current(view, output.request_id, output.attempt)
        if current is None:
            return []
        in_flight, attempt = current
        if attempt.migration is not None and attempt.migration.to is view:
            ended = self._migrations.heard(in_flight, attempt, output, now)
            if ended is not None:
                return ended
        if output.finish_reason is FinishReason.ERROR:
            return self._fail(in_flight, "INTERNAL", f"worker {view.worker_id}: {output.error}")
        if output.finish_reason is FinishReason.ABORT:  # not needed: it speaks late of a migration that had failed
            reason = f"worker {view.worker_id} gave it up: {output.error}"
            return self._fail_over(in_flight, reason, now) if attempt.needs(view, len(in_flight.log)) else []
        if output.account is not None:
            attempt.note_account(view, output.account)
        if view is attempt.plan.decoding_worker and view.worker_id not in attempt.reported:
            self.planner.decode.note_held(view, in_flight.links)
        attempt.reported.add(view.worker_id)
        # By whomever: where the KV was lost on its way, the prefill worker gives the request up without a word.
        attempt.plan.prefill.note_prefilled(in_flight.request_id)
        return self._commit(in_flight, view, output, now)

    def _commit(self, in_flight: InFlight, view: WorkerView, output: TokenOutput, now: float) -> list[Effect]:
        taken = in_flight.log.take(output.index, output.token_ids, output.finish_reason, output.logprobs)
        effects = self._migrations.settle(in_flight, now)
        if taken.token_ids:
            in_flight.note_tokens(now)
        finish_reason = in_flight.log.finish_reason
        if in_flight.log.is_complete and finish_reason is not None and not taken.conflict:
            return effects + self._finish(in_flight, finish_reason, taken.token_ids, now, taken.logprobs)
        if taken.token_ids:
            first_index = len(in_flight.log) - len(taken.token_ids)
            deliver = Deliver(in_flight.request_id, first_index, taken.token_ids, in_flight.num_cached_tokens)
            effects.append(replace(deliver, logprobs=taken.logprobs, workers=in_flight.worker_ids))
        if taken.conflict:
            effects += self._fail_over(in_flight, f"worker {view.worker_id} reported {taken.conflict}", now)
        return effects

    def _refused(self, view: WorkerView, refusal: HandoffRefused, now: float) -> list[Effect]:
        current = self._current(view, refusal.request_id, refusal.attempt)
        effects = self._handoffs.refused(*current, view, refusal, now) if current else []
        if effects is None:
            self.statistics.num_stale_reports += 1
        return effects or []

    # --- time -----------------------------------------------------------------------------------------------------

    def _expire_waiting(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for in_flight in list(self._in_flight.values()):
            waited_s = now - in_flight.waiting_since
            if in_flight.waits_for_a_worker and waited_s >= self._config.max_wait_s:
                message = f"no worker is up; waited {waited_s:.1f} s for one" + (
                    f" after: {in_flight.last_failure}" if in_flight.last_failure else ""
                )
                effects += self._fail(in_flight, "UNAVAILABLE", message, RETRY_AFTER_S)
        return effects
