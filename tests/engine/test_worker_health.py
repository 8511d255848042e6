"""What a probe is told: the truth about the engine and the router's lease, and nothing once the worker stops."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engine.scheduler_output import SchedulerOutput, StepResult
from engine.worker_config import LeaseConfig
from engine.worker_health import WorkerHealth
from protos import codec
from protos import worker_pb2_grpc as pb_grpc
from protos.types import RouterCommand
from tests.engine.test_worker_host import Workplace, a_request, hello

BEAT_S = 0.02
UP, DOWN = "SERVING", "NOT_SERVING"


@contextlib.asynccontextmanager
async def probed(place: Workplace) -> AsyncIterator[tuple[WorkerHealth, grpc.aio.Channel]]:
    health = WorkerHealth(place.host)
    health.add_to_server(place.server)
    await health.show()
    async with place, grpc.aio.insecure_channel(place.me.address) as channel:
        task = asyncio.create_task(health.keep(BEAT_S))
        yield health, channel
        task.cancel()


async def answers(channel: grpc.aio.Channel) -> dict[str, str]:
    stub = health_pb2_grpc.HealthStub(channel)
    found = {}
    for service in ("live", "ready", ""):
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5.0)
        found[service] = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return found


async def answers_become(channel: grpc.aio.Channel, live: str, ready: str) -> None:
    expected = {"live": live, "ready": ready, "": ready}
    async with asyncio.timeout(5.0):
        while await answers(channel) != expected:  # noqa: ASYNC110  (across a process there is nothing to wait on)
            await asyncio.sleep(BEAT_S)


async def test_ready_comes_and_goes_with_the_router() -> None:
    async with probed(Workplace(LeaseConfig(heartbeat_interval_s=0.05, lease_s=5.0))) as (_, channel):
        assert await answers(channel) == {"live": UP, "ready": DOWN, "": DOWN}
        stream = pb_grpc.WorkerStub(channel).Connect()
        await stream.write(hello())
        await stream.read()
        await answers_become(channel, UP, UP)
        stream.cancel()
        await answers_become(channel, UP, DOWN)


async def test_a_hung_engine_is_neither_live_nor_ready_until_it_goes_on() -> None:
    go_on = threading.Event()

    def hang(output: SchedulerOutput) -> StepResult:
        assert go_on.wait(10.0)
        return place.sample_sevens(output)

    place = Workplace(LeaseConfig(heartbeat_interval_s=0.05, lease_s=10.0, max_step_s=0.1))
    place.execute = hang
    async with probed(place) as (_, channel):
        stream = pb_grpc.WorkerStub(channel).Connect()
        await stream.write(hello())
        await stream.read()
        await answers_become(channel, UP, UP)
        await stream.write(codec.command_to_proto(RouterCommand(submits=(a_request("r", 2),))))
        await answers_become(channel, DOWN, DOWN)
        go_on.set()
        await answers_become(channel, UP, UP)


async def test_a_stopping_worker_is_neither_live_nor_ready_for_good() -> None:
    async with probed(Workplace(LeaseConfig(heartbeat_interval_s=0.05, lease_s=5.0))) as (health, channel):
        assert (await answers(channel))["live"] == UP
        await health.stop()
        await health.show()
        assert set((await answers(channel)).values()) == {DOWN}
