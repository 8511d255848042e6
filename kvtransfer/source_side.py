"""The worker as a source: its open transfers and the peers it dials. Carries out what source_transfer.py decides."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter

from kvtransfer.block_store import BlockStore
from kvtransfer.config import TransferConfig
from kvtransfer.counters import TransferCounters
from kvtransfer.greeter import Greeter
from kvtransfer.host import TransferHost
from kvtransfer.messages import Abort, Accept, Message, Ready, Stamp, TransferMessage
from kvtransfer.outgoing_peer import OutgoingPeer
from kvtransfer.source_lane import SourceLane
from kvtransfer.source_transfer import (
    BlocksComputed,
    CommitAsked,
    Gather,
    GatherCancelled,
    Gathered,
    Opened,
    ReportClosed,
    ReportRefused,
    ReportSent,
    SendChunk,
    SendFiller,
    Sent,
    SourceEffect,
    SourceEvent,
    SourceTransfer,
)
from kvtransfer.transfer import AbortAsked, CancelWork, LinkLost, Received, Tell, Tick
from kvtransfer.transport import Transport
from protos.types import LinkStats, PeerRef, TransferFailure, TransferKind

logger = logging.getLogger("twinring.kvtransfer")


class SourceSide:
    """Invariant: `_transfers` holds exactly the transfers that have not ended; `_peers` is keyed by incarnation."""

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
        self._transfers: dict[bytes, SourceTransfer] = {}
        self._peers: dict[str, OutgoingPeer] = {}
        self._lazy: dict[str, None] = {}  # of them those that were dialled for one transfer, longest unused first
        self._awaited: Counter[str] = Counter()  # peers, by how many wait for a link to them
        self._closing: set[asyncio.Task[None]] = set()
        self._opening: dict[bytes, asyncio.Task[None]] = {}  # transfers that wait for their link

    @property
    def num_open(self) -> int:
        return len(self._transfers) + len(self._opening)

    def is_open(self, transfer_id: bytes) -> bool:
        return transfer_id in self._transfers

    @property
    def warm_links(self) -> tuple[str, ...]:
        return tuple(peer.peer.worker_id for peer in self._peers.values() if peer.lane is not None)

    @property
    def link_stats(self) -> tuple[LinkStats, ...]:
        return tuple(peer.stats for peer in self._peers.values())

    # --- peers ------------------------------------------------------------------------------------------------------

    def set_members(self, members: tuple[PeerRef, ...], warm: tuple[PeerRef, ...]) -> None:
        """`warm` are dialled now and kept, the others when they are first needed; who is no member is dropped."""
        for incarnation in self._peers.keys() - {peer.incarnation for peer in members}:
            self._drop(incarnation, "no longer a member")
        for member in warm:
            self._lazy.pop(member.incarnation, None)
            self._dial(member)

    async def warm(self, member: PeerRef) -> str:
        """Have a link to this member. Answers why there is none after connect_timeout_s; empty where there is one."""
        is_kept = member.incarnation in self._peers and member.incarnation not in self._lazy
        peer = self._dial(member)
        if not is_kept:
            self._note_used(member.incarnation)
        self._awaited[member.incarnation] += 1
        try:
            async with asyncio.timeout(self._config.connect_timeout_s):
                await peer.is_warm.wait()
        except TimeoutError:
            return _no_link(member, peer.not_warm_because)
        finally:
            self._awaited[member.incarnation] -= 1
            self._awaited += Counter()  # forgets those that nobody waits for
        return ""

    def _note_used(self, incarnation: str) -> None:
        """Of those that are beyond max_lazy_links then, drop those that move nothing now and that nobody waits for."""
        self._lazy.pop(incarnation, None)
        self._lazy[incarnation] = None
        busy = {transfer.stamp.destination_incarnation for transfer in self._transfers.values()} | self._awaited.keys()
        for former in list(self._lazy)[: -self._config.max_lazy_links]:
            if former not in busy:
                self._drop(former, "not used for long")

    def _drop(self, incarnation: str, reason: str) -> None:
        peer = self._peers[incarnation]
        peer.drop(reason)
        del self._peers[incarnation]
        self._lazy.pop(incarnation, None)
        task = self._loop.create_task(peer.closed())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _dial(self, member: PeerRef) -> OutgoingPeer:
        """Once; it then dials again by itself, for as long as it is a member."""
        if member.incarnation not in self._peers:
            self._peers[member.incarnation] = OutgoingPeer(
                member,
                self._greeter,
                self._store,
                self._config,
                self._transport,
                self._on_message,
                self._on_gathered,
                self._on_sent,
                self._on_peer_lost,
            )
        return self._peers[member.incarnation]

    async def close(self) -> None:
        for transfer_id in [*self._transfers, *self._opening]:
            self.abort(transfer_id, "the worker is closing")
        self.set_members((), ())
        await asyncio.gather(*self._closing)

    def _on_peer_lost(self, peer: OutgoingPeer, reason: str) -> None:
        for transfer in list(self._transfers.values()):
            if transfer.stamp.destination_incarnation == peer.peer.incarnation:
                self._apply(transfer, LinkLost(reason))

    # --- what the host asks for ---------------------------------------------------------------------------------------

    def open(
        self, transfer_id: bytes, peer: PeerRef, request_id: str, attempt: int, num_blocks: int, kind: TransferKind
    ) -> str:
        """Answers why nothing is offered, and the host hears of it too; empty where it is."""
        assert transfer_id not in self._transfers, "a transfer id is used once"
        outgoing = self._peers.get(peer.incarnation)
        if outgoing is None or outgoing.lane is None:
            self._counters.count_failed(TransferFailure.NO_LINK)
            reason = _no_link(peer, outgoing.not_warm_because if outgoing else "not a member to be dialled")
            self._loop.call_soon(self._host.on_refused, transfer_id, reason)
            return reason
        stamp = Stamp(transfer_id, attempt, self._me.incarnation, peer.incarnation)
        block_nbytes = self._store.layout.block_nbytes
        transfer = SourceTransfer(stamp, request_id, num_blocks, block_nbytes, self._config, kind)
        self._transfers[transfer_id] = transfer
        self._apply(transfer, Opened())
        return ""

    def open_when_warm(
        self, transfer_id: bytes, peer: PeerRef, request_id: str, attempt: int, num_blocks: int, kind: TransferKind
    ) -> None:
        """The same once there is a link to this member; the host hears of it where there will be none."""

        async def opening() -> None:
            await self.warm(peer)  # what it is refused for, open says
            del self._opening[transfer_id]
            self.open(transfer_id, peer, request_id, attempt, num_blocks, kind)

        assert transfer_id not in self._opening, "a transfer id is used once"
        self._opening[transfer_id] = self._loop.create_task(opening())

    def send_blocks(self, transfer_id: bytes, first_block: int, block_ids: tuple[int, ...]) -> None:
        self._apply_if_open(transfer_id, BlocksComputed(first_block, block_ids))

    def commit(self, transfer_id: bytes, first_index: int, token_ids: tuple[int, ...]) -> None:
        self._apply_if_open(transfer_id, CommitAsked(first_index, token_ids))

    def abort(self, transfer_id: bytes, reason: str) -> None:
        self._apply_if_open(transfer_id, AbortAsked(reason))
        if (opening := self._opening.pop(transfer_id, None)) is not None:
            opening.cancel()
            self._loop.call_soon(self._host.on_closed, transfer_id, TransferFailure.ABORTED)

    def tick(self, now: float) -> None:
        for transfer in list(self._transfers.values()):
            if transfer.deadline is not None and transfer.deadline <= now:
                self._apply(transfer, Tick())

    # --- what peers and lanes say -------------------------------------------------------------------------------------

    def _on_message(self, peer: OutgoingPeer, message: Message) -> None:
        if not isinstance(message, TransferMessage):
            logger.warning("%s sent an unexpected %s", peer.peer.worker_id, type(message).__name__)
            return
        transfer = self._transfers.get(message.stamp.transfer_id)
        is_of_peer = message.stamp.destination_incarnation == peer.peer.incarnation
        if transfer is not None and transfer.stamp == message.stamp and is_of_peer:
            self._apply(transfer, Received(message))
            return
        if transfer is None:
            self._counters.num_unknown_transfers += 1
        else:
            self._counters.num_stale_messages += 1
        if isinstance(message, Ready) and peer.lane is not None:
            peer.lane.send_filler(message.number, message.num_bytes)
        elif isinstance(message, Accept):
            peer.send(Abort(message.stamp, "the source has no such transfer"))

    def _on_gathered(self, transfer_id: bytes, seq: int, checksum: int) -> None:
        self._apply(self._transfers[transfer_id], Gathered(seq, checksum))

    def _on_sent(self, transfer_id: bytes, num_blocks: int) -> None:
        self._apply_if_open(transfer_id, Sent(num_blocks))

    # --- carrying out -------------------------------------------------------------------------------------------------

    def _apply_if_open(self, transfer_id: bytes, event: SourceEvent) -> None:
        """A transfer that is not there has ended, and the host has been told or will be in this turn of the loop."""
        if (transfer := self._transfers.get(transfer_id)) is not None:
            self._apply(transfer, event)

    def _apply(self, transfer: SourceTransfer, event: SourceEvent) -> None:
        for effect in transfer.on(event, self._loop.time()):
            self._execute(transfer, effect)

    def _execute(self, transfer: SourceTransfer, effect: SourceEffect) -> None:
        transfer_id = transfer.stamp.transfer_id
        match effect:
            case Tell(message=message):
                self._peers[transfer.stamp.destination_incarnation].send(message)
            case Gather(seq=seq, block_ids=block_ids):
                self._lane_of(transfer).gather(transfer_id, seq, block_ids, transfer.kind)
            case SendChunk(seq=seq, number=number):
                self._lane_of(transfer).send(transfer_id, seq, number)
            case SendFiller(number=number, num_bytes=num_bytes):
                self._lane_of(transfer).send_filler(number, num_bytes)
            case CancelWork():
                for seq in self._lane_of(transfer).cancel(transfer_id):
                    self._apply(transfer, GatherCancelled(seq))
            case ReportSent(num_blocks=num_blocks):
                self._loop.call_soon(self._host.on_sent, transfer_id, num_blocks)
            case ReportRefused(reason=reason, failure=failure):
                self._counters.count_failed(failure)
                del self._transfers[transfer_id]
                self._loop.call_soon(self._host.on_refused, transfer_id, reason)
            case ReportClosed(failure=failure):
                if failure is not None:
                    self._counters.count_failed(failure)
                del self._transfers[transfer_id]
                self._loop.call_soon(self._host.on_closed, transfer_id, failure)

    def _lane_of(self, transfer: SourceTransfer) -> SourceLane:
        """An open transfer has its lane until it is told of the link's loss; what follows needs none."""
        lane = self._peers[transfer.stamp.destination_incarnation].lane
        assert lane is not None
        return lane


def _no_link(peer: PeerRef, why: str) -> str:
    return f"no warm link to {peer.worker_id}: {why}"
