"""The requests that are placed and not yet sent: which goes next, and which move to another of their candidates.
Decides when a look through a hot queue is due; the order is queue_order.py's, the moves are rebalance.py's."""

from __future__ import annotations

from dataclasses import replace

from router.cluster_view import ClusterView, WorkerView
from router.config import RouterConfig
from router.in_flight import InFlight
from router.placement import Plan, Planner
from router.queue_order import Queued
from router.rebalance import MIN_INTERVAL_S, Elsewhere, Movable, Move, is_threatened, moves


def is_sent_at_once(plan: Plan) -> bool:
    return plan.prefill.has_credit and len(plan.prefill.queue) == 0


def reason_of(plan: Plan) -> str:
    """Of its place, with what it waits for there."""
    if is_sent_at_once(plan):
        return plan.prefill_reason
    return f"{plan.prefill_reason}; queued, {len(plan.prefill.queue)} there before"


class Queues:
    """Invariant: a request is here while `in_flight.queued` is its plan, and in the queue of that plan's prefill worker
    only; a queue with an entry and credit is emptied by take_next() before the next event."""

    def __init__(self, config: RouterConfig, view: ClusterView, planner: Planner) -> None:
        self._config = config
        self._view = view
        self._planner = planner
        self._members: dict[str, InFlight] = {}
        self._changed: list[WorkerView] = []  # that may have room for one of theirs

    def put(self, in_flight: InFlight, plan: Plan) -> None:
        assert in_flight.attempt is None and in_flight.queued is None
        plan = replace(plan, prefill_reason=reason_of(plan))
        in_flight.queued = plan
        self._members[in_flight.request_id] = in_flight
        self._view.note_placed(plan.prefill, in_flight.links)
        plan.prefill.queue.put(self._entry(in_flight, plan))

    def leave(self, in_flight: InFlight) -> None:
        """Nothing happens where it is not here."""
        if in_flight.queued is not None:
            in_flight.queued.prefill.queue.remove(in_flight.request_id)
            del self._members[in_flight.request_id]
            in_flight.queued = None

    def take_next(self, now: float) -> tuple[InFlight, Plan] | None:
        """One that its worker has credit for; it is here no more. None: there is none, until something changes."""
        while self._changed or (changed := self._view.take_changed()):
            if not self._changed:
                self._changed = changed
            view = self._changed[-1]
            head = view.queue.head(now, view.pending_tokens.total, view.sent_s) if self._view.is_live(view) else None
            if head is None:
                self._changed.pop()
                continue
            in_flight = self._members[head.request_id]
            plan = in_flight.queued
            assert plan is not None
            self.leave(in_flight)
            return in_flight, self._planner.plan_again(
                plan, in_flight.links, in_flight.num_tokens, in_flight.num_remaining_tokens
            )
        return None

    def rebalance(self, view: WorkerView, now: float) -> int:
        """Look through this worker's queue, if that is due; how many have moved."""
        if len(view.queue) == 0 or now - view.rebalanced_at < MIN_INTERVAL_S:
            return 0
        view.rebalanced_at = now
        queue = [self._staying(entry, now) for entry in view.queue.in_order(now, view.sent_s)]
        if not is_threatened(queue, view.sent_s):
            return 0
        found = moves(self._with_others(queue, view.sent_s), view.sent_s)
        for move in found:
            self._move(self._members[move.request_id], move)
        return len(found)

    def _move(self, in_flight: InFlight, move: Move) -> None:
        assert in_flight.queued is not None
        here = in_flight.queued.prefill.worker_id
        reason = f"rebalanced: TTFT {move.there_s:.2f} s, {move.here_s:.2f} s in the queue of {here}"
        self.leave(in_flight)
        in_flight.num_moves += 1
        plan = self._planner.plan_at(
            move.worker_id, reason, in_flight.links, in_flight.num_tokens, in_flight.num_remaining_tokens
        )
        self.put(in_flight, plan)

    def _staying(self, entry: Queued, now: float) -> Movable:
        return Movable(entry.request_id, entry.due_at - now, entry.prefill_s, ())

    def _with_others(self, queue: list[Movable], start_s: float) -> list[Movable]:
        """Only candidates that may be a gain and in time are looked at closely: in a cluster that is busy everywhere,
        there are none."""
        found = []
        ends_s = start_s
        for one in queue:
            ends_s += one.prefill_s
            in_flight, within_s = self._members[one.request_id], min(one.slack_s, ends_s)
            assert in_flight.queued is not None
            others: list[Plan] = []
            if within_s > 0:
                others = self._planner.other_plans(in_flight.queued, in_flight.links, in_flight.num_tokens, within_s)
            # A pull takes the request's time, and not the worker's.
            elsewhere = (Elsewhere(o.prefill.worker_id, o.ttft_s - o.prefill_s, o.prefill_s) for o in others)
            found.append(replace(one, elsewhere=tuple(elsewhere)))
        return found

    def _entry(self, in_flight: InFlight, plan: Plan) -> Queued:
        request = in_flight.template
        slo_s = self._config.ttft_slo_s
        return Queued(
            request_id=in_flight.request_id,
            since=in_flight.arrived_at,  # one that failed over has a caller who waits in mid-answer
            due_at=in_flight.ready_since + (slo_s if request.deadline_s is None else min(slo_s, request.deadline_s)),
            num_tokens=plan.num_prefill_tokens,
            prefill_s=plan.prefill_s,
            num_cached_tokens=plan.num_predicted_cached_tokens,
            priority=request.priority,
        )
