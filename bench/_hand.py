"""A hand on the router of a cluster, which no client has: to move running decodes from worker to worker. And a cluster
with Ray that gives one."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

from cluster.config import ServeConfig
from cluster.router_handle import LocalRouter, RouterHandle
from cluster.routers import Routers
from cluster.serve import LINK_TIMEOUT_S, served_model, with_folder
from cluster.supervisor import Supervisor
from engine.model_facts import read_model_facts
from router.config import RouterConfig
from router.events import Event
from router.router import Router
from router.server import RouterServer


@dataclass(frozen=True)
class Hand:
    server: RouterServer
    address: str  # where clients find it

    @property
    def router(self) -> Router:
        return self.server._driver.router

    def feed(self, event: Event) -> None:
        self.server._driver.feed(event)

    def decodes_at(self) -> Iterator[tuple[str, str]]:
        """Of every request in flight that has begun: its id and the worker that has it."""
        for in_flight in list(self.router._in_flight.values()):
            if in_flight.attempt is not None:
                yield in_flight.request_id, in_flight.attempt.plan.decoding_worker.worker_id

    @property
    def num_migrating(self) -> int:
        attempts = (in_flight.attempt for in_flight in self.router._in_flight.values())
        return sum(attempt is not None and attempt.migration is not None for attempt in attempts)


@contextlib.asynccontextmanager
async def serving_by_hand(config: ServeConfig) -> AsyncIterator[Hand]:
    """As cluster/serve.py puts it together, within a Ray that is up."""
    facts = read_model_facts(config.engine.model)
    hash_key = secrets.token_bytes(32)
    served = served_model(config, facts, hash_key)
    made: list[LocalRouter] = []

    def make_router(router_id: str, router: RouterConfig) -> RouterHandle:
        made.append(LocalRouter(router_id, router, served))
        return made[-1]

    routers = Routers([config.router], make_router, _say_nothing, config.worker_drain_timeout_s)
    supervisor = Supervisor(with_folder(config, facts), hash_key, routers, _say_nothing, "error")
    routers.wire(supervisor)
    try:
        [address] = await routers.start(config.num_prefill, config.num_decode)
        await supervisor.start()
        await routers.wait_ready(LINK_TIMEOUT_S)
        yield Hand(made[0]._server, address.grpc)
    finally:
        await routers.stop(0.0)
        await supervisor.stop()
        await asyncio.sleep(0)


def _say_nothing(subject: str, message: str) -> None:
    pass
