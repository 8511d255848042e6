"""Streams of a cluster in one process whose decodes are moved by hand, while they run: real workers, real links, no
Ray. Their tokens are those of the same requests left in peace."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest

from bench._one_process import OneProcess, one_process
from cluster.config import load_config
from protos import inference_pb2 as pb
from router.events import MigrationWanted
from router.migrations import RETURN_PAUSE_S
from tests.cluster.server import request
from tests.cluster.streams import Answer, generate, generate_all
from tests.tiny_models import save_tiny_model

NUM_TOKENS = 260


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("llama") / "model", "llama")


@pytest.fixture
async def cluster(model: Path) -> AsyncIterator[OneProcess]:
    tree = {
        "num_decode": 3,
        "engine": {"model": str(model), "block_size": 16, "hash_block_size": 16, "num_blocks": 200},
        "lease": {"lease_s": 6.0},
        "transfer": {"chunk_nbytes": 1, "chunk_timeout_s": 5.0, "silence_timeout_s": 6.0},
    }
    async with one_process(load_config(overrides=tree)) as running:
        yield running
        async with asyncio.timeout(10.0):
            while not running.is_quiet():  # noqa: ASYNC110
                await asyncio.sleep(0.05)


def sampled(number: int, num_tokens: int = NUM_TOKENS) -> pb.GenerateRequest:
    """Greedy ones and drawn ones, some with penalties: what they go by must come along."""
    params = {"seed": 7, "top_p": 0.9, "frequency_penalty": 0.3, "repetition_penalty": 1.1}
    prompt = [*range(40, 100 + 40 * number), number]
    return request(prompt, num_tokens, ignore_eos=True, temperature=0.8 * (number % 2), **params)


async def move_about(cluster: OneProcess, streams: list[asyncio.Task[Answer]], seed: int) -> None:
    rng = random.Random(seed)
    while not all(stream.done() for stream in streams):
        for request_id, _ in cluster.hand.decodes_at():
            cluster.hand.feed(MigrationWanted(request_id, f"decode-{rng.randrange(3)}", "by chance"))
        await asyncio.sleep(0.02)


async def test_a_stream_goes_there_and_back(cluster: OneProcess) -> None:
    [unmoved] = await generate_all(cluster.hand.address, [sampled(3)])
    places: list[str] = []
    async with grpc.aio.insecure_channel(cluster.hand.address) as channel:
        stream = asyncio.create_task(generate(channel, sampled(3)))
        for to in ("decode-1", "decode-2", "decode-1", "decode-0", "decode-1"):
            while not stream.done() and (not places or places[-1] != to):
                await asyncio.sleep(RETURN_PAUSE_S / 50)
                for request_id, here in cluster.hand.decodes_at():
                    cluster.hand.feed(MigrationWanted(request_id, to, "by hand"))
                    places += [here] if places[-1:] != [here] else []
        moved = await stream
    assert moved.token_ids == unmoved.token_ids
    assert moved.placement.attempts == 1
    assert moved.placement.migrations >= 2
    assert 0 < moved.placement.migration_pause_s < 5.0
    assert cluster.hand.router.statistics.num_failed_migrations == 0


async def test_streams_that_move_at_random_are_those_left_in_peace(cluster: OneProcess) -> None:
    requests = [sampled(number) for number in range(5)]
    unmoved = await generate_all(cluster.hand.address, requests)
    async with grpc.aio.insecure_channel(cluster.hand.address) as channel:
        streams = [asyncio.create_task(generate(channel, one)) for one in requests]
        await move_about(cluster, streams, seed=1)
        moved = [await stream for stream in streams]
    assert [one.token_ids for one in moved] == [one.token_ids for one in unmoved]
    assert sum(one.placement.migrations for one in moved) >= len(requests)
    assert [one.placement.attempts for one in moved] == [1] * len(requests)


async def test_clients_that_leave_in_the_midst_leave_nothing(cluster: OneProcess) -> None:
    async with grpc.aio.insecure_channel(cluster.hand.address) as channel:
        streams = [asyncio.create_task(generate(channel, sampled(number))) for number in range(5)]
        moving = asyncio.create_task(move_about(cluster, streams, seed=2))
        for stream in streams:
            await asyncio.sleep(0.15)
            stream.cancel()
        await asyncio.gather(*streams, moving, return_exceptions=True)
    assert cluster.hand.router.statistics.num_cancelled > 0
