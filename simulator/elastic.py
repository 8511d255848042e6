"""Pools that change their sizes in mid-run: what routers tell of them, and what becomes of the autoscaler's wishes. The
live counterparts are router/driver.py and cluster/supervisor.py; the decisions are those of router/pool_counts.py,
router/autoscaling.py and router/pools.py, which ship. Decides nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from protos.types import Role
from router.autoscaling import Autoscaling
from router.events import Deliver, Fail
from router.pool_counts import PoolWatch
from router.pools import DISAGGREGATED, Pools, Turn
from simulator.result import PoolEvent

if TYPE_CHECKING:
    from router.router import Router
    from simulator.cluster import SimulatedCluster
    from simulator.setup import Setup

ROUTER_ID = "router-0"


class ElasticPools:
    """Invariant: every worker of `_pools.slots` serves, is in `_coming`, or is a `_turning` one's next life; who is
    in `_leaving` drains and is none of them."""

    def __init__(self, setup: Setup, cluster: SimulatedCluster) -> None:
        self.events: list[PoolEvent] = []
        self._setup = setup
        self._cluster = cluster
        slots = [(f"{pool}-{i}", role) for pool, role in DISAGGREGATED.items() for i in range(setup.num_of(role))]
        self._pools = Pools(DISAGGREGATED, slots, not setup.num_host_tokens, _check)
        self._autoscaling = Autoscaling(setup.autoscaler, self._pools.may_turn)
        self._watch = PoolWatch(setup.router)
        self._coming: set[str] = set()
        self._leaving: set[str] = set()

    # --- what the router sees -----------------------------------------------------------------------------------------

    def heard(self, effect: Deliver | Fail) -> None:
        """A word to a client."""
        self._watch.heard(effect)

    def tick(self, router: Router, now: float) -> None:
        self._watch.look(router.view)
        sizes = self._pools.settled(self._cluster.worker_ids, changing=[*self._coming, *self._leaving])
        resizes = self._autoscaling.heard(ROUTER_ID, self._watch.take(), sizes, now)
        for together in self._autoscaling.at_once(resizes):
            self.events += [PoolEvent(now, resize.reason) for resize in together]
            try:
                self._scale({self._pools.pool_of(resize.role): resize.num_workers for resize in together})
            except ValueError as error:
                self.events.append(PoolEvent(now, f"not possible: {error}"))

    # --- who comes and goes -------------------------------------------------------------------------------------------

    def _scale(self, sizes: dict[str, int]) -> None:
        changes = self._pools.scale(sizes, taken=self._cluster.worker_ids | self._leaving)
        for worker_id in changes.starts:
            self._start(worker_id, self._setup.worker_start_s)
        for worker_id in changes.drains:
            self._drain(worker_id, None)
        for turn in changes.turns:
            self._drain(turn.worker_id, turn)

    def _start(self, worker_id: str, after_s: float) -> None:
        role = self._pools.slots[worker_id]
        self._coming.add(worker_id)
        self._cluster.load.started(worker_id, role, self._cluster.clock.now)
        self._cluster.clock.after(after_s, self._join, worker_id, role)

    def _join(self, worker_id: str, role: Role) -> None:
        self._coming.remove(worker_id)
        self._cluster.join(worker_id, role)

    def _drain(self, worker_id: str, turn: Turn | None) -> None:
        self._leaving.add(worker_id)

        def left(is_idle: bool) -> None:
            self._leaving.remove(worker_id)
            if turn is not None:
                self._start(turn.becomes, self._setup.turn_s if is_idle else self._setup.worker_start_s)

        self._cluster.drain(worker_id, self._setup.worker_drain_timeout_s, left)


def _check(sizes: Mapping[str, int]) -> None:
    """As cluster/config.py has it."""
    if sizes["prefill"] < 1:
        raise ValueError(f"num_prefill must be at least 1, not {sizes['prefill']}")
