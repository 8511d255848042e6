"""The source's half of one transfer, pure; the state table is in transfer.py. Decides what is gathered, said and
reported. Knows no threads, links or tensors: a chunk is its number here."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from kvtransfer.config import TransferConfig
from kvtransfer.messages import Abort, Accept, Ack, Chunk, Commit, Offer, Ready, Refuse, Stamp, clip
from kvtransfer.transfer import AbortAsked, CancelWork, LinkLost, Received, Tell, Tick
from protos.types import TransferFailure, TransferKind


@dataclass(frozen=True, slots=True)
class Opened:
    """The first event: the prefill has started, or all blocks are there."""


@dataclass(frozen=True, slots=True)
class BlocksComputed:
    """Blocks [first_block, first_block + len(block_ids)) of the request; calls follow on each other without gaps."""

    first_block: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CommitAsked:
    first_index: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Gathered:
    seq: int
    checksum: int


@dataclass(frozen=True, slots=True)
class GatherCancelled:
    """Nothing reads this chunk's blocks, and nothing will."""

    seq: int


@dataclass(frozen=True, slots=True)
class Sent:
    """The link is done with the bytes of a chunk of so many blocks."""

    num_blocks: int


SourceEvent = (
    Opened | BlocksComputed | CommitAsked | Gathered | GatherCancelled | Sent | Received | AbortAsked | LinkLost | Tick
)


@dataclass(frozen=True, slots=True)
class Gather:
    seq: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SendChunk:
    seq: int
    number: int


@dataclass(frozen=True, slots=True)
class SendFiller:
    """The peer posted a receive that nothing is left to be sent to."""

    number: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class ReportSent:
    """Of a migration: so many of its blocks have been sent by now, or were at the destination before. The request is
    taken off its worker when this is nearly all."""

    num_blocks: int


@dataclass(frozen=True, slots=True)
class ReportRefused:
    reason: str
    failure: TransferFailure


@dataclass(frozen=True, slots=True)
class ReportClosed:
    failure: TransferFailure | None = None  # None: acknowledged


SourceEffect = Tell | Gather | SendChunk | SendFiller | CancelWork | ReportSent | ReportRefused | ReportClosed


class SourceState(Enum):
    OFFERED = auto()
    SENDING = auto()
    CLOSING = auto()
    DONE = auto()


class SourceTransfer:
    """Invariant: blocks of the request are being read only while `_gathering` names their chunk, and DONE is entered
    with `_gathering` empty, by exactly one report."""

    def __init__(
        self,
        stamp: Stamp,
        request_id: str,
        num_blocks: int,
        block_nbytes: int,
        config: TransferConfig,
        kind: TransferKind = TransferKind.HANDOFF,
    ) -> None:
        assert num_blocks > 0
        self.kind = kind
        self.stamp = stamp
        self.state = SourceState.OFFERED
        self.request_id = request_id
        self._num_blocks = num_blocks
        self._block_nbytes = block_nbytes
        self._config = config
        self._progress_at = 0.0
        self._num_computed = 0
        self._num_held = 0
        self._early: list[BlocksComputed] = []  # before the grant
        self._commit: CommitAsked | None = None
        self._failure: TransferFailure | None = None  # in CLOSING
        self._next_seq = 0
        self._gathering: dict[int, BlocksComputed] = {}
        self._announced: dict[int, int] = {}  # gathered, told to the peer, not yet asked for: how many bytes
        self._num_sent = 0  # blocks, or held by the peer

    @property
    def deadline(self) -> float | None:
        if self.state is SourceState.OFFERED:
            return self._progress_at + self._config.offer_timeout_s
        if self.state is not SourceState.SENDING:
            return None
        awaits_peer = self._announced or (self._commit and not self._gathering)
        return self._progress_at + (self._config.answer_timeout_s if awaits_peer else self._config.transfer_timeout_s)

    def on(self, event: SourceEvent, now: float) -> list[SourceEffect]:
        if self.state is SourceState.DONE:
            return []
        if isinstance(event, Tick):
            return self._on_tick(now)
        if self.state is not SourceState.OFFERED or isinstance(event, Opened):
            self._progress_at = now  # the peer's time to answer an offer is not renewed by our own work
        match event:
            case Opened():
                return [Tell(Offer(self.stamp, self.kind, self.request_id, self._num_blocks))]
            case BlocksComputed():
                return self._on_blocks(event)
            case CommitAsked():
                return self._on_commit(event)
            case Gathered() | GatherCancelled():
                return self._on_gather_ended(event)
            case Sent(num_blocks=num_blocks):
                return self._report_sent(num_blocks)
            case Received(message=message):
                assert message.stamp == self.stamp
                return self._on_message(message, now)
            case AbortAsked(reason=reason):
                return self._end(reason, TransferFailure.ABORTED, tell=True, take_back=True)
            case LinkLost(reason=reason):
                return self._end(reason, TransferFailure.LINK_LOST, tell=False)

    def _on_tick(self, now: float) -> list[SourceEffect]:
        deadline = self.deadline
        if deadline is None or now < deadline:
            return []
        return self._end(f"no answer in {self.state.name}", TransferFailure.TIMEOUT, tell=True)

    def _on_blocks(self, event: BlocksComputed) -> list[SourceEffect]:
        assert event.first_block == self._num_computed, "blocks are handed over in order"
        self._num_computed += len(event.block_ids)
        assert self._num_computed <= self._num_blocks
        if self.state is SourceState.OFFERED:
            self._early.append(event)
        return self._gather(event) if self.state is SourceState.SENDING else []

    def _on_commit(self, event: CommitAsked) -> list[SourceEffect]:
        migrates = self.kind is TransferKind.MIGRATE
        assert self._num_computed == self._num_blocks or migrates, "commit comes after the last block"
        assert self._commit is None
        self._commit = event
        return self._tell_commit() if self.state is SourceState.SENDING else []

    def _tell_commit(self) -> list[SourceEffect]:
        if self._commit is None:
            return []
        commit = self._commit
        return [Tell(Commit(self.stamp, commit.first_index, commit.token_ids, self._num_computed))]

    def _report_sent(self, num_blocks: int) -> list[SourceEffect]:
        self._num_sent += num_blocks
        migrates = self.kind is TransferKind.MIGRATE and self.state is SourceState.SENDING
        return [ReportSent(self._num_sent)] if migrates else []

    def _gather(self, blocks: BlocksComputed) -> list[SourceEffect]:
        """Chunks of what the destination does not hold."""
        effects: list[SourceEffect] = []
        step = self._config.num_chunk_blocks(self._block_nbytes)
        for start in range(max(0, self._num_held - blocks.first_block), len(blocks.block_ids), step):
            ids = blocks.block_ids[start : start + step]
            self._gathering[self._next_seq] = BlocksComputed(blocks.first_block + start, ids)
            effects.append(Gather(self._next_seq, ids))
            self._next_seq += 1
        return effects

    def _on_gather_ended(self, event: Gathered | GatherCancelled) -> list[SourceEffect]:
        blocks = self._gathering.pop(event.seq)
        if self.state is SourceState.CLOSING:
            return self._close_when_quiet()
        assert isinstance(event, Gathered), "only CancelWork cancels"
        num_blocks = len(blocks.block_ids)
        num_bytes = num_blocks * self._block_nbytes
        self._announced[event.seq] = num_bytes
        return [Tell(Chunk(self.stamp, event.seq, blocks.first_block, num_blocks, num_bytes, event.checksum))]

    def _on_message(self, message: object, now: float) -> list[SourceEffect]:
        offered = self.state is SourceState.OFFERED
        match message:
            case Accept(num_held_blocks=num_held) if offered:
                return self._on_accept(num_held, now)
            case Refuse(reason=reason) if offered:
                self.state = SourceState.DONE
                return [ReportRefused(reason, TransferFailure.REFUSED)]
            case Ready():
                return self._on_ready(message)
            case Ack() if self.state is SourceState.SENDING:
                return self._on_ack()
            case Abort(reason=reason):
                return self._end(reason, TransferFailure.ABORTED, tell=False)
        return []  # repeated or late

    def _on_accept(self, num_held: int, now: float) -> list[SourceEffect]:
        self.state = SourceState.SENDING
        self._progress_at = now
        if num_held > self._num_blocks:
            reason = f"accepted with {num_held} of {self._num_blocks} blocks held"
            return self._end(reason, TransferFailure.CORRUPT, tell=True)
        self._num_held = num_held
        effects = [effect for blocks in self._early for effect in self._gather(blocks)]
        self._early.clear()
        return [*effects, *self._tell_commit(), *self._report_sent(num_held)]

    def _on_ready(self, message: Ready) -> list[SourceEffect]:
        if self.state is SourceState.SENDING and self._announced.get(message.seq) == message.num_bytes:
            del self._announced[message.seq]
            return [SendChunk(message.seq, message.number)]
        return [SendFiller(message.number, message.num_bytes)]

    def _on_ack(self) -> list[SourceEffect]:
        if self._commit is None or self._gathering or self._announced:
            return self._end("acknowledged before everything was sent", TransferFailure.CORRUPT, tell=True)
        self.state = SourceState.DONE
        return [ReportClosed()]

    def _end(self, reason: str, failure: TransferFailure, *, tell: bool, take_back: bool = False) -> list[SourceEffect]:
        """Give up. take_back: our own side asked, so an offer that nobody took is not the destination's refusal."""
        if self.state is SourceState.CLOSING:
            return []
        effects: list[SourceEffect] = [Tell(Abort(self.stamp, clip(reason)))] if tell else []
        if self.state is SourceState.OFFERED and not take_back:
            self.state = SourceState.DONE
            return [*effects, ReportRefused(reason, failure)]
        self.state, self._failure = SourceState.CLOSING, failure
        return [*effects, CancelWork(), *self._close_when_quiet()]

    def _close_when_quiet(self) -> list[SourceEffect]:
        if self._gathering:
            return []
        self.state = SourceState.DONE
        return [ReportClosed(self._failure)]
