"""`twinring serve` with requests that wander: `python -m bench._wandering INTERVAL_S serve ...` wants each running
decode to go on at another decode worker, once every INTERVAL_S. For tests of migrations: in a cluster that serves,
relief and drain say who goes where."""

from __future__ import annotations

import asyncio
import sys

import cluster.serve
from cluster.cli import main
from cluster.router_handle import LocalRouter, RouterAddress
from protos.types import Role
from router.events import MigrationWanted
from router.router import Router


def wanted(router: Router, turn: int) -> list[MigrationWanted]:
    """Of every request, the next worker in the order of names."""
    decode = sorted(view.worker_id for view in router.view.workers.values() if view.ref.role is Role.DECODE)
    moves = []
    for in_flight in router._in_flight.values():
        here = in_flight.attempt.plan.decoding_worker.worker_id if in_flight.attempt else ""
        others = [worker_id for worker_id in decode if worker_id != here]
        if here in decode and others:
            moves.append(MigrationWanted(in_flight.request_id, others[turn % len(others)], "it wanders"))
    return moves


class WanderingRouter(LocalRouter):
    interval_s = 1.0

    async def start(self) -> RouterAddress:
        address = await super().start()
        self._wandering = asyncio.create_task(self._wander())
        return address

    async def stop(self, grace_s: float) -> None:
        self._wandering.cancel()
        await super().stop(grace_s)

    async def _wander(self) -> None:
        turn = 0
        while True:
            await asyncio.sleep(self.interval_s)
            turn += 1
            for each in wanted(self._server._driver.router, turn):
                self._server._driver.feed(each)


if __name__ == "__main__":
    WanderingRouter.interval_s = float(sys.argv.pop(1))
    vars(cluster.serve)["LocalRouter"] = WanderingRouter
    main()
