"""`twinring serve --routers 2`: two processes that share a view, on a real cluster whose workers and routers die."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator

import psutil
import pytest

from cluster.aio_client import AsyncClient
from cluster.client import Client
from cluster.client_types import CallFailed, RetryPolicy, Route, Sampling, Status
from tests.cluster.server import PATIENT, Server, eventually, serving
from tests.tiny_models import save_tiny_model

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# 500 keys: two full blocks each, all different.
PROMPTS = [[*divmod(number, 200), *(number * position % 251 for position in range(130))] for number in range(500)]
LONG = Sampling(max_tokens=1500, temperature=1.0, seed=5, ignore_eos=True)
AT_ONCE = RetryPolicy(give_up_after_s=0)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = save_tiny_model(tmp_path_factory.mktemp("llama") / "model", "llama")
    settings = (*PATIENT, "ray.start_timeout_s=110")  # six processes start at once
    options = ("--model", str(model), "--routers", "2", "--prefill", "3")
    with serving(tmp_path_factory.mktemp("log"), *options, settings=settings) as running:
        yield running


def statuses(server: Server) -> list[Status]:
    found = []
    for address in server.addresses:
        with Client(address) as client, contextlib.suppress(CallFailed):
            found.append(client.status())
    return found


def same_view(server: Server, at_least: int, timeout_s: float = 60.0) -> int:
    """Both routers stand at it, and it is so new."""

    def version() -> int:
        versions = [status.view_version for status in statuses(server)]
        return versions[0] if len(versions) == 2 and versions[0] == versions[1] >= at_least else 0

    found = eventually(version, timeout_s)
    assert found, statuses(server)
    return found


async def home_pairs(server: Server, version: int) -> list[set[str]]:
    """As both routers name them at this version."""

    async def asked(address: str) -> list[Route]:
        async with AsyncClient(address) as client:
            return [await client.explain_route(prompt) for prompt in PROMPTS]

    one, other = await asyncio.gather(*map(asked, server.addresses))
    assert {route.view_version for route in (*one, *other)} == {version}
    pairs = [homes(route) for route in one]
    assert pairs == [homes(route) for route in other]
    return pairs


def homes(route: Route) -> set[str]:
    return {candidate.worker_id for candidate in route.prefill_candidates if candidate.is_home}


def router_process(server: Server, router_id: str) -> psutil.Process:
    """By the port on which it listens."""
    port = int(server.addresses[int(router_id[-1])].rpartition(":")[2])
    return next(
        process
        for process in server.family()
        if any(one.laddr.port == port and one.status == "LISTEN" for one in process.net_connections("tcp"))
    )


def test_both_are_announced_and_serve(server: Server) -> None:
    assert len(set(server.addresses)) == len(set(server.http_addresses)) == 2
    for address in server.addresses:
        with Client(address) as client:
            assert len(client.generate("hello", Sampling(max_tokens=5, ignore_eos=True)).token_ids) == 5
    assert [status.num_requests_finished for status in statuses(server)] == [1, 1]
    shown = subprocess.run(
        [sys.executable, "-m", "cluster.cli", "status", "--address", ",".join(server.addresses)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    for index, (address, http_address) in enumerate(zip(server.addresses, server.http_addresses, strict=True)):
        assert f"router-{index} at {address}: ready" in shown
        with urllib.request.urlopen(f"http://{http_address}/metrics", timeout=10) as response:
            assert b"twinring_" in response.read()
    assert router_process(server, "router-0").pid != router_process(server, "router-1").pid


async def test_both_name_the_same_homes_while_a_worker_dies_and_another_joins(server: Server) -> None:
    version = same_view(server, 1)
    whole = await home_pairs(server, version)
    os.kill(server.worker_pid("prefill-2"), signal.SIGKILL)
    assert same_view(server, version + 1) == version + 1, "one death is one new version"
    without = await home_pairs(server, version + 1)
    assert all(pair == {"prefill-0", "prefill-1"} for pair in without)
    assert same_view(server, version + 2) == version + 2
    assert await home_pairs(server, version + 2) == whole
    assert eventually(lambda: all(status.ready for status in statuses(server)), 30.0)
    joined = [event.message for event in statuses(server)[0].events if "worker prefill-2" in event.message]
    assert len(joined) == 2, "replaced once"


async def test_a_router_that_dies_costs_its_clients_no_token_and_the_workers_nothing(server: Server) -> None:
    version = same_view(server, 1)
    pairs = await home_pairs(server, version)
    pids = [load.pid for load in statuses(server)[0].workers]
    with Client(server.addresses[0]) as client:
        unfaulted = client.generate("to be resumed", LONG)
    first, second = server.addresses
    async with AsyncClient([second, first]) as client, AsyncClient(second, AT_ONCE) as stuck:
        resumed, orphan = client.stream("to be resumed", LONG), stuck.stream("an orphan", LONG)
        begun = [await anext(resumed), await anext(orphan)]
        assert all(chunk.completion is None for chunk in begun)
        router_process(server, "router-1").kill()
        with pytest.raises(CallFailed, match="UNAVAILABLE"):
            async for _ in orphan:
                pass
        completion = [chunk async for chunk in resumed][-1].completion
    assert completion is not None
    assert (completion.token_ids, completion.num_resumes) == (unfaulted.token_ids, 1)
    assert eventually(lambda: is_idle(server), 5.0)
    assert same_view(server, version) == version
    with Client(second) as client:
        assert client.generate("hello again", Sampling(max_tokens=3)).token_ids
    assert await home_pairs(server, version) == pairs
    assert [load.pid for load in statuses(server)[0].workers] == pids, "no worker missed it"


async def test_the_requests_of_a_dead_router_leave_the_workers_within_three_seconds(server: Server) -> None:
    same_view(server, 1)
    async with AsyncClient(server.addresses[1], AT_ONCE) as client:
        stream = client.stream("an orphan", LONG)
        await anext(stream)
        assert eventually(lambda: not is_idle(server), 5.0)
        router_process(server, "router-1").kill()
        assert eventually(lambda: is_idle(server), 3.0)
        with pytest.raises(CallFailed, match="UNAVAILABLE"):
            async for _ in stream:
                pass
    same_view(server, 1)


async def test_a_router_that_is_sent_sigterm_finishes_its_streams_and_comes_back(server: Server) -> None:
    version = same_view(server, 1)
    first, second = server.addresses
    former = router_process(server, "router-1")
    async with AsyncClient([second, first]) as client, AsyncClient(second, AT_ONCE) as newcomer:
        stream = client.stream("to be finished", LONG)
        await anext(stream)
        former.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(eventually, lambda: len(statuses(server)) == 1, 5.0), "it takes no more calls"
        with pytest.raises(CallFailed, match="UNAVAILABLE"):
            await newcomer.generate("hello", Sampling(max_tokens=3))
        completion = [chunk async for chunk in stream][-1].completion
    assert completion is not None
    assert (len(completion.token_ids), completion.num_resumes) == (1500, 0)
    assert eventually(lambda: not former.is_running() and len(statuses(server)) == 2, 60.0)
    assert same_view(server, version) == version, "no worker missed it"


def is_idle(server: Server) -> bool:
    """By what the workers tell the router that lives."""
    with Client(server.addresses[0]) as client:
        loads = client.loads()
    return all(load.num_running == load.num_waiting == load.num_held_blocks == 0 for load in loads)
