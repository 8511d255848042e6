"""The worker's shell without a model: outputs reach the session that asked, a lost router frees its requests, a lost
lease ends the worker."""

from __future__ import annotations

import asyncio
import threading
import time
from array import array
from collections.abc import AsyncIterator, Callable

import grpc
import grpc.aio
import pytest

from engine.config import SchedulerConfig
from engine.engine_thread import EngineThread
from engine.events import OpenTransfer
from engine.request_owners import RequestOwners
from engine.router_session import RouterSession
from engine.scheduler_output import SchedulerOutput, StepResult
from engine.worker_config import LeaseConfig
from engine.worker_core import WorkerCore
from engine.worker_host import WorkerHost
from protos import codec
from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as pb_grpc
from protos.types import (
    PROTOCOL_VERSION,
    Abort,
    FinishReason,
    GenerateRequest,
    Handoff,
    PeerRef,
    Role,
    RouterCommand,
    SamplingParams,
    TokenOutput,
    TransferKind,
    TransferStats,
)

FINGERPRINT = "model"


class NoTransfers:
    """A worker that is never asked to hand off, and refuses pulls."""

    warm_links = ("decode-7",)
    stats = TransferStats(num_completed=3)

    def __init__(self) -> None:
        self.members: list[tuple[int, tuple[PeerRef, ...]]] = []
        self.opened: list[tuple[bytes, TransferKind]] = []
        self.refused_pulls: list[tuple[bytes, str]] = []

    def open(
        self, transfer_id: bytes, peer: PeerRef, request_id: str, attempt: int, num_blocks: int, kind: TransferKind
    ) -> None:
        self.opened.append((transfer_id, kind))

    def refuse_pull(self, pull_id: bytes, reason: str) -> None:
        self.refused_pulls.append((pull_id, reason))

    def set_members(self, version: int, members: tuple[PeerRef, ...]) -> None:
        self.members.append((version, members))


class Workplace:
    """A WorkerHost with a real engine thread and a real gRPC server; its executor samples token 7 over and over."""

    def __init__(self, lease: LeaseConfig) -> None:
        self.ended: list[str] = []
        self.transfers = NoTransfers()
        self.execute: Callable[[SchedulerOutput], StepResult] = self.sample_sevens
        self.step_s = 0.0
        core = WorkerCore(SchedulerConfig(max_model_len=4096, block_size=16, hash_block_size=16), 64, b"k", FINGERPRINT)
        self.server = grpc.aio.server()
        port = self.server.add_insecure_port("127.0.0.1:0")
        self.me = PeerRef("prefill-0", "life-1", f"127.0.0.1:{port}", Role.PREFILL)
        self.host = WorkerHost(self.me, FINGERPRINT, lease, self.ended.append)
        self.engine = EngineThread(core, lambda output: self.execute(output), self.host.deliver, self.host.crashed)
        self.host.wire(self.engine, self.transfers)  # type: ignore[arg-type]
        pb_grpc.add_WorkerServicer_to_server(self.host, self.server)

    def sample_sevens(self, output: SchedulerOutput) -> StepResult:
        time.sleep(self.step_s)
        return StepResult({each.request_id: (7,) for each in output.scheduled if each.samples})

    async def __aenter__(self) -> Workplace:
        await self.server.start()
        self.engine.start()
        self._lease_task = asyncio.create_task(self.host.keep_lease())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._lease_task.cancel()
        await self.server.stop(0)
        assert await asyncio.to_thread(self.engine.stop, 5.0)


@pytest.fixture
async def workplace() -> AsyncIterator[Workplace]:
    async with Workplace(LeaseConfig(heartbeat_interval_s=0.05, lease_s=5.0)) as place:
        yield place


def hello(**changes: object) -> pb.RouterFrame:
    fields: dict[str, object] = {
        "protocol_version": PROTOCOL_VERSION,
        "router_id": "router-0",
        "router_incarnation": "r",
        "worker_incarnation": "life-1",
    }
    return pb.RouterFrame(hello=pb.RouterHello(**(fields | changes)))  # type: ignore[arg-type]


def a_request(request_id: str, max_tokens: int, attempt: int = 1) -> GenerateRequest:
    sampling = SamplingParams(0.0, 1.0, 0, 1, max_tokens)
    return GenerateRequest(request_id, request_id, attempt, array("i", range(20)), 20, sampling)


async def next_outputs(stream: object, num_tokens: int) -> list[TokenOutput]:
    outputs: list[TokenOutput] = []
    while sum(len(output.token_ids) for output in outputs) < num_tokens:
        frame = await asyncio.wait_for(stream.read(), 5.0)  # type: ignore[attr-defined]
        outputs += codec.report_from_proto(frame).outputs
    return outputs


async def test_tokens_reach_the_router_that_asked_and_heartbeats_carry_stats(workplace: Workplace) -> None:
    async with grpc.aio.insecure_channel(workplace.me.address) as channel:
        asks, listens = (pb_grpc.WorkerStub(channel).Connect() for _ in range(2))
        for stream in (asks, listens):
            await stream.write(hello())
            answer = (await stream.read()).hello
            assert (answer.worker_id, answer.incarnation, answer.model_fingerprint) == ("prefill-0", "life-1", "model")
        await asks.write(codec.command_to_proto(RouterCommand(submits=(a_request("r", 3),))))
        outputs = await next_outputs(asks, 3)
        assert [token for output in outputs for token in output.token_ids] == [7, 7, 7]
        assert outputs[-1].finish_reason is FinishReason.LENGTH
        report = codec.report_from_proto(await asyncio.wait_for(listens.read(), 5.0))
        assert report.heartbeat > 0
        assert report.outputs == ()
        assert report.stats is not None
        assert report.stats.warm_links == ("decode-7",)
        assert report.stats.transfers.num_completed == 3
        assert report.stats.ledger_balanced


async def test_members_are_passed_on(workplace: Workplace) -> None:
    async with grpc.aio.insecure_channel(workplace.me.address) as channel:
        stream = pb_grpc.WorkerStub(channel).Connect()
        await stream.write(hello())
        await stream.read()
        await stream.write(codec.command_to_proto(RouterCommand(membership_version=3, members=(workplace.me,))))
        await stream.read()
        for _ in range(100):
            if workplace.transfers.members:
                break
            await asyncio.sleep(0.02)
        assert workplace.transfers.members == [(3, (workplace.me,))]


async def test_a_worker_that_is_to_end_tells_every_router_at_once_and_goes_on(workplace: Workplace) -> None:
    async with grpc.aio.insecure_channel(workplace.me.address) as channel:

        async def connected() -> object:
            stream = pb_grpc.WorkerStub(channel).Connect()
            await stream.write(hello())
            await stream.read()
            return stream

        async def until_told(stream: object) -> None:
            while not (await asyncio.wait_for(stream.read(), 5.0)).is_leaving:  # type: ignore[attr-defined]
                pass

        here_before = await connected()
        report = codec.report_from_proto(await asyncio.wait_for(here_before.read(), 5.0))  # type: ignore[attr-defined]
        assert not report.is_leaving
        await pb_grpc.WorkerStub(channel).Leave(pb.LeaveRequest(), timeout=5.0)
        comes_later = await connected()
        await until_told(here_before)
        await until_told(comes_later)
        await here_before.write(codec.command_to_proto(RouterCommand(submits=(a_request("r", 3),))))  # type: ignore[attr-defined]
        assert len(await next_outputs(here_before, 3)) > 0
        assert workplace.ended == []


async def test_a_router_that_leaves_takes_its_requests_along(workplace: Workplace) -> None:
    workplace.step_s = 0.005
    async with grpc.aio.insecure_channel(workplace.me.address) as channel:
        stream = pb_grpc.WorkerStub(channel).Connect()
        await stream.write(hello())
        await stream.read()
        await stream.write(codec.command_to_proto(RouterCommand(submits=(a_request("r", 900),))))
        await next_outputs(stream, 2)
        assert workplace.engine.stats.num_blocks == 64
        stream.cancel()
    for _ in range(100):
        stats = workplace.engine.stats
        if stats.num_steps > 2 and stats.num_running == 0:
            break
        await asyncio.sleep(0.05)
    assert (stats.num_running, stats.num_held_blocks, stats.num_leased_blocks) == (0, 0, 0)
    assert workplace.ended == []


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"protocol_version": 99}, "99"), ({"worker_incarnation": "life-0"}, "life-0")],
)
async def test_a_hello_for_another_life_or_protocol_is_refused(
    workplace: Workplace, wrong: dict[str, object], words: str
) -> None:
    async with grpc.aio.insecure_channel(workplace.me.address) as channel:
        stream = pb_grpc.WorkerStub(channel).Connect()
        await stream.write(hello(**wrong))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stream.read()
        assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert words in str(refused.value.details())


async def test_a_worker_without_a_router_ends_itself_and_drops_everything() -> None:
    async with Workplace(LeaseConfig(heartbeat_interval_s=0.05, lease_s=0.3)) as place:
        place.step_s = 0.005
        await asyncio.sleep(0.5)
        assert place.ended == [], "there is no lease before the first router"
        async with grpc.aio.insecure_channel(place.me.address) as channel:
            stream = pb_grpc.WorkerStub(channel).Connect()
            await stream.write(hello())
            await stream.read()
            await stream.write(codec.command_to_proto(RouterCommand(submits=(a_request("r", 900),))))
            await next_outputs(stream, 2)  # and from here on the router says nothing more
            for _ in range(100):
                if place.ended:
                    break
                await asyncio.sleep(0.05)
        assert len(place.ended) == 1
        assert "no router for" in place.ended[0]


async def test_a_router_that_hangs_beside_another_loses_its_requests_and_the_worker_lives() -> None:
    async with (
        Workplace(LeaseConfig(heartbeat_interval_s=0.05, lease_s=0.5)) as place,
        grpc.aio.insecure_channel(place.me.address) as channel,
    ):
        place.step_s = 0.01
        hangs, lives = (pb_grpc.WorkerStub(channel).Connect() for _ in range(2))
        for stream in (hangs, lives):
            await stream.write(hello())
            await stream.read()
        await hangs.write(codec.command_to_proto(RouterCommand(submits=(a_request("orphan", 450),))))
        await lives.write(codec.command_to_proto(RouterCommand(submits=(a_request("r", 450),))))
        await next_outputs(hangs, 2)  # and from here on it says nothing more
        for heartbeat in range(1, 60):
            await lives.write(codec.command_to_proto(RouterCommand(heartbeat=heartbeat)))
            if place.engine.stats.num_running == 1:
                break
            await asyncio.sleep(0.05)
        assert place.engine.stats.num_running == 1
        assert await next_outputs(lives, 2)
        assert place.ended == []


async def test_a_crashed_engine_ends_the_worker(workplace: Workplace) -> None:
    def crash(output: SchedulerOutput) -> StepResult:
        raise RuntimeError("out of memory")

    workplace.execute = crash
    async with grpc.aio.insecure_channel(workplace.me.address) as channel:
        stream = pb_grpc.WorkerStub(channel).Connect()
        await stream.write(hello())
        await stream.read()
        await stream.write(codec.command_to_proto(RouterCommand(submits=(a_request("r", 4),))))
        for _ in range(100):
            if workplace.ended:
                break
            await asyncio.sleep(0.05)
    assert len(workplace.ended) == 1
    assert "out of memory" in workplace.ended[0]


async def test_a_question_does_not_wait_for_the_step_under_way(workplace: Workplace) -> None:
    in_step, goes_on = threading.Event(), threading.Event()

    def hold(output: SchedulerOutput) -> StepResult:
        in_step.set()
        assert goes_on.wait(10.0)
        return workplace.sample_sevens(output)

    workplace.execute = hold
    async with grpc.aio.insecure_channel(workplace.me.address) as channel:
        stream = pb_grpc.WorkerStub(channel).Connect()
        await stream.write(hello())
        await stream.read()
        await stream.write(codec.command_to_proto(RouterCommand(submits=(a_request("r", 3),))))
        assert await asyncio.to_thread(in_step.wait, 5.0)
        workplace.host.on_pull_asked(b"p" * 16, workplace.me, "other", 1, (b"h" * 16,), TransferKind.PULL)
        for _ in range(100):
            if workplace.transfers.refused_pulls:
                break
            await asyncio.sleep(0.02)
        assert workplace.transfers.refused_pulls == [(b"p" * 16, "pulls are off here")]
        assert workplace.engine.step_age_s(time.monotonic()) > 0
        goes_on.set()
        outputs = await next_outputs(stream, 3)
    assert [token for output in outputs for token in output.token_ids] == [7, 7, 7]


async def test_what_ends_during_its_step_says_nothing_more_and_leaves_no_blocks(workplace: Workplace) -> None:
    in_step, goes_on = threading.Event(), threading.Event()

    def hold(output: SchedulerOutput) -> StepResult:
        in_step.set()
        assert goes_on.wait(10.0)
        return workplace.sample_sevens(output)

    workplace.execute = hold
    async with grpc.aio.insecure_channel(workplace.me.address) as channel:
        stream = pb_grpc.WorkerStub(channel).Connect()
        await stream.write(hello())
        await stream.read()
        await stream.write(codec.command_to_proto(RouterCommand(submits=(a_request("r", 3),))))
        assert await asyncio.to_thread(in_step.wait, 5.0)
        await stream.write(
            codec.command_to_proto(RouterCommand(aborts=(Abort("r", 1),), submits=(a_request("next", 2),)))
        )
        await asyncio.sleep(0.3)  # more than the engine's interval between two stats
        during = workplace.engine.stats
        assert (during.num_running, during.num_held_blocks, during.ledger_balanced) == (0, 2, True)
        goes_on.set()
        outputs = await next_outputs(stream, 2)
    assert {output.request_id for output in outputs} == {"next"}
    for _ in range(100):
        if workplace.engine.stats.num_held_blocks == 0:
            break
        await asyncio.sleep(0.05)
    assert workplace.engine.stats.num_held_blocks == 0
    assert workplace.engine.stats.ledger_balanced


@pytest.mark.parametrize("kind", [TransferKind.PULL, TransferKind.RETURN])
async def test_a_pull_takes_nobodys_request_along(workplace: Workplace, kind: TransferKind) -> None:
    """Its request_id is that of a request elsewhere, which may run here too: on its decode worker."""
    workplace.step_s = 0.02
    async with grpc.aio.insecure_channel(workplace.me.address) as channel:
        stream = pb_grpc.WorkerStub(channel).Connect()
        await stream.write(hello())
        await stream.read()
        await stream.write(codec.command_to_proto(RouterCommand(submits=(a_request("r", 20),))))
        await next_outputs(stream, 1)
        pull_id = b"p" * 16
        workplace.host.deliver([OpenTransfer(Handoff(pull_id, workplace.me), "r", 1, 1, kind)])
        await asyncio.sleep(0)
        workplace.host.on_closed(pull_id, None)
        outputs = await next_outputs(stream, 19)
    assert workplace.transfers.opened == [(pull_id, kind)]
    assert outputs[-1].finish_reason is FinishReason.LENGTH


class TestRequestOwners:
    """An entry lives until the request has finished here, was aborted, or was handed over."""

    def setup_method(self) -> None:
        self.owners = RequestOwners()

    async def test_a_handed_over_request_is_forgotten_when_its_transfer_closes(self) -> None:
        session = RouterSession("router-0")
        self.owners.submitted(a_request("r", 5), session)
        self.owners.transfer_opened(b"t", "r", 1)
        self.owners.emit(TokenOutput("r", 1, 0, (7,)))
        self.owners.transfer_closed(b"t")
        assert len(self.owners) == 0

    async def test_a_refused_transfer_keeps_its_owner_for_the_retarget(self) -> None:
        session = RouterSession("router-0")
        self.owners.submitted(a_request("r", 5), session)
        self.owners.transfer_opened(b"t", "r", 1)
        self.owners.transfer_refused(b"t")
        self.owners.transfer_opened(b"u", "r", 1)
        self.owners.transfer_closed(b"t")
        assert len(self.owners) == 2
        self.owners.transfer_closed(b"u")
        assert len(self.owners) == 0

    async def test_an_old_transfer_does_not_take_a_new_attempt_along(self) -> None:
        session = RouterSession("router-0")
        self.owners.submitted(a_request("r", 5), session)
        self.owners.transfer_opened(b"t", "r", 1)
        self.owners.submitted(a_request("r", 5, attempt=2), session)
        self.owners.transfer_closed(b"t")
        self.owners.aborted(Abort("r", 1))
        assert len(self.owners) == 1
        self.owners.emit(TokenOutput("r", 2, 0, (7,), FinishReason.LENGTH))
        assert len(self.owners) == 0
