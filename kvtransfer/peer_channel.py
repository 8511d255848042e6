"""One control stream between two workers, whichever of them dialled: frames in order, pings, and an end with a reason.
Knows what a frame is, not what any of them means."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import grpc

from kvtransfer.config import TransferConfig
from kvtransfer.messages import MAX_FRAME_NBYTES, Message, Ping, decode, encode
from protos import worker_pb2

MAX_NUM_UNSENT = 4096  # frames; a peer that does not read is no peer


class FrameStream(Protocol):
    """A gRPC call at the one end, a servicer context at the other."""

    def read(self) -> Awaitable[Any]: ...

    def write(self, message: Any) -> Awaitable[None]: ...


class ChannelLost(Exception):
    """The stream ended, fell silent, or carried something that is not a frame."""


class PeerChannel:
    """Invariant: frames leave in the order of `send`; `_ended` is set once, with the first reason."""

    def __init__(self, stream: FrameStream, config: TransferConfig) -> None:
        self._stream = stream
        self._config = config
        self._unsent: asyncio.Queue[Message] = asyncio.Queue(MAX_NUM_UNSENT)
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def send(self, message: Message) -> None:
        if self._unsent.full():
            self.close("the peer does not read")
        elif not self._ended.done():
            self._unsent.put_nowait(message)

    def close(self, reason: str) -> None:
        if not self._ended.done():
            self._ended.set_result(reason)

    async def read(self, timeout_s: float, max_nbytes: int = MAX_FRAME_NBYTES) -> Message:
        """The next frame, pings included. Raises ChannelLost."""
        try:
            async with asyncio.timeout(timeout_s):
                frame = await self._stream.read()
        except TimeoutError:
            raise ChannelLost(f"silent for {timeout_s} s") from None
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            raise ChannelLost(_words(error)) from None
        if frame is grpc.aio.EOF:
            raise ChannelLost("the peer ended the stream")
        try:
            return decode(frame.body, max_nbytes)
        except ValueError as error:
            raise ChannelLost(f"malformed frame: {error}") from None

    async def write(self, message: Message) -> None:
        """Send before anything that is queued. Raises ChannelLost."""
        frame = worker_pb2.PeerFrame(body=encode(message))
        try:
            async with asyncio.timeout(self._config.silence_timeout_s):
                await self._stream.write(frame)
        except TimeoutError:
            raise ChannelLost("the peer does not read") from None
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            raise ChannelLost(_words(error)) from None

    async def run(self, on_message: Callable[[Message], None]) -> str:
        """Carry frames until the stream is lost or closed; answers why."""
        halves = [asyncio.create_task(self._read_all(on_message)), asyncio.create_task(self._write_all())]
        try:
            awaited: list[asyncio.Future[Any]] = [*halves, self._ended]
            await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
            for half in halves:
                if half.done() and not self._ended.done():
                    half.result()
            return self._ended.result()
        except ChannelLost as lost:
            return str(lost)
        finally:
            for half in halves:
                half.cancel()
            await asyncio.gather(*halves, return_exceptions=True)

    async def _read_all(self, on_message: Callable[[Message], None]) -> None:
        while True:
            message = await self.read(self._config.silence_timeout_s)
            if not isinstance(message, Ping):
                on_message(message)

    async def _write_all(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._config.ping_interval_s):
                    message = await self._unsent.get()
            except TimeoutError:
                message = Ping()
            await self.write(message)


def _words(error: Exception) -> str:
    """gRPC raises InvalidStateError for a write to a call that has ended."""
    return f"{error.code().name}: {error.details()}" if isinstance(error, grpc.aio.AioRpcError) else str(error)
