"""A worker without a model: a real gRPC service that echoes the prompt, token by token. Handoffs between fakes go
through a shared dict instead of KV."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc

from protos import worker_pb2 as pb
from protos.codec import command_from_proto, report_to_proto
from protos.types import (
    PROTOCOL_VERSION,
    FinishReason,
    GenerateRequest,
    LinkStats,
    PeerRef,
    Role,
    RouterCommand,
    ServingMode,
    TokenOutput,
    TransferStats,
    WorkerAccount,
    WorkerReport,
    WorkerStats,
)
from protos.worker_pb2_grpc import WorkerServicer, add_WorkerServicer_to_server

FINGERPRINT = "echo-model"


@dataclass
class Fabric:
    """What the fakes of one test share."""

    committed: dict[bytes, asyncio.Event] = field(default_factory=dict)
    token_s: float = 0.0  # between two reports
    num_tokens_per_report: int = 1

    def transfer(self, transfer_id: bytes) -> asyncio.Event:
        return self.committed.setdefault(transfer_id, asyncio.Event())


class FakeWorker(WorkerServicer):
    def __init__(self, worker_id: str, fabric: Fabric, incarnation: str = "1", num_blocks: int = 64) -> None:
        self.role = Role.PREFILL if worker_id.startswith("p") else Role.DECODE
        self.worker_id = worker_id
        self.incarnation = incarnation
        self.fingerprint = FINGERPRINT
        self.warm_links: tuple[str, ...] = ("d-0", "d-1")
        self.num_blocks = num_blocks
        self.num_held_blocks = 0
        self.is_leaving = False
        self.is_silent = False  # no heartbeats
        self.shuns: set[str] = set()  # ids of routers whose streams end
        self.commands: list[RouterCommand] = []
        self.generating: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._fabric = fabric
        self._server = grpc.aio.server()
        self._address = ""

    async def start(self) -> PeerRef:
        add_WorkerServicer_to_server(self, self._server)
        self._address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        return self.ref

    @property
    def ref(self) -> PeerRef:
        return PeerRef(self.worker_id, self.incarnation, self._address, self.role)

    async def kill(self) -> None:
        for task in self.generating.values():
            task.cancel()
        await self._server.stop(None)

    @property
    def submits(self) -> list[GenerateRequest]:
        return [submit for command in self.commands for submit in command.submits]

    @property
    def num_aborts(self) -> int:
        return sum(len(command.aborts) for command in self.commands)

    async def Connect(self, frames: AsyncIterator[pb.RouterFrame], context: object) -> AsyncIterator[pb.WorkerFrame]:
        hello = (await anext(aiter(frames))).hello
        assert hello.protocol_version == PROTOCOL_VERSION
        if hello.router_id in self.shuns:
            return
        yield pb.WorkerFrame(
            hello=pb.WorkerHello(
                protocol_version=PROTOCOL_VERSION,
                worker_id=self.worker_id,
                incarnation=self.incarnation,
                role=self.role.value,
                model_fingerprint=self.fingerprint,
            )
        )
        reports: asyncio.Queue[WorkerReport] = asyncio.Queue()
        reader = asyncio.create_task(self._read(frames, reports))
        heartbeat = 0
        try:
            while hello.router_id not in self.shuns:
                heartbeat += not self.is_silent
                try:
                    report = await asyncio.wait_for(reports.get(), 0.05)
                    yield report_to_proto(WorkerReport(heartbeat, report.outputs, report.refusals, self._stats()))
                except TimeoutError:
                    yield report_to_proto(WorkerReport(heartbeat, stats=self._stats(), is_leaving=self.is_leaving))
        finally:
            reader.cancel()

    def _stats(self) -> WorkerStats:
        links = (*(LinkStats(one, "gloo") for one in self.warm_links), LinkStats("d-lost", ""))
        return WorkerStats(
            num_blocks=self.num_blocks,
            num_free_blocks=self.num_blocks - self.num_held_blocks,
            num_held_blocks=self.num_held_blocks,
            warm_links=self.warm_links,
            transfers=TransferStats(links=links),
        )

    async def _read(self, frames: AsyncIterator[pb.RouterFrame], reports: asyncio.Queue[WorkerReport]) -> None:
        async for frame in frames:
            command = command_from_proto(frame)
            self.commands.append(command)
            for request in command.submits:
                key = (request.request_id, request.attempt)
                self.generating[key] = asyncio.create_task(self._generate(request, reports))
            for abort in command.aborts:
                task = self.generating.pop((abort.request_id, abort.attempt), None)
                if task is not None:
                    task.cancel()

    async def _generate(self, request: GenerateRequest, reports: asyncio.Queue[WorkerReport]) -> None:
        index, last = request.num_committed_tokens, request.sampling_params.max_tokens
        account = WorkerAccount(num_cached_tokens=3)
        if request.handoff_from is not None:
            await self._fabric.transfer(request.handoff_from.transfer_id).wait()
            index += 1
            account = WorkerAccount(num_kv_bytes=100, mode=ServingMode.DISAGGREGATED)
        is_finished = False
        while index < last and not is_finished:
            await asyncio.sleep(self._fabric.token_s)
            num_tokens = 1 if request.handoff_to else min(self._fabric.num_tokens_per_report, last - index)
            token_ids, finish = _echo(request, index, num_tokens)
            is_finished = finish is not None or request.handoff_to is not None
            output = TokenOutput(
                request.request_id,
                request.attempt,
                index,
                token_ids,
                finish,
                account if is_finished else None,
            )
            reports.put_nowait(WorkerReport(outputs=(output,)))
            index += len(token_ids)
        if request.handoff_to is not None:
            self._fabric.transfer(request.handoff_to.transfer_id).set()
        self.generating.pop((request.request_id, request.attempt), None)


def _echo(request: GenerateRequest, index: int, num_tokens: int) -> tuple[tuple[int, ...], FinishReason | None]:
    params = request.sampling_params
    token_ids: list[int] = []
    for at in range(index, index + num_tokens):
        token_ids.append(request.token_ids[at % request.num_prompt_tokens])
        if token_ids[-1] in params.stop_token_ids:
            return tuple(token_ids), FinishReason.STOP
    return tuple(token_ids), FinishReason.LENGTH if index + num_tokens == params.max_tokens else None
