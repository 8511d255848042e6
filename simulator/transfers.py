"""One worker's KV transfers under virtual time: runs the shipping transfer machines, both sides, over simulated links.
The live counterparts are kvtransfer/source_side.py, destination_side.py and agent.py. Decides nothing itself."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import partial

from engine.events import (
    BlocksSent,
    Event,
    TransferArrived,
    TransferClosed,
    TransferLost,
    TransferOffered,
    TransferRefused,
)
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
from kvtransfer.messages import Abort, Accept, Chunk, Commit, Offer, Ready, Refuse, Stamp, TransferMessage
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
    SourceState,
    SourceTransfer,
)
from kvtransfer.transfer import AbortAsked, CancelWork, LinkLost, Received, Tell, Tick
from protos.types import PeerRef, TransferFailure, TransferKind
from simulator.clock import Clock
from simulator.lanes import DestinationLane, SourceLane, put_on
from simulator.network import Network
from simulator.setup import Setup


class Links:
    """What the agents of all workers share. Invariant: `agents` has those that are up, by incarnation; links between
    them are warm from the start."""

    def __init__(self, setup: Setup, clock: Clock) -> None:
        self.setup = setup
        self.clock = clock
        self.network = Network(clock, setup.link_nbytes_per_s, setup.message_s)
        self.agents: dict[str, TransferAgent] = {}
        self.num_arrived = 0
        self.num_bytes = 0
        self.num_lost: Counter[str] = Counter()

    def tell(self, sender: str, receiver: str, message: TransferMessage) -> None:
        if sender in self.agents:
            self.clock.after(self.setup.message_s, self._deliver, sender, receiver, message)

    def _deliver(self, sender: str, receiver: str, message: TransferMessage) -> None:
        if (agent := self.agents.get(receiver)) is not None:
            agent.take(sender, message)

    def drop(self, incarnation: str) -> None:
        """This life of a worker has ended, and the flows to and from it."""
        del self.agents[incarnation]
        self.network.drop(incarnation)

    def landed(self, source: str, destination: str, number: int) -> None:
        """The bytes of one operation have come."""
        if (agent := self.agents.get(destination)) is not None:
            agent.landed(source, number)


class TransferAgent:
    """Invariant: `_sources` and `_destinations` hold exactly the transfers that have not ended. Its host is told of
    everything in a later event, so that it may call from within its own."""

    def __init__(self, me: PeerRef, links: Links, post: Callable[[Event], None]) -> None:
        self._me = me
        self._links = links
        self._clock = links.clock
        self._post_to_host = post
        self._config = links.setup.transfer
        self._block_nbytes = links.setup.block_nbytes
        self._sources: dict[bytes, SourceTransfer] = {}
        self._destinations: dict[bytes, DestinationTransfer] = {}
        self._outgoing: dict[str, SourceLane] = {}  # by the peer's incarnation
        self._incoming: dict[str, DestinationLane] = {}
        self._gone: set[str] = set()
        self._is_ticking = False
        links.agents[me.incarnation] = self

    @property
    def num_open(self) -> int:
        return len(self._sources) + len(self._destinations)

    # --- peers ------------------------------------------------------------------------------------------------------

    def lose_peer(self, incarnation: str, reason: str) -> None:
        """Its stream fell silent. What is in flight to it or from it ends; source_left follows with the membership."""
        self._gone.add(incarnation)
        for source in [each for each in self._sources.values() if each.stamp.destination_incarnation == incarnation]:
            self._apply_source(source, LinkLost(reason))
        for each in [each for each in self._destinations.values() if each.stamp.source_incarnation == incarnation]:
            self._apply_destination(each, LinkLost(reason))
        if (outgoing := self._outgoing.pop(incarnation, None)) is not None:
            outgoing.is_lost = True
        if (incoming := self._incoming.pop(incarnation, None)) is not None:
            incoming.is_lost = True

    def source_left(self, incarnation: str) -> None:
        for each in [each for each in self._destinations.values() if each.stamp.source_incarnation == incarnation]:
            self._apply_destination(each, SourceLeft())

    # --- what the host asks for: source -------------------------------------------------------------------------------

    def open(
        self, transfer_id: bytes, peer: PeerRef, request_id: str, attempt: int, num_blocks: int, kind: TransferKind
    ) -> None:
        if peer.incarnation in self._gone or peer.incarnation not in self._links.agents:
            self._links.num_lost[TransferFailure.NO_LINK] += 1
            self._post(TransferRefused(transfer_id, f"no warm link to {peer.worker_id}"))
            return
        stamp = Stamp(transfer_id, attempt, self._me.incarnation, peer.incarnation)
        transfer = SourceTransfer(stamp, request_id, num_blocks, self._block_nbytes, self._config, kind)
        self._sources[transfer_id] = transfer
        self._apply_source(transfer, Opened())

    def send_blocks(self, transfer_id: bytes, first_block: int, block_ids: tuple[int, ...]) -> None:
        if (transfer := self._sources.get(transfer_id)) is not None:
            self._apply_source(transfer, BlocksComputed(first_block, block_ids))

    def commit(self, transfer_id: bytes, first_index: int, token_ids: tuple[int, ...]) -> None:
        if (transfer := self._sources.get(transfer_id)) is not None:
            self._apply_source(transfer, CommitAsked(first_index, token_ids))

    # --- what the host asks for: destination, both --------------------------------------------------------------------

    def expect(self, transfer_id: bytes, source: PeerRef, request_id: str, attempt: int, kind: TransferKind) -> None:
        stamp = Stamp(transfer_id, attempt, source.incarnation, self._me.incarnation)
        self._apply_destination(self._destination(stamp, request_id, kind), Announced(stamp, request_id, kind))

    def grant(self, transfer_id: bytes, num_held_blocks: int, block_ids: tuple[int, ...]) -> None:
        if (transfer := self._destinations.get(transfer_id)) is not None:
            self._apply_destination(transfer, Granted(num_held_blocks, block_ids))

    def refuse(self, transfer_id: bytes, reason: str) -> None:
        if (transfer := self._destinations.get(transfer_id)) is not None:
            self._apply_destination(transfer, RefusedByHost(reason))

    def forget(self, transfer_id: bytes) -> None:
        """The host expects it no more: the peer has said that it offers nothing."""
        self._destinations.pop(transfer_id, None)

    def abort(self, transfer_id: bytes, reason: str) -> None:
        if (source := self._sources.get(transfer_id)) is not None:
            self._apply_source(source, AbortAsked(reason))
        if (destination := self._destinations.get(transfer_id)) is not None:
            self._apply_destination(destination, AbortAsked(reason))

    # --- what peers say -----------------------------------------------------------------------------------------------

    def take(self, sender: str, message: TransferMessage) -> None:
        if sender in self._gone:
            return
        if isinstance(message, Accept | Refuse | Ready) or message.stamp.source_incarnation == self._me.incarnation:
            self._take_as_source(sender, message)
        elif isinstance(message, Offer):
            offered = self._destination(message.stamp, message.request_id, message.kind)
            self._apply_destination(offered, Received(message))
        elif (transfer := self._destinations.get(message.stamp.transfer_id)) is not None:
            self._apply_destination(transfer, Received(message))
        elif isinstance(message, Chunk | Commit):
            self._links.tell(self._me.incarnation, sender, Abort(message.stamp, "unknown transfer"))

    def landed(self, source: str, number: int) -> None:
        if (lane := self._incoming.get(source)) is not None:
            lane.arrived(number)

    def _take_as_source(self, sender: str, message: TransferMessage) -> None:
        if (transfer := self._sources.get(message.stamp.transfer_id)) is not None:
            self._apply_source(transfer, Received(message))
        elif isinstance(message, Ready):
            self._lane_to(sender).send_filler(message.number, message.num_bytes, self._on_landed(sender))
        elif isinstance(message, Accept):
            self._links.tell(self._me.incarnation, sender, Abort(message.stamp, "the source has no such transfer"))

    # --- carrying out: source -----------------------------------------------------------------------------------------

    def _apply_source(self, transfer: SourceTransfer, event: SourceEvent) -> None:
        for effect in transfer.on(event, self._clock.now):
            self._do_source(transfer, effect)
        if transfer.state is SourceState.DONE:
            self._sources.pop(transfer.stamp.transfer_id, None)
        self._keep_ticking()

    def _do_source(self, transfer: SourceTransfer, effect: SourceEffect) -> None:
        transfer_id, peer = transfer.stamp.transfer_id, transfer.stamp.destination_incarnation
        match effect:
            case Tell(message=message):
                self._links.tell(self._me.incarnation, peer, message)
            case Gather(seq=seq, block_ids=block_ids):
                self._lane_to(peer).gather(transfer_id, seq, len(block_ids) * self._block_nbytes)
            case SendChunk(seq=seq, number=number):
                self._lane_to(peer).send(transfer_id, seq, number, self._on_landed(peer))
            case SendFiller(number=number, num_bytes=num_bytes):
                self._lane_to(peer).send_filler(number, num_bytes, self._on_landed(peer))
            case CancelWork():
                for seq in self._lane_to(peer).cancel(transfer_id):
                    self._apply_source(transfer, GatherCancelled(seq))
            case ReportSent(num_blocks=num_blocks):
                self._post(BlocksSent(transfer_id, num_blocks))
            case ReportRefused(reason=reason, failure=failure):
                self._links.num_lost[failure] += 1
                self._post(TransferRefused(transfer_id, reason))
            case ReportClosed(failure=failure):
                if failure is not None:
                    self._links.num_lost[failure] += 1
                self._post(TransferClosed(transfer_id, failure))

    def _on_landed(self, peer: str) -> Callable[[int], None]:
        return partial(self._links.landed, self._me.incarnation, peer)

    def _lane_to(self, peer: str) -> SourceLane:
        if peer not in self._outgoing:
            setup = self._links.setup
            put = put_on(self._links.network, self._me.incarnation, peer)
            self._outgoing[peer] = SourceLane(
                self._clock,
                self._config.num_staging_chunks,
                setup.gather_s_per_byte,
                self._on_gathered,
                self._on_sent,
                put,
            )
        return self._outgoing[peer]

    def _on_gathered(self, transfer_id: bytes, seq: int) -> None:
        self._apply_source(self._sources[transfer_id], Gathered(seq, checksum=0))

    def _on_sent(self, transfer_id: bytes, num_bytes: int) -> None:
        transfer = self._sources.get(transfer_id)
        if transfer is not None and transfer.kind is TransferKind.MIGRATE:  # others are not interested
            self._apply_source(transfer, Sent(num_bytes // self._block_nbytes))

    # --- carrying out: destination ------------------------------------------------------------------------------------

    def _destination(self, stamp: Stamp, request_id: str, kind: TransferKind) -> DestinationTransfer:
        transfer = self._destinations.get(stamp.transfer_id)
        if transfer is None:
            transfer = DestinationTransfer(stamp, request_id, self._block_nbytes, self._config, kind)
            self._destinations[stamp.transfer_id] = transfer
        return transfer

    def _apply_destination(self, transfer: DestinationTransfer, event: DestinationEvent) -> None:
        for effect in transfer.on(event, self._clock.now):
            self._do_destination(transfer, effect)
        if transfer.state is DestinationState.DONE:
            self._destinations.pop(transfer.stamp.transfer_id, None)
        self._keep_ticking()

    def _do_destination(self, transfer: DestinationTransfer, effect: DestinationEffect) -> None:
        transfer_id, peer = transfer.stamp.transfer_id, transfer.stamp.source_incarnation
        match effect:
            case Tell(message=message):
                self._links.tell(self._me.incarnation, message.stamp.source_incarnation, message)
            case AskHost(request_id=request_id, attempt=attempt, num_blocks=num_blocks):
                self._post(TransferOffered(transfer_id, request_id, attempt, num_blocks))
            case Receive(seq=seq, block_ids=block_ids):
                self._lane_from(peer).receive(transfer_id, seq, len(block_ids) * self._block_nbytes)
            case CancelWork():
                for seq in self._lane_from(peer).cancel(transfer_id):
                    self._apply_destination(transfer, ChunkEnded(seq, "cancelled"))
            case ReportLost(reason=reason, failure=failure):
                self._links.num_lost[failure] += 1
                self._post(TransferLost(transfer_id, reason))
            case ReportArrived():
                self._links.num_arrived += 1
                self._links.num_bytes += effect.num_bytes
                self._post(_arrival(transfer_id, effect))

    def _lane_from(self, peer: str) -> DestinationLane:
        if peer not in self._incoming:
            setup = self._links.setup
            self._incoming[peer] = DestinationLane(
                self._clock,
                self._config.num_receives,
                setup.scatter_s_per_byte,
                self._on_posted,
                self._on_chunk_ended,
            )
        return self._incoming[peer]

    def _on_posted(self, transfer_id: bytes, seq: int, number: int, num_bytes: int) -> None:
        stamp = self._destinations[transfer_id].stamp
        self._links.tell(self._me.incarnation, stamp.source_incarnation, Ready(stamp, seq, number, num_bytes))

    def _on_chunk_ended(self, transfer_id: bytes, seq: int) -> None:
        self._apply_destination(self._destinations[transfer_id], ChunkEnded(seq, ""))

    # --- host and time ------------------------------------------------------------------------------------------------

    def _post(self, event: Event) -> None:
        self._clock.after(0.0, self._post_to_host, event)

    def _keep_ticking(self) -> None:
        if not self._is_ticking:
            self._is_ticking = True
            self._clock.after(self._links.setup.tick_s, self._tick)

    def _tick(self) -> None:
        """Goes on while there is a deadline to meet; a transfer that gets one later starts it again."""
        now = self._clock.now
        for source in [each for each in self._sources.values() if (each.deadline or math.inf) <= now]:
            self._apply_source(source, Tick())
        for each in [each for each in self._destinations.values() if (each.deadline or math.inf) <= now]:
            self._apply_destination(each, Tick())
        self._is_ticking = False
        deadlines = [each.deadline for each in self._sources.values()]
        deadlines += [each.deadline for each in self._destinations.values()]
        if self._me.incarnation in self._links.agents and any(deadline is not None for deadline in deadlines):
            self._keep_ticking()


def _arrival(transfer_id: bytes, arrived: ReportArrived) -> TransferArrived:
    return TransferArrived(
        transfer_id,
        arrived.first_index,
        arrived.token_ids,
        arrived.num_bytes,
        arrived.transfer_s,
        arrived.exposed_s,
        arrived.num_blocks,
    )
