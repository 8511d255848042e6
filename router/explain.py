"""Where a request would go now, and why: by a copy of the planner for real ones, and what it saw of every worker.
Reads the view, changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from router.cluster_view import ClusterView
from router.config import RouterConfig
from router.placement import Planner
from router.policy import Candidate


@dataclass(frozen=True, slots=True)
class Explanation:
    """`decode_worker` is empty where the worker that prefills also decodes; both are where no worker is up, and where
    the request would be refused."""

    prefill_candidates: tuple[Candidate, ...]
    decode_candidates: tuple[Candidate, ...]
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
    reason = plan.prefill_reason if plan else f"no worker is up; the request would wait {config.max_wait_s:g} s for one"
    if plan and (refused := planner.refusal(plan, priority, deadline_s)):
        plan, reason = None, f"refused now: {refused.message}"
    return Explanation(
        prefill_candidates=tuple(view.candidate(worker, links, num_tokens) for worker in view.prefill_workers()),
        decode_candidates=tuple(view.candidate(worker, links, num_tokens) for worker in view.decode_workers()),
        home_worker_ids=view.home_worker_ids(links),
        prefill_worker=plan.prefill.worker_id if plan else "",
        prefill_reason=reason,
        decode_worker=plan.decode.worker_id if plan and plan.decode else "",
        decode_reason=plan.decode_reason if plan else "",
    )
