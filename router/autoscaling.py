"""Adds up what the routers say of the pools, and asks the autoscaler at regular times. Who carries out what it wants is
cluster/supervisor.py and, under virtual time, simulator/elastic.py."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from protos.types import Role
from router.autoscaler import Autoscaler, AutoscalerConfig, PoolLoad, Resize
from router.pool_counts import PoolCounts

LOOK_INTERVAL_S = 5.0
MIN_ENDED = 10  # requests in window_s, below which their share in the SLO is chance


@dataclass(frozen=True, slots=True)
class _Look:
    at: float
    num_ended: int
    num_in_slo: int
    use: float


class Autoscaling:
    """Invariant: `_counts` has what came since the last look, by router; `_looks` the looks of the last `window_s` in
    which the pool was as it is now."""

    def __init__(self, config: AutoscalerConfig, may_turn: bool) -> None:
        """may_turn: a worker can change its role without loading the model again."""
        self._autoscaler = Autoscaler(config, may_turn)
        self._changes_roles = config.changes_roles and may_turn
        self._window_s = config.window_s
        self._counts: dict[str, dict[Role, PoolCounts]] = {}
        self._looks: dict[Role, deque[_Look]] = {role: deque() for role in Role}
        self._looked_at: float | None = None

    def heard(
        self, router_id: str, counts: Mapping[Role, PoolCounts], sizes: Mapping[Role, int], now: float
    ) -> list[Resize]:
        """What should change now. `sizes`: of the pools that may, as they are."""
        known = self._counts.setdefault(router_id, {})
        for role, one in counts.items():
            known[role] = known.get(role, PoolCounts()) + one
        if self._looked_at is None:
            self._looked_at = now
        if now - self._looked_at < LOOK_INTERVAL_S:
            return []
        loads = {role: load for role, size in sizes.items() if (load := self._load(role, size, now)) is not None}
        self._looked_at, self._counts = now, {}
        resizes = self._autoscaler.decide(loads, now)
        for role in Role:
            if role not in sizes or any(resize.role is role for resize in resizes):
                self._looks[role].clear()  # at a pool of another size
        return resizes

    def at_once(self, resizes: Sequence[Resize]) -> list[Sequence[Resize]]:
        """Which of them are carried out together: then a worker goes over from the one pool to the other."""
        return [resizes] if resizes and self._changes_roles else [[resize] for resize in resizes]

    def _load(self, role: Role, size: int, now: float) -> PoolLoad | None:
        """Routers have requests of their own, so these add up, and so does the work that waits in each of them; of what
        is in use workers tell all of them the same. None where nobody has seen the pool."""
        by_router = [counts[role] for counts in self._counts.values() if role in counts]
        seen = [counts for counts in by_router if counts.num_looks]
        if not seen:
            return None
        look = _Look(
            now,
            num_ended=sum(counts.num_ended for counts in by_router),
            num_in_slo=sum(counts.num_in_slo for counts in by_router),
            use=max(counts.use / counts.num_looks for counts in seen)
            + sum(counts.use_elsewhere / counts.num_looks for counts in seen),
        )
        looks = self._recent(role, look)
        num_ended = sum(one.num_ended for one in looks)
        return PoolLoad(
            num_workers=size,
            attainment=sum(one.num_in_slo for one in looks) / num_ended if num_ended >= MIN_ENDED else 1.0,
            queue=sum(counts.queue / counts.num_looks for counts in seen),
            use=sum(one.use for one in looks) / len(looks) if role is Role.PREFILL else look.use,
        )

    def _recent(self, role: Role, look: _Look) -> deque[_Look]:
        """With this one. Between two looks few requests end, and whether few workers are busy is chance. How much KV
        memory is in use is none."""
        looks = self._looks[role]
        looks.append(look)
        while looks[0].at <= look.at - self._window_s:
            looks.popleft()
        return looks
