"""gRPC between the agents of one process, as far as they use it, under a virtual clock: streams and calls that can be
cut, held up and refused, and a `weather` that decides what becomes of each frame. Knows frames as bytes only."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import grpc

from protos import worker_pb2

DELAY_S = 0.001  # of a frame on a good day


class Weather(Protocol):
    """What becomes of frames between two lives, each named by its incarnation."""

    def fates(self, sender: str, receiver: str, body: bytes, to_dialler: bool) -> list[tuple[float, bytes]]:
        """What arrives of a frame, after how many seconds each; empty where it is lost."""


def unavailable(why: str) -> grpc.aio.AioRpcError:
    nothing = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, nothing, nothing, why)


class Pipe:
    """One direction of a stream. What has arrived is read before an orderly end; a break drops it."""

    def __init__(self, deliver: Callable[[Pipe, bytes], None]) -> None:
        self._deliver = deliver
        self._frames: deque[bytes] = deque()
        self._end: Any = None  # an exception to raise, or EOF
        self._changed = asyncio.Event()

    def arrive(self, body: bytes) -> None:
        self._frames.append(body)
        self._changed.set()

    def end(self, with_what: Any) -> None:
        if self._end is None:
            self._end = with_what
            self._changed.set()

    async def read(self) -> Any:
        while self._end is None and not self._frames:
            self._changed.clear()
            await self._changed.wait()
        if isinstance(self._end, BaseException):
            raise self._end
        return worker_pb2.PeerFrame(body=self._frames.popleft()) if self._frames else self._end

    async def write(self, frame: Any) -> None:
        if self._end is not None:
            raise asyncio.InvalidStateError("the call has ended")
        self._deliver(self, frame.body)


@dataclass(eq=False)
class StreamEnd:
    """A call at the one end, a servicer's context at the other."""

    incoming: Pipe
    outgoing: Pipe
    cancel: Callable[[], None] = lambda: None  # by the dialler

    def read(self) -> Awaitable[Any]:
        return self.incoming.read()

    def write(self, message: Any) -> Awaitable[None]:
        return self.outgoing.write(message)


class Stream:
    """One call of Control or Ask, from dialling to its end at both ends."""

    def __init__(self, network: Network, dialler: str, acceptor: str, method: str) -> None:
        self.parties = (dialler, acceptor)
        self.to_acceptor = Pipe(lambda pipe, body: network.carry(dialler, acceptor, body, pipe, to_dialler=False))
        self.to_dialler = Pipe(lambda pipe, body: network.carry(acceptor, dialler, body, pipe, to_dialler=True))
        self.call = StreamEnd(self.to_dialler, self.to_acceptor, lambda: self.cut("cancelled"))
        handler = network.lives[acceptor].handlers[method]
        served = StreamEnd(self.to_acceptor, self.to_dialler)
        self.serving = asyncio.create_task(handler.stream_stream(None, served))
        self.serving.add_done_callback(lambda task: self._served(network))

    def _served(self, network: Network) -> None:
        """The end comes behind what was said before it."""
        network.streams.remove(self)
        asyncio.get_running_loop().call_later(2 * DELAY_S, self.to_dialler.end, grpc.aio.EOF)
        self.to_acceptor.end(grpc.aio.EOF)

    def cut(self, why: str) -> None:
        """A break: what is on its way is lost. Nothing where it has ended."""
        self.to_dialler.end(unavailable(why))
        self.to_acceptor.end(asyncio.InvalidStateError(why))
        self.serving.cancel()


@dataclass(eq=False)
class Life:
    """One worker as far as the network knows it; a server for what registers itself."""

    incarnation: str
    is_reachable: bool = True
    handlers: dict[str, Any] = field(default_factory=dict)

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        pass

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        self.handlers = handlers


class Network:
    """An address is `dialler>acceptor`: each life has its own for every other. Invariant: `streams` has the calls that
    are being served."""

    def __init__(self, weather: Weather) -> None:
        self.lives: dict[str, Life] = {}
        self.streams: list[Stream] = []
        self._weather = weather
        self._loop = asyncio.get_running_loop()

    def join(self, incarnation: str) -> Life:
        self.lives[incarnation] = Life(incarnation)
        return self.lives[incarnation]

    def kill(self, incarnation: str) -> None:
        """As others see it: every stream breaks, nobody answers any more."""
        self.lives[incarnation].is_reachable = False
        for stream in [stream for stream in self.streams if incarnation in stream.parties]:
            stream.cut("Socket closed")

    def reaches(self, dialler: str, acceptor: str) -> bool:
        return self.lives[dialler].is_reachable and acceptor in self.lives and self.lives[acceptor].is_reachable

    def channel(self, address: str, options: object = None) -> Channel:
        dialler, acceptor = address.split(">")
        return Channel(self, dialler, acceptor)

    def carry(self, sender: str, receiver: str, body: bytes, pipe: Pipe, *, to_dialler: bool) -> None:
        for delay_s, arriving in self._weather.fates(sender, receiver, body, to_dialler):
            self._loop.call_later(delay_s, pipe.arrive, arriving)


class Channel:
    """What a stub needs of a channel."""

    def __init__(self, network: Network, dialler: str, acceptor: str) -> None:
        self._network = network
        self._dialler, self._acceptor = dialler, acceptor
        self._streams: list[Stream] = []

    async def __aenter__(self) -> Channel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close(None)

    async def close(self, grace: float | None) -> None:
        """What is under way is cancelled; a served call ends in its own time."""
        for stream in self._streams:
            if stream in self._network.streams:
                stream.cut("the channel was closed")

    def stream_stream(self, path: str, **_: object) -> Callable[..., Any]:
        return partial(self._dial, path.rpartition("/")[2])

    def _dial(self, method: str, timeout: float | None = None) -> Any:
        if not self._network.reaches(self._dialler, self._acceptor):
            return _NobodyThere()
        stream = Stream(self._network, self._dialler, self._acceptor, method)
        if timeout is not None:
            asyncio.get_running_loop().call_later(timeout, stream.cut, "Deadline Exceeded")
        self._network.streams.append(stream)
        self._streams.append(stream)
        return stream.call


class _NobodyThere:
    def cancel(self) -> None:
        pass

    async def read(self) -> Any:
        raise unavailable("connection refused")

    async def write(self, message: Any) -> None:
        raise unavailable("connection refused")
