"""Workers of a real cluster that drain under load, by order, by a signal and because a pool changes its size: no
request fails, no token differs, and no attempt is lost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator

import grpc.aio
import psutil
import pytest

from cluster.client_types import CallFailed
from tests.cluster.load import REQUESTS, Load, undisturbed
from tests.cluster.server import PATIENT, Server, assert_clean, eventually, serving
from tests.tiny_models import save_tiny_model

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# In turns, so that everybody has work; small steps, so that whoever drains does so in the middle of something.
SETTINGS = (
    *PATIENT,
    *("engine.max_num_batched_tokens=64", "engine.num_blocks=400", "router.policy.name=round_robin"),
    *("ray.num_cpus_per_worker=0.2", "ray.start_timeout_s=110", "worker_drain_timeout_s=20"),
)

GUESTS = ("prefill-1", "decode-1")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = save_tiny_model(tmp_path_factory.mktemp("llama") / "model", "llama")
    options = ("--model", str(model), "--prefill", "2", "--decode", "2")
    with serving(tmp_path_factory.mktemp("log"), *options, settings=SETTINGS) as running:
        yield running


@contextlib.asynccontextmanager
async def under_load(server: Server) -> AsyncIterator[Load]:
    async with grpc.aio.insecure_channel(server.address) as channel:
        expected = await undisturbed(channel, REQUESTS)
        load = Load(num_clients=2, pause_s=0.3)  # new workers are not to be kept from starting
        loading = asyncio.create_task(load.run(channel))
        yield load
        load.stopped.set()
        await loading
    assert all(answer.token_ids == expected[number] for number, answer in load.answers)
    attempts = [answer.placement.attempts for _, answer in load.answers]
    assert max(attempts) == 1, "somebody was cut off"
    assert_clean(server)


def twinring(server: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster.cli", *arguments, "--address", server.address]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


def lives(server: Server) -> dict[str, str]:
    return {load.worker_id: load.incarnation for load in server.status().workers if load.state == "up"}


async def test_one_after_the_other_is_drained_and_replaced(server: Server) -> None:
    before = lives(server)
    pids = {load.worker_id: load.pid for load in server.status().workers}
    async with under_load(server) as load:
        for worker_id in GUESTS:
            done = await asyncio.to_thread(twinring, server, "drain", worker_id, "--replace")
            assert (done.returncode, done.stderr.strip()) == (0, f"{worker_id} has been replaced")
            assert not psutil.pid_exists(pids[worker_id])
        num_answers = len(load.answers)
        assert await asyncio.to_thread(eventually, lambda: load.workers(num_answers).issuperset(before), 30.0)
    after = lives(server)
    assert after.keys() == before.keys()
    assert {worker_id for worker_id in after if after[worker_id] != before[worker_id]} == set(GUESTS)


async def test_one_that_is_sent_sigterm_finishes_what_it_has_and_is_replaced(server: Server) -> None:
    before = lives(server)
    async with under_load(server):
        pid = server.worker_pid("decode-1")
        os.kill(pid, signal.SIGTERM)
        assert await asyncio.to_thread(eventually, lambda: not psutil.pid_exists(pid), 25.0)

        def is_back() -> bool:
            return lives(server).get("decode-1", before["decode-1"]) != before["decode-1"]

        assert await asyncio.to_thread(eventually, is_back, 120.0), server.status()


async def test_pools_change_their_sizes_and_workers_their_roles(server: Server) -> None:
    pids = {load.worker_id: load.pid for load in server.status().workers}
    async with under_load(server) as load:
        done = await asyncio.to_thread(twinring, server, "scale", "prefill=3", "decode=1")
        assert (done.returncode, done.stderr.strip()) == (0, "pools have prefill=3 decode=1")
        assert server.worker_pid("prefill-2") == pids["decode-1"], "it kept its process, and the model"
        num_answers = len(load.answers)
        everybody = {"prefill-0", "prefill-1", "prefill-2", "decode-0"}
        assert await asyncio.to_thread(eventually, lambda: load.workers(num_answers) == everybody, 30.0)
        done = await asyncio.to_thread(twinring, server, "scale", "prefill=2", "decode=2")
        assert done.returncode == 0, done.stderr
        assert server.worker_pid("decode-1") == pids["decode-1"]
        done = await asyncio.to_thread(twinring, server, "drain", "decode-1", "--timeout", "20")
        assert (done.returncode, done.stderr.strip()) == (0, "decode-1 has left")
    assert lives(server).keys() == {"prefill-0", "prefill-1", "decode-0"}
    assert server.status().ready, "nobody is missing: it was told to go"


def test_what_cannot_be_done_is_said(server: Server) -> None:
    for arguments, words in (
        (("drain", "nobody"), "no worker or router is called 'nobody'; workers are prefill-0"),
        (("drain", "router-0"), "router-0 is the only router that takes calls"),
        (("scale", "prefill=0"), "num_prefill must be at least 1, not 0"),
        (("scale", "oven=3"), "there is no pool 'oven'; pools are prefill and decode"),
        (("drain", "127.0.0.1:1"), "no worker answers at 127.0.0.1:1"),
    ):
        done = twinring(server, *arguments)
        assert done.returncode == 1
        assert words in " ".join(done.stderr.split()), done.stderr
    with server.client() as client, pytest.raises(CallFailed, match="pool decode cannot have -1 workers"):
        client.scale({"decode": -1})
