"""Adds up what the routers say of the pools, and asks the autoscaler at regular times. Pure; who carries out what it
wants is supervisor.py."""

from __future__ import annotations

from collections.abc import Mapping

from protos.types import Role
from router.autoscaler import Autoscaler, AutoscalerConfig, PoolLoad, Resize
from router.pool_counts import PoolCounts

LOOK_INTERVAL_S = 5.0


class Autoscaling:
    """Invariant: `_counts` has what came since the last look, by router."""

    def __init__(self, config: AutoscalerConfig) -> None:
        self._autoscaler = Autoscaler(config)
        self._counts: dict[str, dict[Role, PoolCounts]] = {}
        self._looked_at: float | None = None

    def heard(
        self, router_id: str, counts: Mapping[Role, PoolCounts], sizes: Mapping[Role, int], now: float
    ) -> list[Resize]:
        """What should change now. `sizes`: as the pools should be at present."""
        known = self._counts.setdefault(router_id, {})
        for role, one in counts.items():
            known[role] = known.get(role, PoolCounts()) + one
        if self._looked_at is None:
            self._looked_at = now
        if now - self._looked_at < LOOK_INTERVAL_S:
            return []
        loads = {role: load for role, size in sizes.items() if (load := self._load(role, size)) is not None}
        self._looked_at, self._counts = now, {}
        return self._autoscaler.decide(loads, now)

    def _load(self, role: Role, size: int) -> PoolLoad | None:
        """Routers have requests of their own, so these add up, and so does the work that waits in each of them; of what
        is in use workers tell all of them the same. None where nobody has seen the pool."""
        by_router = [counts[role] for counts in self._counts.values() if role in counts]
        seen = [counts for counts in by_router if counts.num_looks]
        if not seen:
            return None
        num_ended = sum(counts.num_ended for counts in by_router)
        num_in_slo = sum(counts.num_in_slo for counts in by_router)
        return PoolLoad(
            num_workers=size,
            attainment=num_in_slo / num_ended if num_ended else 1.0,
            queue_s=sum(counts.queue_s / counts.num_looks for counts in seen),
            use=max(counts.use / counts.num_looks for counts in seen),
        )
