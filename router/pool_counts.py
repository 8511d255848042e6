"""How the pools do, as one router sees it: sums that may be added up over routers and over time. Decides nothing; what
is made of them is autoscaler.py's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from protos.types import Role
from router.cluster_view import ClusterView, WorkerView
from router.config import RouterConfig


@dataclass(frozen=True, slots=True)
class PoolCounts:
    """A look at a pool of which no worker was up counts as none."""

    num_ended: int = 0  # requests
    num_in_slo: int = 0  # of them: TTFT for prefill, TPOT for decode
    num_looks: int = 0
    queue_s: float = 0.0  # work that waits, per worker: summed over the looks
    use: float = 0.0  # share that is in use: summed over the looks

    def __add__(self, other: PoolCounts) -> PoolCounts:
        return PoolCounts(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))


class PoolWatch:
    """Invariant: it has what was seen since take() was last called."""

    def __init__(self, config: RouterConfig) -> None:
        self._config = config
        self._counts = dict.fromkeys(Role, PoolCounts())

    def ended(self, ttft_s: float, tpot_s: float) -> None:
        """A request that was not cut off."""
        for role, took_s, slo_s in (
            (Role.PREFILL, ttft_s, self._config.ttft_slo_s),
            (Role.DECODE, tpot_s, self._config.tpot_slo_s),
        ):
            self._counts[role] += PoolCounts(num_ended=1, num_in_slo=took_s <= slo_s)

    def look(self, view: ClusterView) -> None:
        """At regular times."""
        for role, pool, use_of in (
            (Role.PREFILL, view.prefill_workers(), _is_busy),
            (Role.DECODE, view.decode_workers(), _kv_use),
        ):
            if pool:
                use = sum(map(use_of, pool)) / len(pool)
                self._counts[role] += PoolCounts(num_looks=1, queue_s=_queue_s(pool), use=use)

    def take(self) -> dict[Role, PoolCounts]:
        counts, self._counts = self._counts, dict.fromkeys(Role, PoolCounts())
        return counts


def _queue_s(pool: Sequence[WorkerView]) -> float:
    return sum(worker.sent_s + worker.queue.work_s for worker in pool) / len(pool)


def _is_busy(worker: WorkerView) -> bool:
    return worker.stats.num_running + worker.stats.num_waiting > 0


def _kv_use(worker: WorkerView) -> float:
    """Of its KV memory; what is only cached makes room."""
    stats = worker.stats
    return (stats.num_held_blocks + stats.num_leased_blocks) / stats.num_blocks if stats.num_blocks else 0.0
