"""Bad luck in a running cluster: workers and the Ray head killed, clients that leave. After each, every ledger balances
and the next request is served."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as pb_grpc
from tests.cluster.server import PATIENT, Server, assert_clean, eventually, request, serving
from tests.cluster.streams import Answer, generate, generate_all
from tests.tiny_models import save_tiny_model

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# Small steps, so that a request spends time in every state.
SETTINGS = (*PATIENT, "engine.max_num_batched_tokens=64", "engine.num_blocks=400")
PROMPT = list(range(40, 240))
LONG = [i % 250 for i in range(1500)]
NUM_TOKENS = 300
SHORT = request(PROMPT, 40, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("llama") / "model", "llama")


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("log")
    with serving(folder, "--model", str(model), "--prefill", "2", "--decode", "2", settings=SETTINGS) as running:
        yield running


async def answer_of(server: Server, one: pb.GenerateRequest) -> Answer:
    return (await generate_all(server.address, [one]))[0]


def busy_worker(server: Server, role: str) -> str:
    busy = (load.worker_id for load in server.status().workers if load.role == role and load.num_running)
    return next(busy, "")


def wait_for_whole_pool(server: Server, num_workers: int = 4) -> pb.GetStatusResponse:
    def whole() -> pb.GetStatusResponse | None:
        status = server.status()
        return status if status.ready and sum(load.state == "up" for load in status.workers) == num_workers else None

    status = eventually(whole, 60.0)
    assert status is not None, server.status()
    return status


@pytest.mark.parametrize("victim_role", ["decode", "prefill"])
async def test_a_killed_worker_costs_no_token(server: Server, victim_role: str) -> None:
    """16 streams, one worker killed in mid-stream: each client sees every token once, equal to an unfaulted run."""
    # For prefill, long prompts and no cache: somebody must still be prefilling when it is looked at.
    prompts = [[*PROMPT, i] if victim_role == "decode" else [i, *LONG] for i in range(16)]
    requests = [request(prompt, NUM_TOKENS, ignore_eos=True) for prompt in prompts]
    assert_clean(server)  # so that whoever runs something below runs these
    async with grpc.aio.insecure_channel(server.address) as channel:
        streams = [asyncio.create_task(generate(channel, one)) for one in requests]
        victim = await asyncio.to_thread(eventually, lambda: busy_worker(server, victim_role), 10.0)
        old_pid = server.worker_pid(victim)
        os.kill(old_pid, signal.SIGKILL)
        answers = await asyncio.gather(*streams)

    assert max(answer.placement.attempts for answer in answers) <= 3
    if victim_role == "decode":
        assert any(answer.placement.attempts > 1 for answer in answers), "nothing ran on the killed worker"
    status = wait_for_whole_pool(server)
    assert any(victim in event.message and "lost" in event.message for event in status.events)
    assert server.worker_pid(victim) != old_pid
    assert_clean(server)
    unfaulted = await generate_all(server.address, requests)
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in unfaulted]


@pytest.mark.parametrize("after_s", [0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8])
async def test_a_client_that_leaves_costs_nothing(server: Server, after_s: float) -> None:
    """Cancelled while queued, prefilling, transferring or decoding, whichever it is by then."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        streams = [asyncio.create_task(generate(channel, request([i, *LONG], 200, ignore_eos=True))) for i in range(4)]
        await asyncio.sleep(after_s)
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    assert_clean(server)
    assert len((await answer_of(server, request(PROMPT, 5, ignore_eos=True))).token_ids) == 5


async def test_abort_ends_the_stream_with_its_reason(server: Server) -> None:
    one = request(PROMPT, 1500, ignore_eos=True)
    one.request_id = "to-abort"
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = pb_grpc.InferenceStub(channel)
        started = asyncio.Event()
        stream = asyncio.create_task(generate(channel, one, on_chunk=lambda answer: started.set()))
        await started.wait()
        assert (await stub.Abort(pb.AbortRequest(request_id="to-abort"), timeout=5)).found
        assert (await stream).complete.finish_reason == pb.FINISH_REASON_ABORT
        assert not (await stub.Abort(pb.AbortRequest(request_id="to-abort"), timeout=5)).found
    assert_clean(server)


async def test_a_stopped_worker_is_fenced_and_replaced(model: Path, tmp_path: Path) -> None:
    """SIGSTOP, then SIGCONT: the router gives it up after the lease, and the woken worker ends itself."""
    settings = ("engine.max_num_batched_tokens=64", "lease.lease_s=1.5")
    with serving(tmp_path, "--model", str(model), "--prefill", "1", "--decode", "2", settings=settings) as server:
        one = request(PROMPT, 3 * NUM_TOKENS, ignore_eos=True)
        expected = await answer_of(server, one)
        assert_clean(server)  # so that whoever runs something below runs the stream
        async with grpc.aio.insecure_channel(server.address) as channel:
            stream = asyncio.create_task(generate(channel, one))
            victim = await asyncio.to_thread(eventually, lambda: busy_worker(server, "decode"), 10.0)
            pid = server.worker_pid(victim)
            os.kill(pid, signal.SIGSTOP)
            answer = await stream
        assert answer.token_ids == expected.token_ids
        assert answer.placement.attempts == 2
        assert any("lost" in event.message and victim in event.message for event in server.status().events)
        if _signal(pid, signal.SIGCONT):
            assert eventually(lambda: not _signal(pid, 0), 5.0), "a fenced worker went on"
        wait_for_whole_pool(server, 3)


def _signal(pid: int, number: int) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


async def test_the_ray_head_is_not_on_the_token_path(model: Path, tmp_path: Path) -> None:
    with serving(tmp_path, "--model", str(model), settings=SETTINGS) as server:
        one = request(PROMPT, 800, ignore_eos=True)
        started = asyncio.Event()
        async with grpc.aio.insecure_channel(server.address) as channel:
            stream = asyncio.create_task(generate(channel, one, on_chunk=lambda answer: started.set()))
            await started.wait()
            head = next(process for process in server.family() if process.name() == "gcs_server")
            head.kill()
            answer = await stream
            assert not stream.cancelled()
            assert len(answer.token_ids) == 800
            assert answer.placement.attempts == 1
            after = await generate(channel, request(PROMPT, 20, ignore_eos=True))
        assert after.token_ids == answer.token_ids[:20]


@pytest.fixture(scope="module")
def untransferred(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Answer:
    folder = tmp_path_factory.mktemp("colocated")
    with serving(folder, "--model", str(model), "--mode", "colocated", settings=PATIENT) as server:
        answer = asyncio.run(answer_of(server, SHORT))
    assert answer.placement.mode == pb.SERVING_MODE_LOCAL
    return answer


@pytest.mark.parametrize("checksum", ["xxh3_64", "none"])
async def test_transferred_blocks_are_verified_and_used(
    untransferred: Answer, model: Path, tmp_path: Path, checksum: str
) -> None:
    """A byte flipped on the way: caught and recomputed with verification on; with it off, the output changes, which
    proves that what was transferred is what is decoded from."""
    flip = ("transfer.failpoint=flip_received_bytes", f"transfer.checksum={checksum}")
    with serving(tmp_path, "--model", str(model), settings=(*PATIENT, *flip)) as server:
        answer = await answer_of(server, SHORT)
    if checksum == "none":
        assert answer.placement.mode == pb.SERVING_MODE_DISAGGREGATED
        assert answer.token_ids != untransferred.token_ids
    else:
        assert answer.placement.mode == pb.SERVING_MODE_RECOMPUTED
        assert "checksum" in answer.placement.mode_reason
        assert answer.token_ids == untransferred.token_ids


async def test_a_pool_of_eight_blocks_serves_a_hundred_requests(model: Path, tmp_path: Path) -> None:
    settings = (*PATIENT, "engine.num_blocks=8", "engine.block_size=16", "engine.hash_block_size=16")
    with serving(tmp_path, "--model", str(model), settings=settings) as server:
        requests = [request([i, *range(20)], 12, ignore_eos=True) for i in range(100)]
        answers = await generate_all(server.address, requests)
        assert [len(answer.token_ids) for answer in answers] == [12] * 100
        async with grpc.aio.insecure_channel(server.address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await generate(channel, request(list(range(200)), 5))
            assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert "200" in str(refused.value.details())
            assert "128" in str(refused.value.details())
