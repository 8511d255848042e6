from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace

import grpc
import pytest
from openai import AsyncOpenAI

from cluster.view_publisher import ViewPublisher
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import ClusterStub, InferenceStub
from protos.types import PeerRef
from router.config import RouterConfig
from router.published_view import Order
from router.served_model import ServedModel
from router.server import RouterServer
from tests.router.fake_worker import FINGERPRINT, Fabric, FakeWorker
from tests.router.tokenizers_for_tests import EOS_TOKEN_ID, byte_level

CONFIG = RouterConfig(
    listen="127.0.0.1:0",
    http_listen="127.0.0.1:0",
    hash_block_size=4,
    block_size=4,
    lease_s=6.0,  # machines stall: a test of something else must not lose its workers
    heartbeat_interval_s=0.1,
    connect_timeout_s=5.0,
)
SERVED = ServedModel(
    name="echo",
    architecture="EchoForCausalLM",
    dtype="float32",
    tokenizer=byte_level(),
    vocab_size=257,
    max_model_len=200,
    eos_token_ids=(EOS_TOKEN_ID,),
    model_fingerprint=FINGERPRINT,
    block_size=4,
    hash_block_size=4,
    hash_key=b"k" * 32,
)


@dataclass
class Service:
    """A router server, who publishes views to it, its fake workers and a client."""

    server: RouterServer
    publisher: ViewPublisher
    fabric: Fabric
    port: int
    channel: grpc.aio.Channel
    workers: dict[str, FakeWorker] = field(default_factory=dict)
    lost: list[tuple[PeerRef, str]] = field(default_factory=list)
    orders: list[Order] = field(default_factory=list)
    clients: list[AsyncOpenAI] = field(default_factory=list)

    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self.server.http_port}"

    def openai(self, token: str = "none") -> AsyncOpenAI:
        client = AsyncOpenAI(base_url=f"{self.http_url}/v1", api_key=token, max_retries=0, timeout=20)
        self.clients.append(client)
        return client

    @property
    def inference(self) -> InferenceStub:
        return InferenceStub(self.channel)

    @property
    def cluster(self) -> ClusterStub:
        return ClusterStub(self.channel)

    async def add(self, worker: FakeWorker) -> FakeWorker:
        self.workers[worker.worker_id] = worker
        await self.join(await worker.start())
        return worker

    async def join(self, ref: PeerRef) -> list[str]:
        """Why it is not reached."""
        self.publisher.joined(ref, pid=0)
        return [one.reason for one in await self.server.take(self.publisher.view)]

    async def expect(self, num_prefill: int, num_decode: int) -> None:
        self.publisher.expect(num_prefill, num_decode)
        await self.server.take(self.publisher.view)

    async def remove(self, worker_id: str, incarnation: str = "1") -> None:
        self.publisher.left(replace(self.workers[worker_id].ref, incarnation=incarnation))
        await self.server.take(self.publisher.view)

    async def follow(self) -> None:
        """As cluster/routers.py does, for as long as it runs."""
        self.publisher.router_up("router-0")
        while True:
            news = await self.server.news()
            for placed in news.orders:
                self.orders.append(placed.order)
                self.server.answer(placed.order_id, "")
            lost = self.publisher.heard("router-0", news)
            self.lost += [(one.ref, one.reason) for one in lost]
            await self.server.take(self.publisher.view)

    async def generate(self, **fields: object) -> list[pb.GenerateResponse]:
        request = pb.GenerateRequest(**fields)  # type: ignore[arg-type]
        return [response async for response in self.inference.Generate(request, timeout=20)]


async def eventually(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 (what is waited for has no event)
            await asyncio.sleep(0.01)


@pytest.fixture
async def launch() -> AsyncIterator[Callable[..., object]]:
    """launch(worker ids..., config=..., served=...): a service that listens; with any workers, a ready one."""
    services: list[Service] = []
    followers: list[asyncio.Task[None]] = []

    async def start(
        *worker_ids: str, config: RouterConfig = CONFIG, served: ServedModel = SERVED, token_s: float = 0.0
    ) -> Service:
        server = RouterServer(config, served)
        port = await server.start()
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        service = Service(server, ViewPublisher(config, 1), Fabric(token_s=token_s), port, channel)
        services.append(service)
        followers.append(asyncio.create_task(service.follow()))
        num_prefill = sum(worker_id.startswith("p") for worker_id in worker_ids)
        await service.expect(num_prefill, len(worker_ids) - num_prefill)
        for worker_id in worker_ids:
            worker = FakeWorker(worker_id, service.fabric)
            worker.warm_links = tuple(name for name in worker_ids if name.startswith("d"))
            await service.add(worker)
        if worker_ids:
            await server.wait_ready(10)
        return service

    yield start
    for follower in followers:
        follower.cancel()
    for service in services:
        for client in service.clients:
            await client.close()
        await service.channel.close()
        await service.server.stop(0)
        for worker in service.workers.values():
            await worker.kill()


def with_fields(**fields: object) -> RouterConfig:
    return replace(CONFIG, **fields)  # type: ignore[arg-type]
