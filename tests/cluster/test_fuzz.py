"""Ten thousand requests that are wrong in every way the wire allows: each gets an answer or a status that says what is
wrong, and nothing is left of any of them."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import grpc
import grpc.aio
import psutil
import pytest

from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as pb_grpc
from tests.cluster import fuzz
from tests.cluster.server import PATIENT, assert_clean, eventually, request, serving
from tests.cluster.streams import generate
from tests.tiny_models import save_tiny_model

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

SEED = 20
NUM_REQUESTS = 10_000
NUM_CLIENTS = 16
DEADLINE_S = 60.0
# What a client may be told. UNKNOWN and INTERNAL would be bugs of ours, DEADLINE_EXCEEDED a request that was lost.
STATUSES = {"OK", "INVALID_ARGUMENT", "ALREADY_EXISTS", "RESOURCE_EXHAUSTED"}


async def outcome(stub: pb_grpc.InferenceStub, one: pb.GenerateRequest) -> str:
    num_complete = 0
    try:
        async for response in stub.Generate(one, timeout=DEADLINE_S):
            num_complete += response.HasField("complete")
    except grpc.aio.AioRpcError as error:
        if error.code().name not in STATUSES or not error.details():
            pytest.fail(f"{error.code().name} {error.details()} for {one}")
        return error.code().name
    assert num_complete == max(1, one.sampling_params.n), one
    return "OK"


async def test_every_request_gets_an_answer_or_a_status(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "llama", max_model_len=1024)
    with serving(tmp_path, "--model", str(model), settings=(*PATIENT, "engine.num_blocks=200")) as server:
        outcomes: Counter[str] = Counter()
        cases = fuzz.requests(SEED, NUM_REQUESTS)

        async def client(channel: grpc.aio.Channel) -> None:
            for one in cases:
                outcomes[await outcome(pb_grpc.InferenceStub(channel), one)] += 1

        async with grpc.aio.insecure_channel(server.address) as channel:
            # The first answer that goes home makes the link that all later ones take.
            await generate(channel, request(list(range(100)), 100, ignore_eos=True))
            assert eventually(lambda: all(load.warm_links for load in server.status().workers), 10.0)
            before = num_descriptors(server.family())
            await asyncio.gather(*(client(channel) for _ in range(NUM_CLIENTS)))
            assert outcomes.total() == NUM_REQUESTS
            assert outcomes["OK"] > NUM_REQUESTS // 4
            assert outcomes["INVALID_ARGUMENT"] > NUM_REQUESTS // 10
            assert_clean(server)
            answer = await generate(channel, request(list(range(100)), 5, ignore_eos=True))
        assert len(answer.token_ids) == 5
        assert {load.state for load in server.status().workers} == {"up"}
        assert not any("lost" in event.message for event in server.status().events)
        # The client's channel closes on its own time; nothing else may have come to stay.
        assert eventually(lambda: num_descriptors(server.family()) <= before + 8, 10.0)


def num_descriptors(family: list[psutil.Process]) -> int:
    return sum(process.num_fds() for process in family)
