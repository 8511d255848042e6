"""The public services over real gRPC, before fake workers that echo the prompt."""

from __future__ import annotations

import asyncio
import math
import threading
from dataclasses import replace
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceStub
from tests.router.answers import ids, sampling, text_of, tokens_of
from tests.router.conftest import SERVED, eventually, with_fields
from tests.router.fake_worker import FakeWorker
from tests.router.tokenizers_for_tests import EOS_TOKEN_ID


async def error_of(service: Any, **fields: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await service.generate(**fields)
    return caught.value


async def read_to_the_end(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


# --- answers ------------------------------------------------------------------------------------------------------


async def test_a_stream_of_chunks_and_a_last_word(launch: Any) -> None:
    service = await launch("p-0", "p-1", "d-0", "d-1", token_s=0.02)
    prompt = "héllo wörld"
    responses = await service.generate(
        request_id="mine", text=prompt, stream=True, sampling_params=sampling(max_tokens=len(ids(prompt)))
    )
    assert len(responses) > 2
    assert all(response.request_id == "mine" for response in responses)
    assert [response.HasField("complete") for response in responses] == [False] * (len(responses) - 1) + [True]
    assert tokens_of(responses) == ids(prompt)
    assert text_of(responses) == prompt
    complete = responses[-1].complete
    assert complete.finish_reason == pb.FINISH_REASON_LENGTH
    assert (complete.prompt_tokens, complete.cached_tokens) == (len(ids(prompt)), 3)
    placement = complete.placement
    assert placement.prefill_worker.startswith("p-")
    assert placement.decode_worker.startswith("d-")
    assert placement.prefill_reason.startswith("home: TTFT 0.00 s with 0 tokens cached")
    assert placement.mode == pb.SERVING_MODE_DISAGGREGATED
    assert (placement.attempts, placement.kv_bytes_moved) == (1, 100)
    assert 0 < placement.ttft_s <= placement.e2e_s
    assert placement.tpot_s > 0


async def test_one_complete_without_streaming(launch: Any) -> None:
    service = await launch("p-0", "d-0")
    (response,) = await service.generate(
        tokenized=pb.TokenizedInput(input_ids=ids("echo")), sampling_params=sampling(max_tokens=6)
    )
    assert response.request_id.startswith("req-")
    assert tokens_of([response]) == ids("echoec")
    assert response.complete.text == "echoec"


async def test_a_request_in_an_instance_that_serves_alone(launch: Any) -> None:
    service = await launch("p-0", "d-0", config=with_fields(mode="colocated"))
    (response,) = await service.generate(text="abcdefgh", sampling_params=sampling())
    assert response.complete.text == "abcdefgh"
    placement = response.complete.placement
    assert placement.prefill_worker == placement.decode_worker
    assert placement.mode == pb.SERVING_MODE_LOCAL


@pytest.mark.parametrize("stream", [True, False])
async def test_a_stop_string_ends_the_text_before_it(launch: Any, stream: bool) -> None:
    service = await launch("p-0", "d-0", token_s=0.005)
    responses = await service.generate(
        text="some words END and more", stream=stream, sampling_params=sampling(max_tokens=100, stop=["xyz", "END"])
    )
    assert text_of(responses) == "some words "
    assert tokens_of(responses) == ids("some words END")
    complete = responses[-1].complete
    assert complete.finish_reason == pb.FINISH_REASON_STOP
    assert complete.matched_stop_string == "END"
    await eventually(lambda: not service.workers["d-0"].generating)  # the worker was told
    assert service.workers["d-0"].num_aborts == 1


async def test_a_stop_string_in_the_last_tokens(launch: Any) -> None:
    service = await launch("p-0", "d-0")
    (response,) = await service.generate(text="some END", sampling_params=sampling(max_tokens=8, stop=["END"]))
    assert response.complete.text == "some "
    assert response.complete.finish_reason == pb.FINISH_REASON_STOP


async def test_a_stop_token_is_named(launch: Any) -> None:
    service = await launch("p-0", "d-0")
    prompt = [*ids("abc"), EOS_TOKEN_ID, *ids("def")]
    (response,) = await service.generate(
        tokenized=pb.TokenizedInput(input_ids=prompt), sampling_params=sampling(max_tokens=7)
    )
    assert tokens_of([response]) == prompt[:4]
    assert response.complete.text == "abc"
    assert response.complete.matched_token_id == EOS_TOKEN_ID
    (response,) = await service.generate(
        tokenized=pb.TokenizedInput(input_ids=prompt), sampling_params=sampling(max_tokens=7, ignore_eos=True)
    )
    assert tokens_of([response]) == prompt
    assert response.complete.WhichOneof("matched_stop") is None


async def test_a_long_text_is_tokenized_aside(launch: Any) -> None:
    service = await launch("p-0", "d-0", served=replace(SERVED, max_model_len=6000))
    for worker in service.workers.values():
        worker.num_blocks = 2000
    await asyncio.sleep(0.2)
    prompt = "x" * 4000
    (response,) = await service.generate(text=prompt, sampling_params=sampling())
    assert response.complete.prompt_tokens == 4000
    assert response.complete.text == "x" * 8


async def test_many_at_once(launch: Any) -> None:
    service = await launch("p-0", "p-1", "d-0", "d-1")
    prompts = [f"prompt number {index}" for index in range(40)]
    answers = await asyncio.gather(*(service.generate(text=p, sampling_params=sampling()) for p in prompts))
    assert [text_of(answer) for answer in answers] == [prompt[:8] for prompt in prompts]


# --- refusals -----------------------------------------------------------------------------------------------------

INVALID = [
    ({}, "input: one of text, tokenized and chat must be set, got None"),
    ({"text": ""}, "text: the prompt must have at least one token, got 0"),
    ({"text": "x" * 200}, "text: the prompt must have fewer tokens than max_model_len 200, got 200"),
    (
        {"text": "abc", "sampling_params": sampling(temperature=math.nan)},
        "sampling_params.temperature: must be finite and at least 0, got nan",
    ),
    (
        {"text": "abc", "sampling_params": sampling(temperature=-1.0)},
        "sampling_params.temperature: must be finite and at least 0, got -1.0",
    ),
    ({"text": "abc", "sampling_params": sampling(top_p=2.0)}, "sampling_params.top_p: must be in (0, 1], got 2.0"),
    ({"text": "abc", "sampling_params": sampling(top_k=-3)}, "sampling_params.top_k: must be at least 0, got -3"),
    (
        {"text": "abc", "sampling_params": sampling(max_tokens=0)},
        "sampling_params.max_tokens: must be at least 1, got 0",
    ),
    (
        {"text": "abc", "sampling_params": sampling(max_tokens=500)},
        "sampling_params.max_tokens: must be in [1, 197] after a prompt of 3 tokens, got 500",
    ),
    (
        {"tokenized": pb.TokenizedInput(input_ids=[1, 4_000_000_000])},
        "tokenized.input_ids[1]: must be a token id in [0, 257), got 4000000000",
    ),
    ({"text": "abc", "sampling_params": sampling(stop=[""])}, "sampling_params.stop[0]: must not be empty, got ''"),
    (
        {"text": "abc", "request_id": "r" * 200},
        "request_id: must have at most 128 characters, got 200",
    ),
]


async def test_invalid_arguments_name_the_field_and_the_value(launch: Any) -> None:
    service = await launch("p-0", "d-0")
    for fields, message in INVALID:
        error = await error_of(service, **fields)
        assert (error.code(), error.details()) == (grpc.StatusCode.INVALID_ARGUMENT, message)
    assert service.server._driver.router.num_in_flight == 0
    assert not service.workers["p-0"].submits


async def test_a_prompt_beyond_the_smallest_pool(launch: Any) -> None:
    service = await launch("p-0", "d-0")
    service.workers["d-0"].num_blocks = 10
    await eventually(lambda: service.server._status.max_kv_tokens() == 40)
    error = await error_of(service, text="x" * 40)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == "text: the prompt must have fewer tokens than a worker's KV pool holds, 40, got 40"


async def test_not_ready(launch: Any) -> None:
    service = await launch()
    await service.expect(1, 1)
    error = await error_of(service, text="abc")
    assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, "not ready: 0 of 2 workers loaded")
    assert ("grpc-retry-pushback-ms", "1000") in list(error.trailing_metadata())
    prefill = FakeWorker("p-0", service.fabric)
    prefill.warm_links = ()
    await service.add(prefill)
    error = await error_of(service, text="abc")
    assert error.details() == "not ready: 1 of 2 workers loaded"
    await service.add(FakeWorker("d-0", service.fabric))
    await eventually(lambda: service.server._status.shortfall() == "0 of 1 links between workers warm")
    with pytest.raises(TimeoutError, match="links between workers"):
        await service.server.wait_ready(0.1)
    prefill.warm_links = ("d-0",)
    await service.server.wait_ready(10)
    assert service.server.is_ready
    assert await service.generate(text="abc", sampling_params=sampling())


class SlowTokenizer:
    """Reads long texts only when it may."""

    def __init__(self) -> None:
        self.may_read = threading.Event()
        self.added_tokens_decoder: dict[int, Any] = {}

    def get_vocab(self) -> dict[str, int]:
        return {chr(token_id): token_id for token_id in range(SERVED.vocab_size)}

    def encode(self, text: str) -> list[int]:
        assert len(text) <= 2000 or self.may_read.wait(20)
        return [1]

    def decode(self, token_ids: list[int], **options: bool) -> str:
        return "x" * len(token_ids)


async def test_too_many_long_prompts_at_once(launch: Any) -> None:
    tokenizer = SlowTokenizer()
    served = replace(SERVED, tokenizer=tokenizer)
    service = await launch("p-0", "d-0", config=with_fields(max_tokenizing=2), served=served)
    answers = [asyncio.create_task(service.generate(text="x" * 3000, sampling_params=sampling())) for _ in range(2)]
    await eventually(lambda: service.server._calls._prompts._num_tokenizing == 2)
    error = await error_of(service, text="x" * 3000)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.details() == "2 long prompts wait to be tokenized, the most that may"
    assert text_of(await service.generate(text="short", sampling_params=sampling())) == "x" * 8
    tokenizer.may_read.set()
    assert [text_of(answer) for answer in await asyncio.gather(*answers)] == ["x" * 8] * 2


async def test_one_id_in_flight_once(launch: Any) -> None:
    service = await launch("p-0", "d-0", token_s=0.05)
    first = asyncio.create_task(
        service.generate(request_id="twice", text="abcdef", sampling_params=sampling(max_tokens=20))
    )
    await eventually(lambda: service.server._driver.router.num_in_flight == 1)
    error = await error_of(service, request_id="twice", text="abc")
    assert (error.code(), error.details()) == (
        grpc.StatusCode.ALREADY_EXISTS,
        "request_id 'twice' is in flight already",
    )
    assert len(tokens_of(await first)) == 20


async def test_an_oversize_message(launch: Any) -> None:
    service = await launch("p-0", "d-0", config=with_fields(max_message_bytes=10_000))
    error = await error_of(service, text="x" * 20_000)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "10000" in (error.details() or "")


# --- ends before the end ------------------------------------------------------------------------------------------


async def test_a_cancelled_call_stops_the_workers_at_once(launch: Any) -> None:
    service = await launch("p-0", "d-0", token_s=0.05)
    request = pb.GenerateRequest(text="abcdef", stream=True, sampling_params=sampling(max_tokens=100))
    call = service.inference.Generate(request)
    await call.read()
    await call.read()
    call.cancel()
    await eventually(lambda: service.server._driver.router.num_in_flight == 0)
    await eventually(lambda: service.workers["p-0"].num_aborts == service.workers["d-0"].num_aborts == 1)
    assert not service.workers["d-0"].generating
    assert not service.server._driver._calls


async def test_a_deadline_stops_the_workers_too(launch: Any) -> None:
    service = await launch("p-0", "d-0", token_s=0.05)
    request = pb.GenerateRequest(text="abcdef", stream=True, sampling_params=sampling(max_tokens=100))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in service.inference.Generate(request, timeout=0.4):
            pass
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await eventually(lambda: service.workers["d-0"].num_aborts == 1)
    remaining_s = service.workers["d-0"].submits[0].deadline_s
    assert remaining_s is not None
    assert 0 < remaining_s <= 0.4


async def test_abort_ends_the_call_with_its_own_reason(launch: Any) -> None:
    service = await launch("p-0", "d-0", token_s=0.05)
    request = pb.GenerateRequest(request_id="r", text="abc", stream=True, sampling_params=sampling(max_tokens=100))
    rest = aiter(service.inference.Generate(request))
    responses = [await anext(rest)]
    assert (await service.inference.Abort(pb.AbortRequest(request_id="r"))).found
    responses += [response async for response in rest]
    assert responses[-1].complete.finish_reason == pb.FINISH_REASON_ABORT
    assert 0 < len(tokens_of(responses)) < 100
    assert not (await service.inference.Abort(pb.AbortRequest(request_id="r"))).found
    await eventually(lambda: service.workers["d-0"].num_aborts == 1)


async def start_flood(service: Any, channel: grpc.aio.Channel) -> Any:
    """A call with far more output than its window takes; the first answer has been read, no other."""
    service.fabric.num_tokens_per_report = 2000
    for worker in service.workers.values():
        worker.num_blocks = 500_000
    await eventually(lambda: service.server._status.max_kv_tokens() == 2_000_000)
    request = pb.GenerateRequest(text="abc", stream=True, sampling_params=sampling(max_tokens=1_900_000))
    call = InferenceStub(channel).Generate(request)
    await call.read()
    return call


SMALL_WINDOW = (("grpc.http2.lookahead_bytes", 65536), ("grpc.http2.bdp_probe", 0))


@pytest.mark.parametrize(("write_timeout_s", "reads_again"), [(20.0, True), (0.3, False)])
async def test_a_client_that_does_not_read_is_cut_off(launch: Any, write_timeout_s: float, reads_again: bool) -> None:
    config = with_fields(max_output_buffer_tokens=20_000, write_timeout_s=write_timeout_s)
    service = await launch("p-0", "d-0", config=config, served=replace(SERVED, max_model_len=2_000_000))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{service.port}", options=SMALL_WINDOW) as channel:
        call = await start_flood(service, channel)
        await eventually(lambda: service.server._driver.router.num_in_flight == 0)
        await eventually(lambda: not service.workers["d-0"].generating)
        (response,) = await service.generate(text="abc", sampling_params=sampling())  # others do not notice
        assert response.complete.completion_tokens == 8
        if not reads_again:
            await eventually(lambda: not service.server._driver._calls)
        with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)) as caught:
            await read_to_the_end(call)
        if reads_again:
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert caught.value.details() == ("the client reads too slowly: more than 20000 output tokens wait for it")
    await eventually(lambda: not service.server._driver._calls)


# --- operators ----------------------------------------------------------------------------------------------------


async def test_model_info_loads_and_status(launch: Any) -> None:
    service = await launch("p-0", "d-0")
    info = await service.inference.GetModelInfo(pb.GetModelInfoRequest())
    assert (info.model, info.vocab_size, info.max_model_len) == ("echo", 257, 200)
    assert list(info.eos_token_ids) == [EOS_TOKEN_ID]
    loads = (await service.inference.GetLoads(pb.GetLoadsRequest())).workers
    assert [(load.worker_id, load.role, load.state, load.num_blocks) for load in loads] == [
        ("p-0", "prefill", "up", 64),
        ("d-0", "decode", "up", 64),
    ]
    assert list(loads[0].warm_links) == ["d-0"]
    assert [(link.worker_id, link.transport) for link in loads[0].links] == [("d-0", "gloo")]
    await service.generate(text="abc", sampling_params=sampling())
    service.server.note_event("scaled to 2")
    status = await service.cluster.GetStatus(pb.GetStatusRequest())
    assert (status.ready, status.message, status.mode, status.model) == (True, "ready", "disaggregated", "echo")
    assert (status.num_requests_in_flight, status.num_requests_finished, status.num_failovers) == (0, 1, 0)
    assert [event.message for event in status.events] == ["ready", "scaled to 2"]
    assert (status.view_version, status.router_id) == (3, "router-0")


async def test_health_follows_readiness(launch: Any) -> None:
    service = await launch()
    await service.expect(1, 0)
    stub = health_pb2_grpc.HealthStub(service.channel)
    for name in ("", "twinring.v1.Inference"):
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
    await service.add(FakeWorker("p-0", service.fabric))
    await service.server.wait_ready(10)
    answer = await stub.Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_reflection_lists_the_services(launch: Any) -> None:
    service = await launch()
    stub = reflection_pb2_grpc.ServerReflectionStub(service.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    answers = [answer async for answer in stub.ServerReflectionInfo(iter([request]))]
    names = {entry.name for entry in answers[0].list_services_response.service}
    assert {"twinring.v1.Inference", "twinring.v1.Cluster", "grpc.health.v1.Health"} <= names
