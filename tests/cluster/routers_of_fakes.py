"""Routers that share a view, over real gRPC in one process: workers are fakes, and a router's death is played by its
handle. Real processes die in test_two_routers.py."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from cluster.aio_client import AsyncClient
from cluster.client_types import Route
from cluster.router_handle import LocalRouter, RouterAddress, RouterLost
from cluster.routers import Routers, router_configs
from protos.types import PeerRef, Role
from router.config import RouterConfig
from router.pool_counts import PoolCounts
from router.published_view import Order, RouterNews, Scale
from tests.router.conftest import SERVED
from tests.router.fake_worker import Fabric, FakeWorker

PROMPTS = [f"{number:03} is a prompt of its own" for number in range(60)]


class MortalRouter(LocalRouter):
    """Its process may die: its connections break, and whoever waits for it hears of that."""

    def __init__(self, router_id: str, config: RouterConfig) -> None:
        super().__init__(router_id, config, SERVED)
        self.death = asyncio.Event()

    async def news(self) -> RouterNews:
        hearing, dying = asyncio.create_task(super().news()), asyncio.create_task(self.death.wait())
        await asyncio.wait({hearing, dying}, return_when=asyncio.FIRST_COMPLETED)
        for task in (hearing, dying):
            task.cancel()
        if self.death.is_set():
            raise RouterLost(f"{self.router_id} has ended")
        return hearing.result()

    async def die(self) -> None:
        await self.stop(0.0)
        self.death.set()

    async def kill(self) -> None:
        self.death.set()


class Cluster:
    def __init__(self, config: RouterConfig) -> None:
        self.made: dict[str, list[MortalRouter]] = {}
        self.lost: list[PeerRef] = []
        self.leaving: set[PeerRef] = set()
        self.orders: list[Order] = []
        self.pool_counts: dict[Role, PoolCounts] = {}
        self.workers: dict[str, FakeWorker] = {}
        self.fabric = Fabric()
        self.routers = Routers(router_configs(config, 2), self.make, lambda who, what: None)
        self.routers.wire(self)
        self.addresses: list[RouterAddress] = []
        self.clients: list[AsyncClient] = []

    def on_worker_lost(self, ref: PeerRef, reason: str) -> None:
        self.lost.append(ref)

    def on_worker_leaving(self, ref: PeerRef) -> None:
        self.leaving.add(ref)

    def on_order(self, order: Order) -> str:
        self.orders.append(order)
        return "not in a test" if isinstance(order, Scale) else ""

    def on_pool_counts(self, router_id: str, counts: Mapping[Role, PoolCounts]) -> None:
        for role, one in counts.items():
            self.pool_counts[role] = self.pool_counts.get(role, PoolCounts()) + one

    def make(self, router_id: str, config: RouterConfig) -> MortalRouter:
        self.made.setdefault(router_id, []).append(MortalRouter(router_id, config))
        return self.made[router_id][-1]

    async def start(self, *worker_ids: str) -> None:
        num_prefill = sum(worker_id.startswith("p") for worker_id in worker_ids)
        self.addresses = await self.routers.start(num_prefill, len(worker_ids) - num_prefill)
        self.clients = [AsyncClient(address.grpc) for address in self.addresses]
        for worker_id in worker_ids:
            await self.add(worker_id)
        await self.routers.wait_ready(10)

    async def add(self, worker_id: str, incarnation: str = "1") -> None:
        self.workers[worker_id] = FakeWorker(worker_id, self.fabric, incarnation)
        await self.routers.add_worker(await self.workers[worker_id].start(), pid=0)

    async def stop(self) -> None:
        for client in self.clients:
            await client.close()
        await self.routers.stop(0)
        for worker in self.workers.values():
            await worker.kill()

    async def views(self) -> tuple[int, int]:
        one, other = [(await client.status()).view_version for client in self.clients]
        return one, other

    async def until_views(self, *versions: int) -> None:
        async with asyncio.timeout(10):
            while await self.views() != versions:  # noqa: ASYNC110 (what is waited for has no event)
                await asyncio.sleep(0.02)

    async def same_view(self, at_least: int) -> int:
        async with asyncio.timeout(10):
            while True:
                one, other = await self.views()
                if one == other >= at_least:
                    return one
                await asyncio.sleep(0.02)

    async def pairs(self) -> list[set[str]]:
        """The home pairs of PROMPTS, the same at both routers."""
        version = await self.same_view(1)
        routes = [await asyncio.gather(*(client.explain_route(one) for one in PROMPTS)) for client in self.clients]
        assert {route.view_version for each in routes for route in each} == {version}
        one, other = ([homes(route) for route in each] for each in routes)
        assert one == other
        assert all(len(pair) == 2 for pair in one)
        return one


def homes(route: Route) -> set[str]:
    return {candidate.worker_id for candidate in route.prefill_candidates if candidate.is_home}
