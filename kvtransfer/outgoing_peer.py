"""The dialling end of control stream and link to one life of one worker. Decides when to dial again, and that a link is
warm: handshake done, a byte proven each way. Knows nothing of transfers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import grpc

from kvtransfer.block_store import BlockStore
from kvtransfer.config import TransferConfig
from kvtransfer.greeter import Greeter
from kvtransfer.link_meter import LinkMeter
from kvtransfer.messages import MAX_FRAME_NBYTES, HelloRefused, LinkOffer, Message
from kvtransfer.peer_channel import ChannelLost, PeerChannel
from kvtransfer.source_lane import OnGathered, OnSent, SourceLane
from kvtransfer.transport import LinkFailed, Transport
from protos import worker_pb2_grpc
from protos.types import LinkStats, PeerRef

logger = logging.getLogger("twinring.kvtransfer")

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0
CHANNEL_OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),  # a worker that returns to an old address must not meet an old backoff
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", MAX_FRAME_NBYTES + 64),
]


class HandshakeRefused(Exception):
    """These two lives will never agree."""


class OutgoingPeer:
    """Invariant: `lane` and `is_warm` are set exactly while the link is warm and its loss has not been told by
    on_lost."""

    def __init__(
        self,
        peer: PeerRef,
        greeter: Greeter,
        store: BlockStore,
        config: TransferConfig,
        transport: Transport,
        on_message: Callable[[OutgoingPeer, Message], None],
        on_gathered: OnGathered,
        on_sent: OnSent,
        on_lost: Callable[[OutgoingPeer, str], None],
    ) -> None:
        self.peer = peer
        self.lane: SourceLane | None = None
        self.is_warm = asyncio.Event()
        self.not_warm_because = "not connected yet"
        self._greeter = greeter
        self._store = store
        self._config = config
        self._transport = transport
        self._on_message = on_message
        self._on_gathered = on_gathered
        self._on_sent = on_sent
        self._on_lost = on_lost
        self._channel: PeerChannel | None = None
        self._meter = LinkMeter()
        self._num_failures = 0
        self._closing_lane: asyncio.Task[None] | None = None
        self._task = asyncio.create_task(self._keep_connected())
        self._task.add_done_callback(_report_bug)

    @property
    def stats(self) -> LinkStats:
        meter, lane = self._meter, self.lane
        transport, num_queued = (lane.transport, lane.num_queued) if lane is not None else ("", 0)
        return LinkStats(self.peer.worker_id, transport, meter.num_bytes, meter.busy_s, num_queued, self._num_failures)

    def send(self, message: Message) -> None:
        """Dropped where there is no stream: the transfer hears of that as a lost link."""
        if self._channel is not None:
            self._channel.send(message)

    def drop(self, reason: str) -> None:
        """Its transfers hear of the loss at once; threads and descriptors are gone when `closed` returns."""
        self._lose(reason)
        self._task.cancel()

    async def closed(self) -> None:
        await asyncio.gather(self._task, return_exceptions=True)
        if self._closing_lane is not None:
            await self._closing_lane

    def _lose(self, reason: str) -> None:
        if self.lane is not None:
            self._on_lost(self, reason)
        self.lane = self._channel = None
        self.is_warm.clear()

    async def _keep_connected(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                was_warm, reason = await self._live()
            except HandshakeRefused as refused:
                self.not_warm_because = f"refused: {refused}"
                logger.error("no KV link to %s: %s", self.peer.worker_id, refused)
                return
            self.not_warm_because = reason
            self._num_failures += 1
            logger.warning("KV link to %s is down: %s", self.peer.worker_id, reason)
            pause_s = _FIRST_PAUSE_S if was_warm else min(2 * pause_s, _LONGEST_PAUSE_S)
            await asyncio.sleep(pause_s)

    async def _live(self) -> tuple[bool, str]:
        """From dialling to the loss of the link: whether it was ever warm, and why it was lost."""
        async with grpc.aio.insecure_channel(self.peer.address, options=CHANNEL_OPTIONS) as rpc:
            channel = PeerChannel(worker_pb2_grpc.PeerStub(rpc).Control(), self._config)
            lane: SourceLane | None = None
            reason = "closed"
            try:
                lane = self._make_lane(channel, await self._shake_hands(channel))
                await lane.connect()
                self.lane, self._channel = lane, channel
                self.is_warm.set()
                logger.info("KV link to %s is warm, over %s", self.peer.worker_id, lane.transport)
                reason = await channel.run(lambda message: self._on_message(self, message))
                return True, reason
            except (ChannelLost, LinkFailed) as lost:
                return False, str(lost)
            finally:
                self._lose(reason)
                if lane is not None:
                    self._closing_lane = asyncio.create_task(lane.close())
                    await asyncio.shield(self._closing_lane)  # `drop` may cut this task short, not the closing

    async def _shake_hands(self, channel: PeerChannel) -> LinkOffer:
        await self._greeter.greet(channel, self.peer, self._transport.beacon)
        answer = await channel.read(self._config.connect_timeout_s)
        if isinstance(answer, HelloRefused):
            if answer.is_final:
                raise HandshakeRefused(answer.reason)
            raise ChannelLost(answer.reason)
        if not isinstance(answer, LinkOffer):
            raise ChannelLost(f"offered a link by {type(answer).__name__}")
        return answer

    def _make_lane(self, channel: PeerChannel, offer: LinkOffer) -> SourceLane:
        loop = asyncio.get_running_loop()

        def on_failure(reason: str) -> None:
            loop.call_soon_threadsafe(channel.close, f"link: {reason}")

        link = self._transport.dial(offer, on_failure)
        name = f"kv-to-{self.peer.worker_id}"
        return SourceLane(name, link, self._store, self._config, self._meter, self._on_gathered, self._on_sent)


def _report_bug(task: asyncio.Task[None]) -> None:
    """What is not a lost link ends the dialling, but not in silence."""
    if not task.cancelled() and (bug := task.exception()) is not None:
        logger.critical("dialling ended by a bug", exc_info=bug)
