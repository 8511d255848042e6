"""Whether a new request is taken now. One that could only miss its SLO in a queue is refused at once, with the time
after which it is worth coming back. Pure; knows the plan, not the queues behind it."""

from __future__ import annotations

from dataclasses import dataclass

from router.config import RouterConfig
from router.events import RefusedFor
from router.policy import WorkerLoad

MIN_RETRY_AFTER_S = 0.1


@dataclass(frozen=True, slots=True)
class Refusal:
    reason: RefusedFor
    message: str
    retry_after_s: float


def early_refusal(
    config: RouterConfig,
    estimate_s: float,
    priority: int,
    deadline_s: float | None,
    prefill: WorkerLoad,
    decoding: WorkerLoad,
) -> Refusal | None:
    """`prefill` and `decoding` are where the request would go: the best there is; `estimate_s` is what its first token
    would take there, behind what is queued and what was sent. None where it is taken.

    A request of priority above 0 goes ahead of what is pending, so that is not held against it."""
    if decoding.num_requests >= config.max_requests_per_worker:
        message = f"{decoding.worker_id} has {decoding.num_requests} requests, and no other worker has fewer"
        return Refusal(RefusedFor.WORKERS_FULL, message, config.ttft_slo_s)
    limit_s = config.ttft_slo_s if deadline_s is None else min(config.ttft_slo_s, deadline_s)
    if not config.refuses_early or priority > 0 or estimate_s <= limit_s or prefill.num_pending_tokens == 0:
        return None
    message = (
        f"the first token would come after {estimate_s:.2f} s, {limit_s:g} s are allowed: "
        f"{prefill.num_pending_tokens} tokens are pending on {prefill.worker_id}"
    )
    return Refusal(RefusedFor.SLO, message, max(MIN_RETRY_AFTER_S, estimate_s - limit_s))
