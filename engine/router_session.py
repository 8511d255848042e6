"""One router's connection to a worker: frames in, frames out, one frame per engine step. Decides nothing about
requests."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable

import grpc
import grpc.aio

from protos import codec
from protos import worker_pb2 as pb
from protos.types import (
    PROTOCOL_VERSION,
    HandoffRefused,
    MigrationFailed,
    PeerRef,
    TokenOutput,
    WorkerReport,
    WorkerStats,
)

# A router that does not read is cut off here; its requests end with its session.
MAX_PENDING_OUTPUTS = 65_536

Entry = TokenOutput | HandoffRefused | MigrationFailed  # what one request has to say


class RouterSession:
    """Invariant: outputs leave in the order they came. A session that overflowed or ended takes no more."""

    def __init__(self, router_id: str) -> None:
        self.router_id = router_id
        self.heard_at = 0.0  # for whoever keeps the time
        self._outputs: list[TokenOutput] = []
        self._refusals: list[HandoffRefused] = []
        self._failed_migrations: list[MigrationFailed] = []
        self._heartbeat = 0
        self._stats: WorkerStats | None = None
        self._is_leaving = False
        self._pending = asyncio.Event()
        self.closed = False

    def emit(self, entry: Entry) -> None:
        if self.closed:
            return
        match entry:
            case TokenOutput():
                self._outputs.append(entry)
            case HandoffRefused():
                self._refusals.append(entry)
            case MigrationFailed():
                self._failed_migrations.append(entry)
        if len(self._outputs) > MAX_PENDING_OUTPUTS:
            self.close()
        self._pending.set()

    def beat(self, heartbeat: int, stats: WorkerStats) -> None:
        self._heartbeat, self._stats = heartbeat, stats
        self._pending.set()

    def leave(self) -> None:
        """The router is to know that this worker wants to end: with every report from now on."""
        self._is_leaving = True
        self._pending.set()

    def close(self) -> None:
        self.closed = True
        self._pending.set()

    async def reports(self) -> AsyncIterator[WorkerReport]:
        """Everything emitted since the last report, as one report, for as long as the session is open."""
        while True:
            await self._pending.wait()
            self._pending.clear()
            if self.closed:
                return
            report = WorkerReport(
                self._heartbeat,
                tuple(self._outputs),
                tuple(self._refusals),
                self._stats,
                tuple(self._failed_migrations),
                self._is_leaving,
            )
            self._outputs, self._refusals, self._heartbeat, self._stats = [], [], 0, None
            self._failed_migrations = []
            yield report


async def check_hello(
    hello: pb.RouterHello, me: PeerRef, context: grpc.aio.ServicerContext[pb.RouterFrame, pb.WorkerFrame]
) -> None:
    """Abort the call where the router speaks another protocol or means an earlier life of this worker."""
    if hello.protocol_version != PROTOCOL_VERSION:
        await context.abort(
            grpc.StatusCode.FAILED_PRECONDITION,
            f"protocol version {hello.protocol_version} is not {PROTOCOL_VERSION}",
        )
    if hello.worker_incarnation != me.incarnation:
        await context.abort(
            grpc.StatusCode.FAILED_PRECONDITION,
            f"worker {me.worker_id} is incarnation {me.incarnation}, not {hello.worker_incarnation!r}",
        )


def worker_hello(me: PeerRef, model_fingerprint: str) -> pb.WorkerFrame:
    return pb.WorkerFrame(
        hello=pb.WorkerHello(
            protocol_version=PROTOCOL_VERSION,
            worker_id=me.worker_id,
            incarnation=me.incarnation,
            role=me.role.value,
            model_fingerprint=model_fingerprint,
            pid=os.getpid(),
        )
    )


async def send_reports(
    session: RouterSession, context: grpc.aio.ServicerContext[pb.RouterFrame, pb.WorkerFrame]
) -> None:
    async for report in session.reports():
        await context.write(codec.report_to_proto(report))


async def receive_commands(
    frames: AsyncIterator[pb.RouterFrame],
    handle: Callable[[RouterSession, pb.RouterFrame], None],
    session: RouterSession,
) -> None:
    async for frame in frames:
        handle(session, frame)
