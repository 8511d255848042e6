"""What the page at /ui is told each second, as values that JSON can hold. Decides what is shown and how much of it;
prompts and texts are never part of it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from router.cluster_view import ClusterView, WorkerView
from router.config import RouterConfig
from router.hash_ring import RING_SIZE, HashRing
from router.published_view import KnownWorker
from router.recent_requests import EndedRequest, Flow, RecentRequests
from router.router import Router
from router.status import ClusterStatus

Json = dict[str, object]

MAX_SHOWN_REQUESTS = 50
MAX_SHOWN_FLOWS = 150
MAX_SHOWN_EVENTS = 20
CIRCLE = 65536  # steps in which points of a ring are drawn


@dataclass(frozen=True, slots=True)
class Serving:
    """What does not change while the router runs."""

    model: str
    version: str
    started_at_unix_s: float


def ui_state(
    config: RouterConfig,
    router: Router,
    status: ClusterStatus,
    recent: RecentRequests,
    serving: Serving,
    now_unix_s: float,
    known_rings: str = "",
) -> Json:
    """`known_rings`: the version of the rings that the page has; their points are left out where it is this one."""
    version = f"{serving.started_at_unix_s:.3f}-{status.num_changes}"
    flows = recent.flows(now_unix_s)
    return {
        "at_unix_s": now_unix_s,
        "cluster": _cluster(config, router, status, serving, now_unix_s),
        "workers": [_worker(known, router.view) for known in status.known.values()],
        "rings": {"version": version} if known_rings == version else _rings(config, router.view, version),
        "requests": [_request(ended) for ended in list(recent.ended)[-MAX_SHOWN_REQUESTS:]],
        "latencies": [_latency(ended) for ended in recent.ended if ended.num_output_tokens and ended.account],
        "flows": [_flow(flow) for flow in flows[:MAX_SHOWN_FLOWS]],
        "moved": _moved(flows),
        "events": [
            {"at_unix_s": event.at_unix_s, "message": event.message}
            for event in list(status.events)[-MAX_SHOWN_EVENTS:]
        ],
    }


def _cluster(config: RouterConfig, router: Router, status: ClusterStatus, serving: Serving, now_unix_s: float) -> Json:
    shortfall = status.shortfall()
    statistics = router.statistics
    return {
        "is_ready": not shortfall,
        "message": shortfall or "ready",
        "mode": config.mode,
        "model": serving.model,
        "version": serving.version,
        "uptime_s": now_unix_s - serving.started_at_unix_s,
        "num_in_flight": router.num_in_flight,
        "num_finished": statistics.num_finished,
        "num_failed": statistics.num_failed,
        "num_cancelled": statistics.num_cancelled,
        "num_failovers": statistics.num_failovers,
        "ttft_slo_s": config.ttft_slo_s,
        "tpot_slo_s": config.tpot_slo_s,
        "block_size": config.block_size,
    }


def _worker(known: KnownWorker, view: ClusterView) -> Json:
    live = view.find(known.ref.worker_id, known.ref.incarnation)
    return {
        "id": known.ref.worker_id,
        "role": known.ref.role.value,
        "incarnation": known.ref.incarnation,
        "is_up": known.is_up,
        "is_draining": known.is_draining,
        **(_load(live) if live is not None else {}),
    }


def _load(live: WorkerView) -> Json:
    stats = live.stats
    return {
        "num_running": stats.num_running,
        "num_waiting": stats.num_waiting,
        "num_queued": len(live.queue),
        "num_placed": live.num_requests,
        "num_pending_tokens": live.num_pending_tokens,
        "prefill_s_per_token": stats.prefill_s_per_token,
        "blocks": {
            "total": stats.num_blocks,
            "held": stats.num_held_blocks,
            "leased": stats.num_leased_blocks,
            "cached": stats.num_cached_blocks,
            "free": stats.num_free_blocks,
        },
    }


def _rings(config: RouterConfig, view: ClusterView, version: str) -> Json:
    worker_ids = sorted(view.rings.members)
    return {
        "version": version,
        "circle": CIRCLE,
        "key_depth_tokens": config.key_depth_blocks * config.hash_block_size,
        "worker_ids": worker_ids,
        "rings": [_ring(ring, worker_ids) for ring in view.rings.rings],
    }


def _ring(ring: HashRing, worker_ids: Sequence[str]) -> Json:
    """By worker, in the order of worker_ids: its share of the keys, and its points in steps of the circle."""
    sizes = dict.fromkeys(worker_ids, 0)
    points: dict[str, list[int]] = {worker_id: [] for worker_id in worker_ids}
    around = [(ring.points[-1][0] - RING_SIZE, ""), *ring.points] if ring.points else []
    for (before, _), (point, worker_id) in pairwise(around):
        sizes[worker_id] += point - before
        points[worker_id].append(point * CIRCLE // RING_SIZE)
    return {"shares": [size / RING_SIZE for size in sizes.values()], "points": list(points.values())}


def _request(ended: EndedRequest) -> Json:
    account = ended.account
    told: Json = {
        "id": ended.request_id,
        "ended_at_unix_s": ended.ended_at_unix_s,
        "outcome": ended.outcome,
        "num_prompt_tokens": ended.num_prompt_tokens,
        "num_output_tokens": ended.num_output_tokens,
    }
    if account is None:
        return told
    return told | {
        "prefill_worker": account.prefill_worker,
        "decode_worker": account.decode_worker,
        "mode": account.mode.value if account.mode else "",
        "num_attempts": account.num_attempts,
        "num_cached_tokens": account.num_cached_tokens,
        "ttft_s": account.ttft_s,
        "tpot_s": account.tpot_s,
        "e2e_s": account.e2e_s,
    }


def _latency(ended: EndedRequest) -> list[float]:
    """TTFT and TPOT; TPOT is 0 where there was one output token."""
    assert ended.account is not None
    return [round(ended.account.ttft_s, 5), round(ended.account.tpot_s, 6)]


def _flow(flow: Flow) -> Json:
    return {
        "prefill_worker": flow.prefill_worker,
        "decode_worker": flow.decode_worker,
        "num_requests": flow.num_requests,
        "num_kv_bytes": flow.num_kv_bytes,
    }


def _moved(flows: Sequence[Flow]) -> Json:
    """Of all flows, those that are not shown among them."""
    handed = [flow for flow in flows if flow.prefill_worker != flow.decode_worker]
    num_handed = sum(flow.num_requests for flow in handed)
    return {
        "num_handed_over": num_handed,
        "num_local": sum(flow.num_requests for flow in flows) - num_handed,
        "num_kv_bytes": sum(flow.num_kv_bytes for flow in handed),
    }
