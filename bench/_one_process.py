"""A whole cluster in this process, without Ray: the shipping workers and the shipping router, over real gRPC and real
KV links, with a hand on the router."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

from bench._hand import Hand
from cluster.config import ServeConfig
from cluster.serve import served_model
from cluster.view_publisher import ViewPublisher
from decode_worker.actor import DecodeWorker
from engine.model_facts import read_model_facts
from engine.worker import Worker
from engine.worker_config import WorkerSpec
from prefill_worker.actor import PrefillWorker
from protos.types import Role, WorkerStats
from router.server import RouterServer

ROUTER_ID = "router-0"


@dataclass
class OneProcess:
    """Invariant: every worker in `workers` is a member of the published view."""

    config: ServeConfig
    server: RouterServer
    publisher: ViewPublisher
    hash_key: bytes
    hand: Hand = field(init=False)
    workers: dict[str, Worker] = field(default_factory=dict)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def stats(self) -> dict[str, WorkerStats]:
        """Of this moment, as the workers' cores recompute them between two steps."""
        return {worker_id: worker._engine.stats for worker_id, worker in self.workers.items()}

    def is_quiet(self) -> bool:
        """Nobody has anything, and every ledger balances."""
        return self.hand.router.num_in_flight == 0 and all(
            stats.ledger_balanced and stats.num_held_blocks == stats.num_leased_blocks == stats.num_waiting == 0
            for stats in self.stats().values()
        )

    async def start(self) -> None:
        self.hand = Hand(self.server, f"127.0.0.1:{await self.server.start()}")
        self.publisher.router_up(ROUTER_ID)
        for role, num_workers in ((Role.PREFILL, self.config.num_prefill), (Role.DECODE, self.config.num_decode)):
            for index in range(num_workers):
                await self._join(f"{role.value}-{index}", role)
        self._tasks.append(asyncio.create_task(self._follow()))
        await self.server.wait_ready(30.0)

    async def _join(self, worker_id: str, role: Role) -> None:
        config = self.config
        spec = WorkerSpec(worker_id, f"{worker_id}-life", role, config.engine, self.hash_key, config.lease)
        worker = (PrefillWorker if role is Role.PREFILL else DecodeWorker)(spec, config.transfer)
        await worker.load()
        ready = await worker.serve()
        self.workers[worker_id] = worker
        self.publisher.joined(ready.ref, ready.pid)
        await self.server.take(self.publisher.view)

    async def _follow(self) -> None:
        while True:
            self.publisher.heard(ROUTER_ID, await self.server.news())
            await self.server.take(self.publisher.view)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await self.server.stop(0.0)
        for worker in self.workers.values():
            await worker.stop(1.0)


@contextlib.asynccontextmanager
async def one_process(config: ServeConfig) -> AsyncIterator[OneProcess]:
    facts = read_model_facts(config.engine.model)
    hash_key = secrets.token_bytes(32)
    router = replace(config.router, listen="127.0.0.1:0", http_listen="")
    server = RouterServer(router, served_model(config, facts, hash_key), ROUTER_ID)
    publisher = ViewPublisher(router, 1)
    publisher.expect(config.num_prefill, config.num_decode)
    cluster = OneProcess(config, server, publisher, hash_key)
    try:
        await cluster.start()
        yield cluster
    finally:
        await cluster.stop()
