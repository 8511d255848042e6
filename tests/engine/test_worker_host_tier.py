"""Host memory in whole workers, without Ray: over gRPC, with real transfers between two of them."""

from __future__ import annotations

import asyncio
import threading
from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc.aio
import pytest

from decode_worker.actor import DecodeWorker
from engine.config import PullConfig
from engine.worker import Worker, WorkerReady
from engine.worker_config import EngineConfig, LeaseConfig, WorkerSpec
from kvtransfer.config import TransferConfig
from prefill_worker.actor import PrefillWorker
from protos import codec
from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as pb_grpc
from protos.types import (
    PROTOCOL_VERSION,
    GenerateRequest,
    PeerRef,
    Role,
    RouterCommand,
    SamplingParams,
    WorkerAccount,
    WorkerStats,
)
from tests.engine.test_host_copies import BLOCK_SIZE, NUM_BLOCKS, NUM_FULL, NUM_NEW_TOKENS, PROMPTS
from tests.tiny_models import greedy_reference, save_tiny_model

BLOCK_NBYTES = BLOCK_SIZE * 3 * 2 * 2 * 16 * 4  # 3 layers, keys and values, 2 heads of 16 float32
pytestmark = pytest.mark.usefixtures("_own_excepthook")


@pytest.fixture
def _own_excepthook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # serve() sets its own


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("llama") / "model", "llama")


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    return greedy_reference(model, PROMPTS, NUM_NEW_TOKENS)


def spec(model: Path, name: str, role: Role = Role.PREFILL, host_cache_bytes: int = 40 * BLOCK_NBYTES) -> WorkerSpec:
    engine = EngineConfig(
        model=str(model),
        max_num_batched_tokens=32,
        block_size=BLOCK_SIZE,
        hash_block_size=BLOCK_SIZE,
        num_blocks=NUM_BLOCKS,
        host_cache_bytes=host_cache_bytes,
        pulls=PullConfig(s_per_token=1e-9, deadline_s=20.0, max_returns=0, returns_answers=False),
    )
    patient = LeaseConfig(lease_s=60.0)  # RouterStream sends no heartbeats
    return WorkerSpec(name, "life-1", role, engine, b"k" * 32, patient)


class RouterStream:
    """What a router says to one worker and hears from it."""

    def __init__(self, call: grpc.aio.StreamStreamCall[pb.RouterFrame, pb.WorkerFrame]) -> None:
        self._call = call

    async def greet(self, ready: WorkerReady, members: tuple[PeerRef, ...]) -> None:
        hello = pb.RouterHello(
            protocol_version=PROTOCOL_VERSION,
            router_id="router-0",
            router_incarnation="r",
            worker_incarnation=ready.ref.incarnation,
        )
        await self._call.write(pb.RouterFrame(hello=hello))
        await self._call.read()
        await self._call.write(codec.command_to_proto(RouterCommand(membership_version=1, members=members)))

    async def answer(self, token_ids: list[int], request_id: str, *homes: str) -> tuple[list[int], WorkerAccount]:
        sampling = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, seed=0, max_tokens=NUM_NEW_TOKENS)
        ids = array("i", token_ids)
        request = GenerateRequest(request_id, request_id, 1, ids, len(ids), sampling, home_worker_ids=homes)
        await self._call.write(codec.command_to_proto(RouterCommand(submits=(request,))))
        tokens: list[int] = []
        while True:
            frame = await asyncio.wait_for(self._call.read(), 10.0)
            assert isinstance(frame, pb.WorkerFrame)
            for output in codec.report_from_proto(frame).outputs:
                tokens += output.token_ids
                if output.account is not None:
                    return tokens, output.account

    async def stats_when(self, condition: Callable[[WorkerStats], bool]) -> WorkerStats:
        """Of the first heartbeat that says so."""
        async with asyncio.timeout(10.0):
            while True:
                frame = await self._call.read()
                assert isinstance(frame, pb.WorkerFrame)
                stats = codec.report_from_proto(frame).stats
                assert stats is None or stats.ledger_balanced
                if stats is not None and condition(stats):
                    return stats

    async def ask_all(self, name: str) -> list[tuple[list[int], int]]:
        """One after the other, each when all KV of those before is in host memory."""
        answers = []
        for number, prompt in enumerate(PROMPTS):
            tokens, account = await self.answer(prompt, f"{name} {number}")
            answers.append((tokens, account.num_cached_tokens))
            num_saved = (number + 1) * ((len(prompt) + NUM_NEW_TOKENS - 1) // BLOCK_SIZE)
            await self.stats_when(lambda stats, least=num_saved: stats.num_cached_host_blocks >= least)  # type: ignore[misc]
        return answers


@asynccontextmanager
async def serving(*workers: Worker) -> AsyncIterator[list[RouterStream]]:
    """All know each other; afterwards no thread is left."""
    async with AsyncExitStack() as stack:
        ready: list[WorkerReady] = []
        for worker in workers:
            await worker.load()
            ready.append(await worker.serve())
            stack.push_async_callback(worker.stop, 1.0)
        streams = []
        for each in ready:
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(each.ref.address))
            streams.append(RouterStream(pb_grpc.WorkerStub(channel).Connect()))
            await streams[-1].greet(each, tuple(other.ref for other in ready))
        yield streams
    assert [each.name for each in threading.enumerate() if each.name.startswith("twinring-")] == []


@pytest.mark.parametrize("made", [PrefillWorker, DecodeWorker])
async def test_a_worker_brings_back_what_its_device_evicted(
    model: Path, expected: list[list[int]], made: type[PrefillWorker | DecodeWorker]
) -> None:
    role = Role.PREFILL if made is PrefillWorker else Role.DECODE
    async with serving(made(spec(model, f"{role}-0", role), TransferConfig())) as [stream]:
        assert await stream.ask_all("first") == [(tokens, 0) for tokens in expected]
        assert await stream.ask_all("again") == [(tokens, NUM_FULL) for tokens in expected]
        stats = await stream.stats_when(lambda stats: stats.num_host_loaded_tokens >= 4 * NUM_FULL)
        assert stats.num_host_blocks == 40


async def test_a_pull_is_served_from_host_memory(model: Path, expected: list[list[int]]) -> None:
    workers = [PrefillWorker(spec(model, f"prefill-{n}"), TransferConfig()) for n in range(2)]
    async with serving(*workers) as [home, other]:
        await home.ask_all("home")
        await other.answer(list(range(32)), "says what computing takes")
        tokens, account = await other.answer(PROMPTS[0], "pulls", "prefill-0")
        assert (tokens, account.num_pulled_tokens) == (expected[0], NUM_FULL)
        stats = await home.stats_when(lambda stats: stats.num_leased_blocks == 0)
        assert stats.num_host_loaded_tokens == 0, "it went straight from host memory"


async def test_host_memory_that_holds_no_block_is_refused(model: Path) -> None:
    worker = PrefillWorker(spec(model, "prefill-0", host_cache_bytes=BLOCK_NBYTES - 1), TransferConfig())
    with pytest.raises(ValueError, match=f"host_cache_bytes of {BLOCK_NBYTES - 1} bytes holds no block: one takes"):
        await worker.load()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"host_cache_bytes": -1}, "host_cache_bytes must not be negative, got -1"),
        ({"host_cache_bytes": 1, "enable_prefix_caching": False}, "host_cache_bytes needs the prefix cache"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EngineConfig(model="m", **fields)  # type: ignore[arg-type]
