"""How long running requests are waited for when serving ends: a real gRPC server with a call that never ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import cast

import grpc.aio
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from cluster.routers import Routers
from cluster.serve import _drain


class OneEndlessCall:
    """Stops as Routers does; its only call is a Watch."""

    def __init__(self) -> None:
        self.server = grpc.aio.server()
        health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), self.server)
        self.port = self.server.add_insecure_port("127.0.0.1:0")

    async def stop(self, grace_s: float) -> None:
        await self.server.stop(grace_s)


@pytest.fixture
async def running() -> AsyncIterator[tuple[Routers, asyncio.Task[object]]]:
    router = OneEndlessCall()
    await router.server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{router.port}") as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        await watch.read()
        yield cast(Routers, router), asyncio.create_task(watch.read())
        await router.stop(0.0)


async def test_a_running_call_ends_when_its_time_is_over(running: tuple[Routers, asyncio.Task[object]]) -> None:
    router, call = running
    async with asyncio.timeout(20.0):
        await _drain(router, 0.2, asyncio.Event())
        with pytest.raises(grpc.aio.AioRpcError):
            await call


async def test_a_second_signal_ends_a_long_drain_at_once(running: tuple[Routers, asyncio.Task[object]]) -> None:
    router, call = running
    stop_now = asyncio.Event()
    draining = asyncio.create_task(_drain(router, 3600.0, stop_now))
    await asyncio.sleep(0.3)
    assert not draining.done() and not call.done()
    stop_now.set()
    async with asyncio.timeout(20.0):
        await draining
        with pytest.raises(grpc.aio.AioRpcError):
            await call
