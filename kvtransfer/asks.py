"""What workers ask of each other beside transfers: to send a prefix (a pull, or the fetching of a return), and to fetch
one (a return is offered). Decides who may ask and how long an answer may take; what the answer is, the host says."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import grpc

from kvtransfer.config import TransferConfig
from kvtransfer.counters import TransferCounters
from kvtransfer.host import TransferHost
from kvtransfer.messages import (
    MAX_ASK_NBYTES,
    Answer,
    Ask,
    Hello,
    HelloRefused,
    PullAsk,
    clip,
    decode,
    encode,
    unpack_hashes,
)
from kvtransfer.outgoing_peer import CHANNEL_OPTIONS
from kvtransfer.source_side import SourceSide
from protos import worker_pb2, worker_pb2_grpc
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
        counters: TransferCounters,
        judge: Callable[[Hello], HelloRefused | None],
    ) -> None:
        self._host = host
        self._config = config
        self._source = source
        self._counters = counters
        self._judge = judge
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
        stub = worker_pb2_grpc.PeerStub(self._channels[peer.incarnation])
        try:
            frame = await stub.Ask(worker_pb2.PeerFrame(body=encode(ask)), timeout=self._timeout_s)
            answer = decode(frame.body)
        except grpc.aio.AioRpcError as error:
            return f"no answer: {error.code().name}: {error.details()}"
        except asyncio.CancelledError:  # by the channel's end, not by ours: nobody cancels the task
            return "no longer a member"
        except ValueError as error:
            return f"malformed answer: {error}"
        return answer.refusal if isinstance(answer, Answer) else f"answered by {type(answer).__name__}"

    @property
    def _timeout_s(self) -> float:
        """The other may have to make a link first."""
        return self._config.connect_timeout_s + self._config.offer_timeout_s

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- being asked --------------------------------------------------------------------------------------------------

    async def answer(self, body: bytes) -> bytes:
        """ValueError where it is no ask."""
        ask = decode(body, MAX_ASK_NBYTES)
        if not isinstance(ask, Ask):
            raise ValueError(f"nothing is asked by {type(ask).__name__}")
        sender = ask.hello.sender
        refused = self._judge(ask.hello)
        if refused is None and self._members.get(sender.worker_id) is None:
            refused = HelloRefused("members are not known yet", is_final=False)
        if refused is not None:
            self._counters.num_refused_hellos += 1
            logger.warning("refused to answer %s: %s", sender.worker_id, refused.reason)
            return encode(Answer(refused.reason))
        if isinstance(ask, PullAsk):
            return encode(Answer(clip(await self._answer_pull(ask, self._members[sender.worker_id]))))
        hashes = unpack_hashes(ask.block_hashes)
        self._loop.call_soon(self._host.on_return_offered, sender.worker_id, ask.request_id, ask.attempt, hashes)
        return encode(Answer(""))

    async def _answer_pull(self, ask: PullAsk, destination: PeerRef) -> str:
        if refusal := await self._source.warm(destination):
            return refusal
        if ask.pull_id in self._unanswered:
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
        finally:
            del self._unanswered[ask.pull_id]

    def answered(self, pull_id: bytes, refusal: str) -> None:
        """By the host, in time or not."""
        answer = self._unanswered.get(pull_id)
        if answer is not None and not answer.done():
            answer.set_result(refusal)
