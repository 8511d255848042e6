"""What workers ask of each other beside transfers: to send a prefix (a pull, or the fetching of a return), and to fetch
one (a return is offered). Decides who may ask and how long an answer may take; what the answer is, the host says."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import grpc

from kvtransfer.config import TransferConfig
from kvtransfer.greeter import Greeter
from kvtransfer.host import TransferHost
from kvtransfer.messages import (
    MAX_ASK_NBYTES,
    Answer,
    Ask,
    HelloRefused,
    PullAsk,
    clip,
    unpack_hashes,
)
from kvtransfer.outgoing_peer import CHANNEL_OPTIONS
from kvtransfer.peer_channel import ChannelLost, FrameStream, PeerChannel
from kvtransfer.source_side import SourceSide
from protos import worker_pb2_grpc
from protos.types import PeerRef

logger = logging.getLogger("twinring.kvtransfer")

MAX_NUM_ASKING = 256  # unanswered asks of one worker: others that hang must not fill its memory


class Asks:
    """Invariant: `_unanswered` has the pulls that the host was asked for and has not answered, each id once;
    `_channels` is keyed by incarnation and has members only."""

    def __init__(
        self,
        host: TransferHost,
        config: TransferConfig,
        source: SourceSide,
        greeter: Greeter,
    ) -> None:
        self._host = host
        self._config = config
        self._source = source
        self._greeter = greeter
        self._loop = asyncio.get_running_loop()
        self._members: Mapping[str, PeerRef] = {}
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._unanswered: dict[bytes, asyncio.Future[str]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def set_members(self, members: Mapping[str, PeerRef]) -> None:
        self._members = members
        for incarnation in self._channels.keys() - {peer.incarnation for peer in members.values()}:
            self._spawn(self._channels.pop(incarnation).close(None))

    async def close(self) -> None:
        self.set_members({})
        for answer in self._unanswered.values():
            answer.cancel()
        await asyncio.gather(*self._tasks)

    # --- asking -------------------------------------------------------------------------------------------------------

    def ask(self, peer: PeerRef, ask: Ask, on_refused: Callable[[str], None]) -> None:
        """on_refused(reason) where the other says no, or nothing in time. Later, in each case."""
        if len(self._tasks) >= MAX_NUM_ASKING:
            self._loop.call_soon(on_refused, f"{len(self._tasks)} asks are unanswered")
            return

        async def asking() -> None:
            if refusal := await self._answer_of(peer, ask):
                logger.info("%s does not take %s: %s", peer.worker_id, type(ask).__name__, refusal)
                on_refused(refusal)

        self._spawn(asking())

    async def _answer_of(self, peer: PeerRef, ask: Ask) -> str:
        if self._members.get(peer.worker_id) != peer:
            return "no longer a member"
        if peer.incarnation not in self._channels:
            self._channels[peer.incarnation] = grpc.aio.insecure_channel(peer.address, options=CHANNEL_OPTIONS)
        call = worker_pb2_grpc.PeerStub(self._channels[peer.incarnation]).Ask(timeout=self._timeout_s)
        channel = PeerChannel(call, self._config)
        try:
            await self._greeter.greet(channel, peer)
            await channel.write(ask)
            answer = await channel.read(self._timeout_s)
        except ChannelLost as lost:
            return f"no answer: {lost}"
        except asyncio.CancelledError:  # by the channel's end, not by ours: nobody cancels the task
            return "no longer a member"
        finally:
            call.cancel()
        match answer:
            case Answer(refusal=refusal) | HelloRefused(reason=refusal):
                return refusal
        return f"answered by {type(answer).__name__}"

    @property
    def _timeout_s(self) -> float:
        """The other may have to make a link first."""
        return self._config.connect_timeout_s + self._config.offer_timeout_s

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- being asked --------------------------------------------------------------------------------------------------

    async def serve(self, stream: FrameStream) -> None:
        """One ask, answered. What is no ask ends the stream."""
        channel = PeerChannel(stream, self._config)
        try:
            if (hello := await self._greeter.welcome(channel)) is None:
                return
            ask = await channel.read(self._config.connect_timeout_s, MAX_ASK_NBYTES)
            if not isinstance(ask, Ask):
                raise ChannelLost(f"nothing is asked by {type(ask).__name__}")
            await channel.write(Answer(await self._answer_to(ask, hello.sender.worker_id)))
        except ChannelLost as lost:
            logger.info("an ask ended: %s", lost)

    async def _answer_to(self, ask: Ask, worker_id: str) -> str:
        if (sender := self._members.get(worker_id)) is None:
            return "members are not known yet"
        if isinstance(ask, PullAsk):
            return clip(await self._answer_pull(ask, sender))
        hashes = unpack_hashes(ask.block_hashes)
        self._loop.call_soon(self._host.on_return_offered, worker_id, ask.request_id, ask.attempt, hashes)
        return ""

    async def _answer_pull(self, ask: PullAsk, destination: PeerRef) -> str:
        if refusal := await self._source.warm(destination):
            return refusal
        if ask.pull_id in self._unanswered or self._source.is_open(ask.pull_id):
            return "this pull has been asked for before"
        answer: asyncio.Future[str] = self._loop.create_future()
        self._unanswered[ask.pull_id] = answer
        hashes = unpack_hashes(ask.block_hashes)
        self._host.on_pull_asked(ask.pull_id, destination, ask.request_id, ask.attempt, hashes, ask.kind)
        try:
            async with asyncio.timeout(self._config.offer_timeout_s):
                return await answer
        except TimeoutError:
            return "the worker does not answer"

    def answered(self, pull_id: bytes, refusal: str) -> None:
        """By the host, in time or not: until then nobody else may ask by this id."""
        answer = self._unanswered.pop(pull_id, None)
        if answer is not None and not answer.done():
            answer.set_result(refusal)
