"""Two routers that share a view, over real gRPC in one process, while workers and routers come and go."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from cluster.aio_client import AsyncClient
from cluster.client import Client
from cluster.client_types import CallFailed, RetryPolicy, Sampling
from cluster.routers import router_configs
from router.key_depth import KeyDepthConfig
from tests.cluster.routers_of_fakes import Cluster, homes
from tests.router.conftest import CONFIG, eventually
from tests.router.fake_worker import FakeWorker

ADAPTS = replace(CONFIG, adapts_key_depth=True, key_depth=KeyDepthConfig(window=20, hot_share=0.5, cold_share=0.25))


def ask_all(addresses: list[str]) -> None:
    """With the client that waits."""
    with Client(addresses) as client:
        assert client.generate("abc", Sampling(max_tokens=3)).text == "abc"
        assert client.status().router_id == "router-0"
        assert client.address == addresses[1]
        with pytest.raises(CallFailed, match="UNAVAILABLE"):
            client.abort("nobody's")
    with Client(addresses[1:]) as client:
        assert not client.abort("nobody's")


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    one = Cluster(CONFIG)
    yield one
    await one.stop()


async def test_both_name_the_same_homes_while_workers_come_and_go(cluster: Cluster) -> None:
    await cluster.start("p-0", "p-1", "p-2", "d-0")
    first = await cluster.pairs()
    await cluster.add("p-3")
    assert any("p-3" in pair for pair in await cluster.pairs())
    version = await cluster.same_view(5)
    await cluster.workers["p-3"].kill()
    assert await cluster.same_view(version + 1) == version + 1
    assert await cluster.pairs() == first
    assert [ref.worker_id for ref in cluster.lost] == ["p-3"]


async def test_a_worker_that_one_router_lost_is_not_replaced_and_found_again(cluster: Cluster) -> None:
    await cluster.start("p-0", "p-1", "p-2", "d-0")
    first, version = await cluster.pairs(), await cluster.same_view(4)
    worker = cluster.workers["p-1"]
    worker.shuns = {"router-1"}
    await cluster.until_views(version, 0)
    await asyncio.sleep(1.5)  # it has tried again by now
    assert await cluster.views() == (version, 0)
    assert cluster.lost == []
    # It serves with the others meanwhile.
    assert (await cluster.clients[1].generate("abc", Sampling(max_tokens=3))).text == "abc"
    worker.shuns = set()
    assert await cluster.same_view(version) == version
    assert await cluster.pairs() == first
    worker.shuns = {"router-0", "router-1"}
    await eventually(lambda: [ref.worker_id for ref in cluster.lost] == ["p-1"])


async def test_a_dead_router_comes_back_at_its_address_with_the_same_view(cluster: Cluster) -> None:
    await cluster.start("p-0", "p-1", "d-0")
    first, version = await cluster.pairs(), await cluster.same_view(3)
    await cluster.made["router-1"][0].die()
    words = ["lost router-1: router-1 has ended", f"router-1 is back on {cluster.addresses[1].grpc}"]
    async with asyncio.timeout(10):
        while [event.message for event in (await cluster.clients[0].status()).events][-2:] != words:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert await cluster.same_view(version) == version
    await cluster.made["router-1"][1].wait_ready(10)
    assert await cluster.pairs() == first
    assert cluster.lost == []


async def test_a_router_that_comes_back_to_a_cluster_short_of_a_worker_serves(cluster: Cluster) -> None:
    await cluster.start("p-0", "p-1", "d-0")
    await cluster.workers["p-1"].kill()
    await eventually(lambda: len(cluster.lost) == 1)
    await cluster.made["router-1"][0].die()
    completion = await cluster.clients[1].generate("abc", Sampling(max_tokens=3))
    assert completion.text == "abc"
    assert (await cluster.clients[1].status()).message == "not ready: 2 of 3 workers loaded"


async def test_a_worker_that_no_router_reaches_does_not_join(cluster: Cluster) -> None:
    await cluster.start("p-0", "d-0")
    other = FakeWorker("p-1", cluster.fabric)
    other.shuns = {"router-0", "router-1"}
    ref = await other.start()
    with pytest.raises(ConnectionError, match="p-1"):
        await cluster.routers.add_worker(ref, pid=0)
    other.shuns = {"router-1"}
    await cluster.routers.add_worker(ref, pid=0)
    assert (await cluster.views())[1] == 0
    other.shuns = set()
    await cluster.same_view(5)
    assert cluster.lost == [], "whoever adds it has heard of it already"
    await other.kill()


async def test_a_client_goes_on_at_the_other_router(cluster: Cluster) -> None:
    await cluster.start("p-0", "d-0")
    cluster.fabric.token_s = 0.02
    prompt = "abcdefghijklmnopqrstuvwxyz"
    async with AsyncClient([address.grpc for address in cluster.addresses]) as client:
        async with contextlib.aclosing(client.stream(prompt, Sampling(max_tokens=26))) as stream:
            chunks = [await anext(stream)]
            await cluster.made["router-0"][0].die()
            chunks += [chunk async for chunk in stream]
        completion = chunks[-1].completion
        assert completion is not None
        assert (completion.text, completion.num_resumes) == (prompt, 1)
        assert client.address == cluster.addresses[1].grpc
    statuses = [await one.status() for one in cluster.clients[1:]]
    assert [(one.router_id, one.num_requests_finished) for one in statuses] == [("router-1", 1)]


async def test_a_client_asks_and_aborts_wherever_it_is_answered(cluster: Cluster) -> None:
    await cluster.start("p-0", "d-0")
    cluster.fabric.token_s = 0.05
    addresses = [address.grpc for address in cluster.addresses]
    async with AsyncClient(["127.0.0.1:1", *addresses], RetryPolicy(give_up_after_s=0)) as client:
        assert (await client.status()).router_id == "router-0"
        assert client.address == addresses[0]
        with pytest.raises(CallFailed, match="UNAVAILABLE"):
            await client.abort("nobody's")
    async with contextlib.aclosing(cluster.clients[1].stream("abc", Sampling(max_tokens=100), request_id="r")) as one:
        await anext(one)
        async with AsyncClient(",".join(addresses)) as client:
            assert await client.abort("r")
            assert not await client.abort("nobody's")
    await asyncio.to_thread(ask_all, ["127.0.0.1:1", *addresses])
    with pytest.raises(ValueError, match="no address in ' , '"):
        AsyncClient(" , ")


async def test_key_depths_follow_the_requests_of_both_routers() -> None:
    cluster = Cluster(ADAPTS)
    try:
        await cluster.start("p-0", "p-1", "p-2", "p-3", "d-0")
        version = await cluster.same_view(5)
        prompts = [f"shared{number:06}" for number in range(30)]
        calls = (
            cluster.clients[index % 2].generate(prompt, Sampling(max_tokens=1)) for index, prompt in enumerate(prompts)
        )
        await asyncio.gather(*calls)
        # One block is 4 bytes: with a short key all of them would have one home.
        await cluster.same_view(version + 1)
        pairs = [frozenset(homes(await cluster.clients[0].explain_route(one))) for one in prompts]
        assert len(set(pairs)) > 1
        await cluster.pairs()
    finally:
        await cluster.stop()


def test_each_router_has_ports_and_a_recording_of_its_own() -> None:
    config = replace(CONFIG, listen="127.0.0.1:50051", http_listen="", record_events="/tmp/events")
    configs = router_configs(config, 3)
    assert [one.listen for one in configs] == ["127.0.0.1:50051", "127.0.0.1:50052", "127.0.0.1:50053"]
    assert [one.record_events for one in configs] == ["/tmp/events.0", "/tmp/events.1", "/tmp/events.2"]
    assert {one.http_listen for one in configs} == {""}
    assert {one.listen for one in router_configs(CONFIG, 3)} == {"127.0.0.1:0"}
    assert router_configs(config, 1) == [config]
