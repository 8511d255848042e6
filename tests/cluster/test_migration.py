"""Running decodes that move between the workers of a cluster, to and fro: their streams are those of an unmigrated run,
and nothing is lost where a worker dies in the midst of it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import grpc.aio
import pytest

from protos import inference_pb2 as pb
from tests.cluster.server import PATIENT, Server, assert_clean, eventually, request, serving
from tests.cluster.streams import Answer, generate, generate_all
from tests.tiny_models import save_tiny_model

pytestmark = [pytest.mark.ray, pytest.mark.slow]

INTERVAL_S = 0.6  # a little more than what a worker is given to forget a request
SETTINGS = (
    *PATIENT,
    "engine.block_size=16",
    "engine.hash_block_size=16",
    "engine.num_blocks=600",
    "transfer.chunk_nbytes=1",  # a chunk for each block, so that a migration takes its time
)
NUM_STREAMS = 6
NUM_TOKENS = 700


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("llama") / "model", "llama")


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("log")
    arguments = ("--model", str(model), "--prefill", "1", "--decode", "2")
    program = ("bench._wandering", str(INTERVAL_S))
    with serving(folder, *arguments, settings=SETTINGS, program=program) as running:
        yield running


def requests() -> list[pb.GenerateRequest]:
    """Greedy ones and sampled ones, some with penalties: what they go by must come along."""
    sampled = {"seed": 7, "top_p": 0.9, "frequency_penalty": 0.3, "repetition_penalty": 1.1}
    return [
        request([*range(40, 140 + 30 * i), i], NUM_TOKENS, ignore_eos=True, temperature=0.8 * (i % 2), **sampled)
        for i in range(NUM_STREAMS)
    ]


@pytest.fixture(scope="module")
def unmigrated(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Answer]:
    arguments = ("--model", str(model), "--prefill", "1", "--decode", "1")
    with serving(tmp_path_factory.mktemp("still"), *arguments, settings=SETTINGS) as still:
        return asyncio.run(generate_all(still.address, requests()))


def num_migrations(answers: list[Answer]) -> int:
    return sum(answer.placement.migrations for answer in answers)


async def test_streams_are_those_of_an_unmigrated_run(server: Server, unmigrated: list[Answer]) -> None:
    answers = await generate_all(server.address, requests())
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in unmigrated]
    assert [answer.placement.attempts for answer in answers] == [1] * NUM_STREAMS
    assert num_migrations(answers) >= NUM_STREAMS
    assert any(answer.placement.migrations >= 2 for answer in answers), "there and back"
    assert all("migrated from decode-" in a.placement.decode_reason for a in answers if a.placement.migrations)
    assert_clean(server)


@pytest.mark.parametrize("victim", ["decode-0", "decode-1"])
async def test_a_worker_that_dies_in_the_midst_costs_no_token(
    server: Server, unmigrated: list[Answer], victim: str
) -> None:
    """Either is source of some and destination of others."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        streams = [asyncio.create_task(generate(channel, one)) for one in requests()]
        await asyncio.sleep(2 * INTERVAL_S + 0.3)
        os.kill(await asyncio.to_thread(server.worker_pid, victim), signal.SIGKILL)
        answers = await asyncio.gather(*streams)
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in unmigrated]
    assert max(answer.placement.attempts for answer in answers) <= 3
    whole = eventually(lambda: [load.state for load in server.status().workers] == ["up"] * 3, 60.0)
    assert whole, server.status()
    assert_clean(server)


async def test_a_client_that_leaves_in_the_midst_leaves_nothing(server: Server) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel:
        streams = [asyncio.create_task(generate(channel, one)) for one in requests()]
        await asyncio.sleep(2 * INTERVAL_S)
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    assert_clean(server)
