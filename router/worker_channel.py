"""One stream to one life of one worker: hello, heartbeats, batched commands out, reports in. Decides when that worker
counts as lost; knows nothing of requests."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import grpc

from protos import worker_pb2 as pb
from protos.codec import command_to_proto, report_from_proto
from protos.types import PROTOCOL_VERSION, GenerateRequest, PeerRef, RouterCommand, WorkerReport
from protos.worker_pb2_grpc import WorkerStub
from router.config import RouterConfig
from router.events import Send

log = logging.getLogger("twinring.router")

MAX_FRAME_TOKENS = 256 * 1024  # of prompts in one frame (1 MiB), so that it stays below usual message limits
CHANNEL_OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))

Stream = grpc.aio.StreamStreamCall[pb.RouterFrame, pb.WorkerFrame]


class WorkerRefused(ConnectionError):
    """The worker answered, and is not the one that was meant or does not fit."""


@dataclass(frozen=True, slots=True)
class RouterIdentity:
    router_id: str
    incarnation: str
    model_fingerprint: str  # of the model that workers must serve


class WorkerChannel:
    """Invariant: on_lost is called at most once, and not after close(); nothing is reported after either."""

    def __init__(
        self,
        ref: PeerRef,
        config: RouterConfig,
        identity: RouterIdentity,
        on_report: Callable[[PeerRef, WorkerReport], None],
        on_lost: Callable[[PeerRef, str], None],
    ) -> None:
        self.ref = ref
        self._config = config
        self._identity = identity
        self._on_report = on_report
        self._on_lost = on_lost
        self._submits: deque[GenerateRequest] = deque()
        self._rest = RouterCommand()  # what goes out behind the submits
        self._wake = asyncio.Event()
        self._heartbeat = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._channel: grpc.aio.Channel | None = None
        self._is_closed = False

    async def connect(self) -> None:
        """Returns when hellos are exchanged. ConnectionError where the worker does not answer in time or refuses."""
        self._channel = grpc.aio.insecure_channel(self.ref.address, options=CHANNEL_OPTIONS)
        try:
            async with asyncio.timeout(self._config.connect_timeout_s):
                await self._channel.channel_ready()
                stream = WorkerStub(self._channel).Connect()
                await stream.write(self._hello())
                frame = await stream.read()
            self._check_hello(frame)
        except (TimeoutError, grpc.RpcError, WorkerRefused) as error:
            await self.close()
            raise ConnectionError(f"worker {self.ref.worker_id} at {self.ref.address}: {_reason(error)}") from error
        except asyncio.CancelledError:
            await self.close()
            raise
        self._tasks = [asyncio.create_task(self._read(stream)), asyncio.create_task(self._write(stream))]
        for task in self._tasks:
            task.add_done_callback(self._ended)

    def send(self, send: Send) -> None:
        """Queued for the next frame; never blocks."""
        self._submits.extend(send.submits)
        self._rest = replace(
            self._rest,
            retargets=self._rest.retargets + send.retargets,
            migrates=self._rest.migrates + send.migrates,
            aborts=self._rest.aborts + send.aborts,
        )
        self._wake.set()

    def send_members(self, version: int, members: tuple[PeerRef, ...]) -> None:
        self._rest = replace(self._rest, membership_version=version, members=members)
        self._wake.set()

    async def close(self) -> None:
        self._is_closed = True
        others = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        if self._channel is not None:
            await self._channel.close()

    # --- hello ----------------------------------------------------------------------------------------------------

    def _hello(self) -> pb.RouterFrame:
        hello = pb.RouterHello(
            protocol_version=PROTOCOL_VERSION,
            router_id=self._identity.router_id,
            router_incarnation=self._identity.incarnation,
            worker_incarnation=self.ref.incarnation,
        )
        return pb.RouterFrame(hello=hello)

    def _check_hello(self, frame: object) -> None:
        if not isinstance(frame, pb.WorkerFrame) or not frame.HasField("hello"):
            raise WorkerRefused("its first frame is no hello")
        hello = frame.hello
        for name, got, expected in (
            ("protocol_version", hello.protocol_version, PROTOCOL_VERSION),
            ("worker_id", hello.worker_id, self.ref.worker_id),
            ("incarnation", hello.incarnation, self.ref.incarnation),
            ("role", hello.role, self.ref.role.value),
            ("model_fingerprint", hello.model_fingerprint, self._identity.model_fingerprint),
        ):
            if got != expected:
                raise WorkerRefused(f"its hello has {name} {got!r}, expected {expected!r}")

    # --- the two directions ---------------------------------------------------------------------------------------

    async def _read(self, stream: Stream) -> None:
        """Only a heartbeat that counts up renews the lease: it vouches for the engine, not for the event loop."""
        loop = asyncio.get_running_loop()
        last_heartbeat, expires_at = 0, loop.time() + self._config.lease_s
        try:
            while True:
                async with asyncio.timeout_at(expires_at):
                    frame = await stream.read()
                if not isinstance(frame, pb.WorkerFrame):
                    return self._lose(f"the worker ended the stream: {await _status(stream)}")
                report = report_from_proto(frame)
                if report.heartbeat > last_heartbeat:
                    last_heartbeat, expires_at = report.heartbeat, loop.time() + self._config.lease_s
                self._on_report(self.ref, report)
        except TimeoutError:
            self._lose(f"no heartbeat within {self._config.lease_s:g} s")
        except (grpc.RpcError, ValueError) as error:  # ValueError: a frame that cannot be read
            self._lose(_reason(error))

    async def _write(self, stream: Stream) -> None:
        try:
            while True:
                async with asyncio.timeout(self._config.lease_s):
                    await stream.write(command_to_proto(self._next_command()))
                if not self._submits and self._rest == RouterCommand():
                    await self._wait_for_work()
        except TimeoutError:
            self._lose(f"the worker took no frame within {self._config.lease_s:g} s")
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            self._lose(_reason(error))

    async def _wait_for_work(self) -> None:
        """Until there is something to send, or the next heartbeat is due."""
        self._wake.clear()
        try:
            async with asyncio.timeout(self._config.heartbeat_interval_s):
                await self._wake.wait()
        except TimeoutError:
            return

    def _next_command(self) -> RouterCommand:
        """Submits up to a frame's worth; all else only behind the last of them, since they may mean one."""
        submits: list[GenerateRequest] = []
        num_tokens = 0
        while self._submits and (not submits or num_tokens + len(self._submits[0].token_ids) <= MAX_FRAME_TOKENS):
            submits.append(self._submits.popleft())
            num_tokens += len(submits[-1].token_ids)
        rest = RouterCommand()
        if not self._submits:
            rest, self._rest = self._rest, rest
        self._heartbeat += 1
        return replace(rest, heartbeat=self._heartbeat, submits=tuple(submits))

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A task that ends by an error nobody expected is a bug of ours: say so, and do not leave requests hanging."""
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.error("bug in the channel to worker %s", self.ref.worker_id, exc_info=error)
            self._lose(f"router error: {error!r}")

    def _lose(self, reason: str) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        log.warning("lost worker %s (%s): %s", self.ref.worker_id, self.ref.incarnation, reason)
        self._on_lost(self.ref, reason)


def _reason(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error) or type(error).__name__


async def _status(stream: Stream) -> str:
    """Of a stream that has ended, so this does not wait."""
    return f"{(await stream.code()).name}: {await stream.details()}"
