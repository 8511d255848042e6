"""n > 1 through the real server with fake workers: one call, several requests, one placement."""

from __future__ import annotations

import asyncio
from collections import Counter
from hashlib import sha256
from typing import Any

import grpc
import pytest

from protos import inference_pb2 as pb
from router.choices import choice_seed
from tests.router.answers import ids, sampling
from tests.router.conftest import eventually

PROMPT = "abcdefghijkl"


def completes(responses: list[pb.GenerateResponse]) -> list[pb.GenerateComplete]:
    found = [response.complete for response in responses if response.HasField("complete")]
    return sorted(found, key=lambda complete: complete.choice_index)


def test_seeds_of_choices_are_published() -> None:
    assert choice_seed(-7, 0) == -7
    assert choice_seed(42, 3) == int(sha256(b"42:3").hexdigest()[:16], 16) // 2
    assert len({choice_seed(seed, index) for seed in range(20) for index in range(16)}) == 320


@pytest.mark.parametrize("stream", [False, True])
async def test_every_choice_is_answered_from_one_placement(launch: Any, stream: bool) -> None:
    service = await launch("p-0", "p-1", "d-0", "d-1", token_s=0.01)
    responses = await service.generate(
        request_id="mine", text=PROMPT, stream=stream, sampling_params=sampling(n=3, seed=5)
    )
    found = completes(responses)
    assert [complete.choice_index for complete in found] == [0, 1, 2]
    assert [complete.seed for complete in found] == [choice_seed(5, index) for index in range(3)]
    assert {response.request_id for response in responses} == {"mine"}
    texts: Counter[int] = Counter()
    for response in responses:
        part = response.chunk if response.HasField("chunk") else response.complete
        texts[part.choice_index] += len(part.text)
    assert texts == {0: 8, 1: 8, 2: 8}
    assert len({(c.placement.prefill_worker, c.placement.decode_worker) for c in found}) == 1
    assert found[1].placement.prefill_reason == "beside the first choice"
    if not stream:
        assert len(responses) == 3
    submits = [submit for worker in service.workers.values() for submit in worker.submits]
    assert sorted(submit.choice_index for submit in submits) == [0, 0, 1, 1, 2, 2]
    assert not service.server._driver.router._by_client_id


async def test_the_others_start_when_the_first_is_prefilled(launch: Any) -> None:
    service = await launch("p-0", "d-0", token_s=0.15)
    call = asyncio.create_task(service.generate(text=PROMPT, sampling_params=sampling(n=4, max_tokens=3)))
    await eventually(lambda: bool(service.workers["p-0"].submits))
    assert [submit.choice_index for submit in service.workers["p-0"].submits] == [0]
    found = completes(await call)
    assert len(found) == 4
    assert found[3].placement.ttft_s > found[0].placement.ttft_s, "measured from the arrival of the call"


async def test_a_first_choice_of_one_token_brings_the_others_too(launch: Any) -> None:
    service = await launch("p-0", "d-0")
    found = completes(await service.generate(text=PROMPT, sampling_params=sampling(n=3, max_tokens=1)))
    assert [complete.text for complete in found] == ["a", "a", "a"]


@pytest.mark.parametrize("num_started", [1, 3])
async def test_abort_ends_all_choices(launch: Any, num_started: int) -> None:
    service = await launch("p-0", "d-0", token_s=0.4 if num_started == 1 else 0.05)
    request = sampling(n=3, max_tokens=100)
    call = asyncio.create_task(service.generate(request_id="r", text=PROMPT, sampling_params=request))
    router = service.server._driver.router
    await eventually(lambda: len(router.find("", "r")) == num_started)
    assert (await service.inference.Abort(pb.AbortRequest(request_id="r"))).found
    found = completes(await call)
    assert [complete.finish_reason for complete in found] == [pb.FINISH_REASON_ABORT] * 3
    assert router.num_in_flight == 0


async def test_cancelling_ends_all_choices(launch: Any) -> None:
    service = await launch("p-0", "d-0", token_s=0.05)
    request = pb.GenerateRequest(text=PROMPT, stream=True, sampling_params=sampling(n=3, max_tokens=100))
    call = service.inference.Generate(request)
    await call.read()
    await eventually(lambda: service.server._driver.router.num_in_flight == 3)
    call.cancel()
    await eventually(lambda: service.server._driver.router.num_in_flight == 0)
    await eventually(lambda: not service.workers["d-0"].generating)
    assert not service.server._driver._calls
    assert not service.server._driver._followers


async def test_a_failover_resumes_every_choice_where_it_was(launch: Any) -> None:
    service = await launch("p-0", "d-0", "d-1", token_s=0.02)
    request = sampling(n=3, max_tokens=40)
    call = asyncio.create_task(service.generate(text=PROMPT, sampling_params=request))
    victims = [service.workers["d-0"], service.workers["d-1"]]
    await eventually(lambda: any(len(worker.generating) == 3 for worker in victims))
    await next(worker for worker in victims if len(worker.generating) == 3).kill()
    found = completes(await call)
    assert [complete.text for complete in found] == [(PROMPT * 4)[:40]] * 3
    assert all(complete.placement.attempts == 2 for complete in found)


async def test_resume_goes_on_behind_what_the_caller_has(launch: Any) -> None:
    service = await launch("p-0", "d-0")
    given = pb.GenerateRequest(
        text="abcdef", sampling_params=sampling(max_tokens=8), output_token_ids=_packed(ids("abcd")), priority=-3
    )
    (response,) = [each async for each in service.inference.Generate(given, timeout=20)]
    complete = response.complete
    assert (complete.text, complete.first_index, complete.completion_tokens) == ("efab", 4, 8)
    assert complete.prompt_tokens == 6
    submit = service.workers["p-0"].submits[0]
    assert (submit.num_prompt_tokens, submit.num_committed_tokens, submit.priority) == (6, 4, -3)


@pytest.mark.parametrize(
    ("fields", "output", "message"),
    [
        ({}, "abcdefgh", "output_token_ids: must have fewer tokens than max_tokens 8, got 8"),
        ({"n": 2}, "ab", "sampling_params.n: must be 1 where output_token_ids is set, got 2"),
        ({"stop": ["bc"]}, "abcd", "output_token_ids: the output had ended, with a stop string, got 4"),
    ],
)
async def test_resumes_that_are_refused(launch: Any, fields: dict[str, Any], output: str, message: str) -> None:
    service = await launch("p-0", "d-0")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await service.generate(text="abcdef", sampling_params=sampling(**fields), output_token_ids=_packed(ids(output)))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == message


async def test_packed_output_must_be_whole(launch: Any) -> None:
    service = await launch("p-0", "d-0")
    with pytest.raises(grpc.aio.AioRpcError, match="output_token_ids: must be packed int32"):
        await service.generate(text="abc", sampling_params=sampling(), output_token_ids=b"12345")


def _packed(token_ids: list[int]) -> bytes:
    return b"".join(token_id.to_bytes(4, "little") for token_id in token_ids)
