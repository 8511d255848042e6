"""Where a request would go now, and why: by a copy of the planner for real ones, and what it saw of every worker.
Reads the view, changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from router.cluster_view import ClusterView, WorkerView
from router.config import RouterConfig
from router.placement import Planner
from router.policy import Candidate
from router.queues import reason_of


@dataclass(frozen=True, slots=True)
class Option:
    """A worker that the request might go to."""

    candidate: Candidate
    ttft_s: float  # if it went there, pulls included
    num_pulled_tokens: int = 0  # that it would fetch from another worker
    num_queued: int = 0  # requests that the router keeps for it


@dataclass(frozen=True, slots=True)
class Explanation:
    """`decode_worker` is empty where the worker that prefills also decodes; both are where no worker is up, and where
    the request would be refused."""

    prefill_candidates: tuple[Option, ...]
    decode_candidates: tuple[Option, ...]
    home_worker_ids: tuple[str, ...]
    prefill_worker: str
    prefill_reason: str
    decode_worker: str
    decode_reason: str


def explain(
    config: RouterConfig,
    view: ClusterView,
    planner: Planner,
    links: Sequence[bytes],
    num_tokens: int,
    num_remaining_tokens: int,
    priority: int = 0,
    deadline_s: float | None = None,
) -> Explanation:
    planner = planner.copy()
    plan = planner.plan(links, num_tokens, num_remaining_tokens)
    reason = reason_of(plan) if plan else f"no worker is up; the request would wait {config.max_wait_s:g} s for one"
    if plan and (refused := planner.refusal(plan, priority, deadline_s)):
        plan, reason = None, f"refused now: {refused.message}"

    def option(worker: WorkerView, prefills: bool) -> Option:
        candidate, num_queued = view.candidate(worker, links, num_tokens), len(worker.queue)
        if not prefills:
            return Option(candidate, candidate.ttft_s, num_queued=num_queued)
        there = planner.plan_at(worker.worker_id, "", links, num_tokens, num_remaining_tokens)
        return Option(candidate, there.ttft_s, there.num_predicted_pulled_tokens, num_queued)

    return Explanation(
        prefill_candidates=tuple(option(worker, True) for worker in view.prefill_workers()),
        decode_candidates=tuple(option(worker, False) for worker in view.decode_workers()),
        home_worker_ids=view.home_worker_ids(links),
        prefill_worker=plan.prefill.worker_id if plan else "",
        prefill_reason=reason,
        decode_worker=plan.decode.worker_id if plan and plan.decode else "",
        decode_reason=plan.decode_reason if plan else "",
    )
