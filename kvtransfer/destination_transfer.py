"""The destination's half of one transfer, pure; the state table is in transfer.py. Decides what is received, said and
reported. Knows no threads, links or tensors: a chunk is its number here."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from kvtransfer.config import TransferConfig
from kvtransfer.messages import Abort, Accept, Ack, Chunk, Commit, Offer, Refuse, Stamp, clip
from kvtransfer.transfer import ASKED_FOR, AbortAsked, CancelWork, LinkLost, Received, Tell, Tick
from protos.types import TransferFailure, TransferKind


@dataclass(frozen=True, slots=True)
class Announced:
    """The router, or for what it asked for itself our own worker, named the source, the request and the attempt."""

    stamp: Stamp
    request_id: str
    kind: TransferKind = TransferKind.HANDOFF


@dataclass(frozen=True, slots=True)
class Granted:
    num_held_blocks: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RefusedByHost:
    reason: str


@dataclass(frozen=True, slots=True)
class ChunkEnded:
    """Written (error is empty), or bad, or cancelled; nothing writes this chunk's blocks any more."""

    seq: int
    error: str
    failure: TransferFailure = TransferFailure.CORRUPT  # where there is an error


@dataclass(frozen=True, slots=True)
class SourceLeft:
    """The source is no longer a member."""


DestinationEvent = (
    Announced | Granted | RefusedByHost | ChunkEnded | SourceLeft | Received | AbortAsked | LinkLost | Tick
)


@dataclass(frozen=True, slots=True)
class AskHost:
    request_id: str
    attempt: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class Receive:
    seq: int
    block_ids: tuple[int, ...]
    checksum: int


@dataclass(frozen=True, slots=True)
class ReportArrived:
    first_index: int
    token_ids: tuple[int, ...]
    num_bytes: int
    transfer_s: float  # from the grant to the last verified chunk
    exposed_s: float  # the part of it after the source had computed its last block
    num_blocks: int  # of those offered that there are, held ones included


@dataclass(frozen=True, slots=True)
class ReportLost:
    reason: str
    failure: TransferFailure


DestinationEffect = Tell | AskHost | Receive | CancelWork | ReportArrived | ReportLost


class DestinationState(Enum):
    NEW = auto()
    PARKED = auto()
    WITHDRAWN = auto()
    EXPECTED = auto()
    OFFERED = auto()
    RECEIVING = auto()
    CLOSING = auto()
    DONE = auto()


State = DestinationState

_ANOTHER = "another transfer is announced by this id"


class DestinationTransfer:
    """Invariant: granted blocks are being written only while `_receiving` names their chunk, and DONE is entered with
    `_receiving` empty. What the host was told of (EXPECTED and later) ends in one report, or in its own refusal."""

    def __init__(
        self,
        stamp: Stamp,
        request_id: str,
        block_nbytes: int,
        config: TransferConfig,
        kind: TransferKind = TransferKind.HANDOFF,
    ) -> None:
        self.stamp = stamp
        self.state = State.NEW
        self.request_id = request_id
        self.kind = kind
        self._block_nbytes = block_nbytes
        self._config = config
        self._heard_at = 0.0
        self._offer: Offer | None = None
        self._lost = ReportLost("", TransferFailure.ABORTED)  # in WITHDRAWN and CLOSING
        self._granted = Granted(0, ())
        self._granted_at = 0.0
        self._commit: Commit | None = None
        self._committed_at = 0.0
        self._receiving: dict[int, Chunk] = {}
        self._seen: set[int] = set()  # chunk numbers
        self._claimed: set[int] = set()  # positions of blocks that some chunk has brought or is bringing
        self._num_written = 0

    @property
    def deadline(self) -> float | None:
        if self.state in (State.PARKED, State.WITHDRAWN):
            return self._heard_at + self._config.expect_timeout_s
        if self.state in (State.OFFERED, State.RECEIVING):
            return self._heard_at + self._config.transfer_timeout_s
        return None  # EXPECTED: the request may wait in the source's queue for as long as the router lets it

    def on(self, event: DestinationEvent, now: float) -> list[DestinationEffect]:
        if self.state is State.DONE:
            return []
        if not isinstance(event, Tick) and self.state not in (State.PARKED, State.WITHDRAWN):
            self._heard_at = now
        match event:
            case Announced():
                return self._on_announced(event)
            case Received(message=Offer() as offer):
                return self._on_offer(offer)
            case Received(message=message):
                assert message.stamp == self.stamp
                return self._on_message(message, now)
            case Granted():
                return self._on_granted(event, now)
            case RefusedByHost(reason=reason):
                return self._on_refused_by_host(reason)
            case ChunkEnded():
                return self._on_chunk_ended(event, now)
            case AbortAsked(reason=reason):
                return self._end(reason, TransferFailure.ABORTED, tell=True)
            case LinkLost(reason=reason):
                return [] if self.state is State.EXPECTED else self._end(reason, TransferFailure.LINK_LOST, tell=False)
            case SourceLeft():
                return self._end("the source left", TransferFailure.LINK_LOST, tell=False)
            case Tick():
                return self._on_tick(now)

    def _on_announced(self, event: Announced) -> list[DestinationEffect]:
        if self.state not in (State.NEW, State.PARKED, State.WITHDRAWN):
            return []
        was, known = self.state, (self.stamp, self.request_id, self.kind)
        self.state = State.EXPECTED
        self.stamp, self.request_id, self.kind = event.stamp, event.request_id, event.kind
        if was is State.NEW:
            return []
        assert self._offer is not None
        if known != (event.stamp, event.request_id, event.kind):
            refusal = Tell(Refuse(self._offer.stamp, _ANOTHER))
            return [refusal] if was is State.PARKED else []
        return self._ask_host(self._offer) if was is State.PARKED else [self._give_up()]

    def _on_offer(self, offer: Offer) -> list[DestinationEffect]:
        if (offer.stamp, offer.request_id, offer.kind) != (self.stamp, self.request_id, self.kind):
            return [Tell(Refuse(offer.stamp, _ANOTHER))]
        if self.state is State.EXPECTED:
            return self._ask_host(offer)
        if self.state is State.NEW and offer.kind in ASKED_FOR:
            self.state = State.DONE
            return [Tell(Refuse(offer.stamp, "nobody here waits for it any more"))]
        if self.state is State.NEW:
            self._offer = offer
            self.state = State.PARKED
        return []

    def _ask_host(self, offer: Offer) -> list[DestinationEffect]:
        self._offer = offer
        self.state = State.OFFERED
        return [AskHost(offer.request_id, offer.stamp.attempt, offer.num_blocks)]

    def _on_granted(self, event: Granted, now: float) -> list[DestinationEffect]:
        if self.state is not State.OFFERED:
            return []  # ended while the host was thinking; it has been told
        assert self._offer is not None
        assert event.num_held_blocks + len(event.block_ids) == self._offer.num_blocks
        self.state = State.RECEIVING
        self._granted, self._granted_at = event, now
        return [Tell(Accept(self.stamp, event.num_held_blocks))]

    def _on_refused_by_host(self, reason: str) -> list[DestinationEffect]:
        if self.state is not State.OFFERED:
            return []
        self.state = State.DONE
        return [Tell(Refuse(self.stamp, clip(reason)))]

    def _on_message(self, message: object, now: float) -> list[DestinationEffect]:
        receiving = self.state is State.RECEIVING
        match message:
            case Chunk() if receiving:
                return self._on_chunk(message)
            case Commit() if receiving and self._commit is None:
                return self._on_commit(message, now)
            case Abort(reason=reason) if self.state is State.PARKED:
                self.state, self._lost = State.WITHDRAWN, ReportLost(reason, TransferFailure.ABORTED)
            case Abort(reason=reason) if self.state is not State.WITHDRAWN:
                return self._end(reason, TransferFailure.ABORTED, tell=False)
        return []  # repeated, late, or out of order

    def _on_chunk(self, chunk: Chunk) -> list[DestinationEffect]:
        if chunk.seq in self._seen:
            return []
        positions = range(chunk.first_block, chunk.first_block + chunk.num_blocks)
        error = self._error_in(chunk, positions)
        if error:
            return self._end(error, TransferFailure.CORRUPT, tell=True)
        self._seen.add(chunk.seq)
        self._claimed.update(positions)
        self._receiving[chunk.seq] = chunk
        start = chunk.first_block - self._granted.num_held_blocks
        return [Receive(chunk.seq, self._granted.block_ids[start : start + chunk.num_blocks], chunk.checksum)]

    def _on_commit(self, commit: Commit, now: float) -> list[DestinationEffect]:
        held, num_granted = self._granted.num_held_blocks, len(self._granted.block_ids)
        least = held if self.kind is TransferKind.MIGRATE else held + num_granted
        if not least <= commit.num_blocks <= held + num_granted or max(self._claimed, default=-1) >= commit.num_blocks:
            error = f"a commit of {commit.num_blocks} blocks where {held + num_granted} were offered"
            return self._end(error, TransferFailure.CORRUPT, tell=True)
        self._commit, self._committed_at = commit, now
        return self._arrive_when_whole(now)

    def _error_in(self, chunk: Chunk, positions: range) -> str:
        held = self._granted.num_held_blocks
        end = held + len(self._granted.block_ids) if self._commit is None else self._commit.num_blocks
        if not 0 < chunk.num_blocks <= self._config.num_chunk_blocks(self._block_nbytes):
            return f"a chunk of {chunk.num_blocks} blocks"
        if positions.start < held or positions.stop > end:
            return f"a chunk of blocks [{positions.start}, {positions.stop}) outside the grant"
        if not self._claimed.isdisjoint(positions):
            return f"a second chunk for blocks in [{positions.start}, {positions.stop})"
        if chunk.num_bytes != chunk.num_blocks * self._block_nbytes:
            return f"a chunk of {chunk.num_blocks} blocks in {chunk.num_bytes} bytes"
        return ""

    def _on_chunk_ended(self, event: ChunkEnded, now: float) -> list[DestinationEffect]:
        chunk = self._receiving.pop(event.seq)
        if self.state is State.CLOSING:
            return self._lose_when_quiet()
        if event.error:
            return self._end(event.error, event.failure, tell=True)
        self._num_written += chunk.num_blocks
        return self._arrive_when_whole(now)

    def _arrive_when_whole(self, now: float) -> list[DestinationEffect]:
        if self._commit is None or self._num_written < self._commit.num_blocks - self._granted.num_held_blocks:
            return []
        assert not self._receiving
        self.state = State.DONE
        arrived = ReportArrived(
            self._commit.first_index,
            self._commit.token_ids,
            self._num_written * self._block_nbytes,
            transfer_s=now - self._granted_at,
            exposed_s=now - self._committed_at,
            num_blocks=self._commit.num_blocks,
        )
        return [Tell(Ack(self.stamp)), arrived]

    def _on_tick(self, now: float) -> list[DestinationEffect]:
        deadline = self.deadline
        if deadline is None or now < deadline:
            return []
        if self.state is State.PARKED:
            self.state = State.DONE
            return [Tell(Refuse(self.stamp, "the router has not announced this transfer"))]
        return self._end(f"nothing heard in {self.state.name}", TransferFailure.TIMEOUT, tell=True)

    def _end(self, reason: str, failure: TransferFailure, *, tell: bool) -> list[DestinationEffect]:
        """Give up, and report it to a host that knows of the transfer."""
        was, self.state = self.state, State.DONE
        match was:
            case State.PARKED | State.WITHDRAWN:
                return []
            case State.EXPECTED:
                return [ReportLost(reason, failure)]
            case State.OFFERED:
                told: list[DestinationEffect] = [Tell(Refuse(self.stamp, clip(reason)))] if tell else []
                return [*told, ReportLost(reason, failure)]
        self.state = State.CLOSING
        if was is State.CLOSING:
            return []
        self._lost = ReportLost(reason, failure)
        told = [Tell(Abort(self.stamp, clip(reason)))] if tell else []
        return [*told, CancelWork(), *self._lose_when_quiet()]

    def _lose_when_quiet(self) -> list[DestinationEffect]:
        if self._receiving:
            return []
        return [self._give_up()]

    def _give_up(self) -> ReportLost:
        self.state = State.DONE
        return self._lost
