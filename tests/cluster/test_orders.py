"""Operators' orders and workers that want to leave, with two routers over real gRPC: how drains travel with the view,
and when they are over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from cluster.aio_client import AsyncClient
from cluster.client_types import CallFailed, Chunk, RetryPolicy, Sampling
from router.published_view import Drain
from tests.cluster.routers_of_fakes import PROMPTS, Cluster
from tests.router.conftest import CONFIG, eventually

SHORT = Sampling(max_tokens=3)
LONG = Sampling(max_tokens=100)


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    one = Cluster(CONFIG)
    yield one
    await one.stop()


def states(cluster: Cluster) -> list[dict[str, str]]:
    """By worker, as each router's operators see them."""
    servers = [lives[-1]._server for lives in cluster.made.values()]
    return [{load.worker_id: load.state for load in server._worker_loads()} for server in servers]


async def test_a_drain_travels_with_the_view_and_is_over_when_no_router_needs_the_worker(cluster: Cluster) -> None:
    await cluster.start("p-0", "p-1", "d-0", "d-1")
    cluster.fabric.token_s = 0.02
    streams = [client.stream("a long one", LONG) for client in cluster.clients]
    for stream in streams:
        await anext(stream)
    num_submits = {name: len(worker.submits) for name, worker in cluster.workers.items()}
    draining = [
        asyncio.create_task(cluster.routers.drain_worker(cluster.workers[name].ref, 20.0)) for name in ("p-1", "d-1")
    ]
    await eventually(lambda: all(one["p-1"] == one["d-1"] == "draining" for one in states(cluster)), 0.5)
    cluster.fabric.token_s = 0.0
    for index, prompt in enumerate(PROMPTS):
        await cluster.clients[index % 2].generate(prompt, SHORT)
    for name in ("p-1", "d-1"):
        assert len(cluster.workers[name].submits) == num_submits[name], name
    rests = [[chunk async for chunk in stream] for stream in streams]
    assert all(rest[-1].completion is not None for rest in rests)
    assert await asyncio.gather(*draining) == [True, True]
    for name in ("p-1", "d-1"):
        await cluster.routers.remove_worker(cluster.workers[name].ref)
        assert not any(name in one for one in states(cluster))
    assert cluster.lost == []
    assert [(await client.status()).num_failovers for client in cluster.clients] == [0, 0]


async def test_a_drain_takes_no_longer_than_it_may(cluster: Cluster) -> None:
    await cluster.start("p-0", "d-0", "d-1")
    cluster.fabric.token_s = 0.05
    stream = cluster.clients[1].stream("a long one", LONG)
    await anext(stream)
    (busy,) = (worker for name, worker in cluster.workers.items() if name[0] == "d" and worker.generating)
    began_at = time.monotonic()
    assert await cluster.routers.drain_worker(busy.ref, 0.4) is False
    assert 0.4 <= time.monotonic() - began_at < 2.0
    await cluster.routers.remove_worker(busy.ref)
    cluster.fabric.token_s = 0.0
    rest = [chunk async for chunk in stream]
    assert rest[-1].completion is not None
    assert len(rest[-1].completion.token_ids) == 100
    assert (await cluster.clients[1].status()).num_failovers == 1, "it went on elsewhere"


async def test_one_that_dies_while_it_drains_is_gone(cluster: Cluster) -> None:
    await cluster.start("p-0", "d-0", "d-1")
    cluster.fabric.token_s = 0.05
    stream = cluster.clients[0].stream("a long one", LONG)
    await anext(stream)
    (busy,) = (worker for name, worker in cluster.workers.items() if name[0] == "d" and worker.generating)
    draining = asyncio.create_task(cluster.routers.drain_worker(busy.ref, 20.0))
    await asyncio.sleep(0.1)
    await busy.kill()
    async with asyncio.timeout(10):
        assert await draining is True
    await stream.aclose()


async def test_a_router_that_comes_meanwhile_learns_who_drains(cluster: Cluster) -> None:
    await cluster.start("p-0", "p-1", "d-0")
    cluster.workers["p-1"].num_held_blocks = 1  # it never ends by itself
    draining = asyncio.create_task(cluster.routers.drain_worker(cluster.workers["p-1"].ref, 60.0))
    await cluster.made["router-1"][0].die()
    await eventually(lambda: len(cluster.made["router-1"]) == 2)
    await eventually(lambda: [one.get("p-1") for one in states(cluster)] == ["draining"] * 2)
    await cluster.made["router-1"][1].wait_ready(10)
    for prompt in PROMPTS[:10]:
        assert "p-1" not in (await cluster.clients[1].explain_route(prompt)).prefill_worker
    assert not draining.done()
    cluster.workers["p-1"].num_held_blocks = 0
    async with asyncio.timeout(10):
        assert await draining is True


async def test_a_worker_that_was_told_to_end_says_so_to_every_router(cluster: Cluster) -> None:
    await cluster.start("p-0", "p-1", "d-0")
    cluster.workers["p-1"].is_leaving = True
    await eventually(lambda: cluster.leaving == {cluster.workers["p-1"].ref}, 2.0)


async def test_orders_reach_who_keeps_the_workers_and_refusals_come_back(cluster: Cluster) -> None:
    await cluster.start("p-0", "d-0")
    await cluster.clients[0].drain("p-0", timeout_s=3.0)
    await cluster.clients[1].drain("d-0", replace=True)
    assert cluster.orders == [Drain("p-0", 3.0), Drain("d-0", None, replaces=True)]
    with pytest.raises(CallFailed, match="not in a test"):
        await cluster.clients[1].scale({"prefill": 2})
    with pytest.raises(CallFailed, match="timeout_s must not be negative, not -1"):
        await cluster.clients[1].drain("p-0", timeout_s=-1.0)


async def test_a_router_that_drains_finishes_its_streams_and_its_clients_go_on_at_the_other(cluster: Cluster) -> None:
    await cluster.start("p-0", "d-0")
    cluster.fabric.token_s = 0.02
    both = [address.grpc for address in reversed(cluster.addresses)]
    async with AsyncClient(both) as client:
        stream = client.stream("a long one", LONG)
        chunks: list[Chunk] = [await anext(stream)]
        await client.drain("router-1")
        with pytest.raises(CallFailed, match="router-1 drains already"):
            await cluster.clients[0].drain("router-1")
        with pytest.raises(CallFailed, match="router-0 is the only router that takes calls"):
            await cluster.clients[0].drain("router-0")
        await asyncio.sleep(0.1)
        assert (await client.generate("abc", SHORT)).text == "abc"
        assert client.address == cluster.addresses[0].grpc
        chunks += [chunk async for chunk in stream]
    assert chunks[-1].completion is not None
    assert (len(chunks[-1].completion.token_ids), chunks[-1].completion.num_resumes) == (100, 0)
    await eventually(lambda: "router-1" not in cluster.routers._up)
    await asyncio.sleep(1.0)
    assert len(cluster.made["router-1"]) == 1, "nobody takes its place"
    with pytest.raises(CallFailed, match="router-1 is not up"):
        await cluster.clients[0].drain("router-1")
    events = [event.message for event in (await cluster.clients[0].status()).events]
    assert events[-2:] == ["router-1 drains", "router-1 has left"]


async def test_a_router_that_was_told_to_end_is_drained_and_replaced(cluster: Cluster) -> None:
    await cluster.start("p-0", "d-0")
    cluster.fabric.token_s = 0.02
    stream = cluster.clients[1].stream("a long one", Sampling(max_tokens=40))
    chunks = [await anext(stream)]
    await asyncio.to_thread(cluster.made["router-1"][0]._server.leave)
    chunks += [chunk async for chunk in stream]
    assert chunks[-1].completion is not None
    assert (len(chunks[-1].completion.token_ids), chunks[-1].completion.num_resumes) == (40, 0)
    await eventually(lambda: len(cluster.made["router-1"]) == 2)


async def test_a_router_that_is_replaced_comes_back_at_its_address(cluster: Cluster) -> None:
    await cluster.start("p-0", "d-0")
    await cluster.clients[0].drain("router-1", timeout_s=0.2, replace=True)
    await eventually(lambda: len(cluster.made["router-1"]) == 2)
    await cluster.made["router-1"][1].wait_ready(10)
    async with AsyncClient(cluster.addresses[1].grpc, RetryPolicy()) as client:
        assert (await client.generate("abc", SHORT)).text == "abc"
