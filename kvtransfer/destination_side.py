"""The worker as a destination: its open transfers and the peers that dialled it. Carries out what
destination_transfer.py decides."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from kvtransfer.block_store import BlockStore
from kvtransfer.config import TransferConfig
from kvtransfer.counters import TransferCounters
from kvtransfer.destination_lane import DestinationLane
from kvtransfer.destination_transfer import (
    Announced,
    AskHost,
    ChunkEnded,
    DestinationEffect,
    DestinationEvent,
    DestinationState,
    DestinationTransfer,
    Granted,
    Receive,
    RefusedByHost,
    ReportArrived,
    ReportLost,
    SourceLeft,
)
from kvtransfer.greeter import Greeter
from kvtransfer.host import TransferHost
from kvtransfer.messages import (
    Abort,
    Chunk,
    Commit,
    Hello,
    Message,
    Offer,
    Ready,
    Refuse,
    Stamp,
    TransferMessage,
)
from kvtransfer.peer_channel import ChannelLost, FrameStream, PeerChannel
from kvtransfer.transfer import AbortAsked, CancelWork, LinkLost, Received, Tell, Tick
from kvtransfer.transport import LinkFailed, ReceiverLink, Transport
from protos.types import PeerRef, TransferFailure, TransferKind

logger = logging.getLogger("twinring.kvtransfer")


@dataclass(eq=False)
class IncomingPeer:
    peer: PeerRef
    channel: PeerChannel
    lane: DestinationLane


class DestinationSide:
    """Invariant: `_transfers` holds exactly the transfers that have not ended; `_peers` holds, by incarnation, the
    latest stream of each source whose link works."""

    def __init__(
        self,
        me: PeerRef,
        store: BlockStore,
        host: TransferHost,
        config: TransferConfig,
        transport: Transport,
        counters: TransferCounters,
        greeter: Greeter,
    ) -> None:
        self._me = me
        self._store = store
        self._host = host
        self._config = config
        self._transport = transport
        self._counters = counters
        self._greeter = greeter
        self._loop = asyncio.get_running_loop()
        self._transfers: dict[bytes, DestinationTransfer] = {}
        self._peers: dict[str, IncomingPeer] = {}
        self._serving: set[asyncio.Task[None]] = set()
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def num_open(self) -> int:
        return len(self._transfers)

    # --- peers ------------------------------------------------------------------------------------------------------

    async def serve(self, stream: FrameStream) -> None:
        """One incoming stream, to its end. In a task of its own: a cancelled call ends its stream, and the task then
        cleans up in peace."""
        task = self._loop.create_task(self._serve(stream))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()

    async def _serve(self, stream: FrameStream) -> None:
        channel = PeerChannel(stream, self._config)
        peer: IncomingPeer | None = None
        reason = "closed"
        try:
            hello = await self._greeter.welcome(channel)
            if hello is None:
                return
            peer = await self._link_up(hello, channel)
            reason = await channel.run(lambda message: self._on_message(peer, message))
        except (ChannelLost, LinkFailed) as lost:
            reason = str(lost)
        finally:
            logger.info("KV stream from %s ended: %s", peer.peer.worker_id if peer else "a stranger", reason)
            if peer is not None:
                self._lose(peer, reason)
                await self._close_lane(peer)

    async def _link_up(self, hello: Hello, channel: PeerChannel) -> IncomingPeer:
        sender = hello.sender

        def on_failure(reason: str) -> None:
            self._loop.call_soon_threadsafe(channel.close, f"link: {reason}")

        link = self._transport.listen(hello.beacon, on_failure)
        peer = IncomingPeer(sender, channel, self._make_lane(sender, link))
        try:
            await channel.write(link.offer)
            await peer.lane.connect()
        except BaseException:
            await self._close_lane(peer)
            raise
        if (former := self._peers.get(sender.incarnation)) is not None:
            self._lose(former, "dialled again")
            former.channel.close("dialled again")
        self._peers[sender.incarnation] = peer
        return peer

    def _make_lane(self, sender: PeerRef, link: ReceiverLink) -> DestinationLane:
        name = f"kv-from-{sender.worker_id}"
        return DestinationLane(name, link, self._store, self._config, self._on_posted, self._on_chunk_ended)

    async def _close_lane(self, peer: IncomingPeer) -> None:
        """`close` may cut the caller short, not the closing."""
        task = self._loop.create_task(peer.lane.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        await asyncio.shield(task)

    def _lose(self, peer: IncomingPeer, reason: str) -> None:
        incarnation = peer.peer.incarnation
        if self._peers.get(incarnation) is not peer:
            return
        for transfer in list(self._transfers.values()):
            if transfer.stamp.source_incarnation == incarnation:
                self._apply(transfer, LinkLost(reason))
        del self._peers[incarnation]

    def set_members(self, incarnations: set[str], former: set[str]) -> None:
        """A source that was announced before it became a member is not one that left."""
        gone = (former | self._peers.keys()) - incarnations
        for transfer in list(self._transfers.values()):
            if transfer.stamp.source_incarnation in gone:
                self._apply(transfer, SourceLeft())
        for peer in self._peers.values():
            if peer.peer.incarnation in gone:
                peer.channel.close("no longer a member")

    async def close(self) -> None:
        for transfer_id in list(self._transfers):
            self.abort(transfer_id, "the worker is closing")
        serving = list(self._serving)
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
        await asyncio.gather(*self._closing)

    # --- what the host asks for ---------------------------------------------------------------------------------------

    def expect(
        self,
        transfer_id: bytes,
        source: PeerRef,
        request_id: str,
        attempt: int,
        kind: TransferKind = TransferKind.HANDOFF,
    ) -> None:
        stamp = Stamp(transfer_id, attempt, source.incarnation, self._me.incarnation)
        self._apply(self._transfer(stamp, request_id, kind), Announced(stamp, request_id, kind))

    def forget(self, transfer_id: bytes) -> bool:
        """The other worker says that it offers nothing. False where it has offered, or the transfer has ended: then
        that counts."""
        transfer = self._transfers.get(transfer_id)
        if transfer is None or transfer.state is not DestinationState.EXPECTED:
            return False
        del self._transfers[transfer_id]
        return True

    def grant(self, transfer_id: bytes, num_held_blocks: int, block_ids: tuple[int, ...]) -> None:
        self._apply_if_open(transfer_id, Granted(num_held_blocks, block_ids))

    def refuse(self, transfer_id: bytes, reason: str) -> None:
        self._apply_if_open(transfer_id, RefusedByHost(reason))

    def abort(self, transfer_id: bytes, reason: str) -> None:
        self._apply_if_open(transfer_id, AbortAsked(reason))

    def tick(self, now: float) -> None:
        for transfer in list(self._transfers.values()):
            if transfer.deadline is not None and transfer.deadline <= now:
                self._apply(transfer, Tick())

    # --- what peers and lanes say -------------------------------------------------------------------------------------

    def _on_message(self, peer: IncomingPeer, message: Message) -> None:
        if not isinstance(message, TransferMessage):
            logger.warning("%s sent an unexpected %s", peer.peer.worker_id, type(message).__name__)
            return
        stamp = message.stamp
        if (stamp.source_incarnation, stamp.destination_incarnation) != (peer.peer.incarnation, self._me.incarnation):
            self._counters.num_stale_messages += 1
            self._turn_away(peer, message, "another incarnation")
        elif isinstance(message, Offer):
            self._apply(self._transfer(stamp, message.request_id, message.kind), Received(message))
        elif (transfer := self._transfers.get(stamp.transfer_id)) is None:
            self._counters.num_unknown_transfers += 1
            self._turn_away(peer, message, "unknown transfer")
        elif transfer.stamp != stamp:
            self._counters.num_stale_messages += 1
            self._turn_away(peer, message, "another attempt")
        else:
            self._apply(transfer, Received(message))

    def _turn_away(self, peer: IncomingPeer, message: TransferMessage, reason: str) -> None:
        match message:
            case Offer(stamp=stamp):
                peer.channel.send(Refuse(stamp, reason))
            case Chunk(stamp=stamp) | Commit(stamp=stamp):
                peer.channel.send(Abort(stamp, reason))

    def _on_posted(self, transfer_id: bytes, seq: int, number: int, num_bytes: int) -> None:
        stamp = self._transfers[transfer_id].stamp
        self._peers[stamp.source_incarnation].channel.send(Ready(stamp, seq, number, num_bytes))

    def _on_chunk_ended(self, transfer_id: bytes, seq: int, error: str, failure: TransferFailure) -> None:
        if error:
            self._counters.num_bad_chunks += 1
        self._apply(self._transfers[transfer_id], ChunkEnded(seq, error, failure))

    # --- carrying out -------------------------------------------------------------------------------------------------

    def _transfer(self, stamp: Stamp, request_id: str, kind: TransferKind) -> DestinationTransfer:
        block_nbytes = self._store.layout.block_nbytes
        fresh = DestinationTransfer(stamp, request_id, block_nbytes, self._config, kind)
        return self._transfers.setdefault(stamp.transfer_id, fresh)

    def _apply_if_open(self, transfer_id: bytes, event: DestinationEvent) -> None:
        """A transfer that is not there has ended, and the host has been told or will be in this turn of the loop."""
        if (transfer := self._transfers.get(transfer_id)) is not None:
            self._apply(transfer, event)

    def _apply(self, transfer: DestinationTransfer, event: DestinationEvent) -> None:
        for effect in transfer.on(event, self._loop.time()):
            self._execute(transfer, effect)
        if transfer.state is DestinationState.DONE:
            self._transfers.pop(transfer.stamp.transfer_id, None)

    def _execute(self, transfer: DestinationTransfer, effect: DestinationEffect) -> None:
        transfer_id = transfer.stamp.transfer_id
        match effect:
            case Tell(message=message):
                if (peer := self._peers.get(message.stamp.source_incarnation)) is not None:
                    peer.channel.send(message)
            case AskHost(request_id=request_id, attempt=attempt, num_blocks=num_blocks):
                self._loop.call_soon(self._host.on_offered, transfer_id, request_id, attempt, num_blocks)
            case Receive(seq=seq, block_ids=block_ids, checksum=checksum):
                lane = self._peers[transfer.stamp.source_incarnation].lane
                lane.receive(transfer_id, seq, block_ids, checksum, transfer.kind)
            case CancelWork():
                lane = self._peers[transfer.stamp.source_incarnation].lane
                for seq in lane.cancel(transfer_id):
                    self._apply(transfer, ChunkEnded(seq, "cancelled"))
            case ReportLost(reason=reason, failure=failure):
                self._counters.count_failed(failure)
                _log_lost(transfer, reason, failure)
                self._loop.call_soon(self._host.on_lost, transfer_id, reason)
            case ReportArrived():
                self._counters.count_arrived(effect.num_bytes)
                self._loop.call_soon(
                    self._host.on_arrived,
                    transfer_id,
                    effect.first_index,
                    effect.token_ids,
                    effect.num_bytes,
                    effect.transfer_s,
                    effect.exposed_s,
                    effect.num_blocks,
                )


def _log_lost(transfer: DestinationTransfer, reason: str, failure: TransferFailure) -> None:
    """An aborted one was nobody's fault: its request ended."""
    fields = {
        "request_id": transfer.request_id,
        "attempt": transfer.stamp.attempt,
        "failure": failure.value,
        "reason": reason,
    }
    level = logging.INFO if failure is TransferFailure.ABORTED else logging.WARNING
    logger.log(level, "KV transfer lost", extra={"fields": fields})
