"""Both machines of one transfer against each other, over a network that loses, repeats and reorders what they say, with
work that takes its time, aborts at any step, bytes that get corrupted and links that break."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvtransfer.config import TransferConfig
from kvtransfer.destination_transfer import (
    Announced,
    AskHost,
    ChunkEnded,
    DestinationEvent,
    DestinationState,
    DestinationTransfer,
    Granted,
    Receive,
    RefusedByHost,
    ReportArrived,
    ReportLost,
)
from kvtransfer.messages import (
    Abort,
    Accept,
    Ack,
    Chunk,
    Commit,
    Offer,
    Ready,
    Refuse,
    Stamp,
    TransferMessage,
)
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
    SourceEvent,
    SourceState,
    SourceTransfer,
)
from kvtransfer.transfer import ASKED_FOR, AbortAsked, CancelWork, LinkLost, Received, Tell, Tick
from protos.types import TransferFailure, TransferKind

BLOCK_NBYTES = 10
CONFIG = TransferConfig(chunk_nbytes=2 * BLOCK_NBYTES)
RARELY = st.sampled_from([False] * 7 + [True])
STAMP = Stamp(b"t" * 16, 1, "source-life", "destination-life")


@dataclass
class Job:
    """A gather or a receive: `begun` once blocks are being read or written."""

    seq: int
    block_ids: tuple[int, ...]
    checksum: int = 0
    number: int = -1
    begun: bool = False


def checksum(content: tuple[int, ...] | None) -> int:
    return hash(content) & (1 << 63) - 1


class TwoMachines(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(1, 7),
        num_held=st.integers(0, 7),
        kind=st.sampled_from(TransferKind),
        room=st.integers(0, 3),
    )
    def open(self, num_blocks: int, num_held: int, kind: TransferKind, room: int = 0) -> None:
        """room: blocks that a migration offers and never has."""
        self.now = 100.0
        self.kind = kind
        self.num_blocks = num_blocks
        self.num_offered = num_blocks + (room if kind is TransferKind.MIGRATE else 0)
        self.num_held = min(num_held, num_blocks)
        self.sent: list[int] = []  # as the source reported it
        self.source = SourceTransfer(STAMP, "r", self.num_offered, BLOCK_NBYTES, CONFIG, kind)
        self.destination = DestinationTransfer(STAMP, "r", BLOCK_NBYTES, CONFIG, kind)
        self.to_source: list[TransferMessage] = []
        self.to_destination: list[TransferMessage] = []
        self.gathers: list[Job] = []
        self.receives: list[Job] = []
        self.staged: dict[int, tuple[int, ...]] = {}
        self.wire: dict[int, tuple[int, ...] | None] = {}  # number -> the bytes; None is filler
        self.next_posted = self.next_sent = 0
        self.pool: dict[int, int] = {}  # destination's block -> source's block that was written there
        self.num_computed = 0
        self.is_committed = self.is_link_lost = self.is_asked = False
        self.source_ends: list[object] = []
        self.destination_ends: list[object] = []
        if kind in ASKED_FOR:
            self.announce()
        self.feed_source(Opened())

    # --- what the sides would do ------------------------------------------------------------------------------------

    def feed_source(self, event: SourceEvent) -> None:
        for effect in self.source.on(event, self.now):
            match effect:
                case Tell(message=message):
                    self.to_destination.append(message)
                case Gather(seq=seq, block_ids=block_ids):
                    self.gathers.append(Job(seq, block_ids))
                case SendChunk(seq=seq, number=number):
                    content = self.staged.pop(seq)
                    self.put_on_wire(number, content)
                    self.feed_source(Sent(len(content)))
                case ReportSent(num_blocks=num_blocks):
                    self.sent.append(num_blocks)
                case SendFiller(number=number):
                    self.put_on_wire(number, None)
                case CancelWork():
                    self.staged.clear()
                    cancelled = [job for job in self.gathers if not job.begun]
                    self.gathers = [job for job in self.gathers if job.begun]
                    for job in cancelled:
                        self.feed_source(GatherCancelled(job.seq))
                case ReportClosed() | ReportRefused():
                    assert not self.gathers, "blocks are still being read"
                    self.source_ends.append(effect)

    def feed_destination(self, event: DestinationEvent) -> None:
        for effect in self.destination.on(event, self.now):
            match effect:
                case Tell(message=message):
                    self.to_source.append(message)
                case AskHost():
                    assert not self.is_asked
                    self.is_asked = True
                case Receive(seq=seq, block_ids=block_ids, checksum=expected):
                    self.receives.append(Job(seq, block_ids, expected, self.next_posted))
                    num_bytes = len(block_ids) * BLOCK_NBYTES
                    self.to_source.append(Ready(STAMP, seq, self.next_posted, num_bytes))
                    self.next_posted += 1
                case CancelWork():
                    cancelled = [job for job in self.receives if not job.begun]
                    self.receives = [job for job in self.receives if job.begun]
                    for job in cancelled:
                        self.feed_destination(ChunkEnded(job.seq, "cancelled"))
                case ReportArrived() | ReportLost():
                    assert not self.receives, "blocks are still being written"
                    self.destination_ends.append(effect)

    def put_on_wire(self, number: int, content: tuple[int, ...] | None) -> None:
        if number == self.next_sent:
            self.wire[number] = content
            self.next_sent += 1
        elif number > self.next_sent:
            self.break_link()

    # --- the engines ------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.num_computed < self.num_blocks)
    @rule(num_blocks=st.integers(1, 7))
    def compute(self, num_blocks: int) -> None:
        first, self.num_computed = self.num_computed, min(self.num_computed + num_blocks, self.num_blocks)
        self.feed_source(BlocksComputed(first, tuple(range(1000 + first, 1000 + self.num_computed))))

    @precondition(lambda self: self.num_computed == self.num_blocks and not self.is_committed)
    @rule()
    def commit(self) -> None:
        self.is_committed = True
        self.feed_source(CommitAsked(5, (42,)))

    @rule()
    def announce(self) -> None:
        self.feed_destination(Announced(STAMP, "r", self.kind))

    @precondition(lambda self: self.destination.state is DestinationState.OFFERED)
    @rule()
    def grant(self) -> None:
        self.feed_destination(Granted(self.num_held, tuple(range(self.num_held, self.num_offered))))

    @precondition(lambda self: self.destination.state is DestinationState.OFFERED)
    @rule(rarely=RARELY)
    def refuse(self, rarely: bool) -> None:
        if not rarely:
            return
        self.feed_destination(RefusedByHost("no room"))
        self.destination_ends.append("refused")

    @rule(by_source=st.booleans(), rarely=RARELY)
    def abort(self, by_source: bool, rarely: bool) -> None:
        if not rarely:
            return
        if by_source:
            self.feed_source(AbortAsked("client left"))
        elif self.destination.state is not DestinationState.NEW:
            self.feed_destination(AbortAsked("client left"))

    # --- the threads ------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.gathers)
    @rule()
    def begin_gather(self) -> None:
        self.gathers[0].begun = True

    @precondition(lambda self: self.gathers and self.gathers[0].begun)
    @rule()
    def finish_gather(self) -> None:
        job = self.gathers.pop(0)
        if self.source.state is SourceState.SENDING:
            self.staged[job.seq] = job.block_ids
        self.feed_source(Gathered(job.seq, checksum(job.block_ids)))

    @precondition(lambda self: self.receives and self.receives[0].number in self.wire)
    @rule(corrupted=RARELY)
    def take_in(self, corrupted: bool) -> None:
        job = self.receives[0]
        content = None if corrupted else self.wire[job.number]
        if checksum(content) == job.checksum:
            job.begun = True  # the scatter; it ends by another rule
        else:
            self.receives.pop(0)
            self.feed_destination(ChunkEnded(job.seq, "checksum mismatch"))

    @precondition(lambda self: self.receives and self.receives[0].begun)
    @rule()
    def finish_scatter(self) -> None:
        job = self.receives.pop(0)
        content = self.wire[job.number]
        assert content is not None
        self.pool.update(zip(job.block_ids, content, strict=True))
        self.feed_destination(ChunkEnded(job.seq, ""))

    # --- the network ------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.to_source or self.to_destination)
    @rule(position=st.integers(0, 50), fate=st.sampled_from(["deliver"] * 6 + ["repeat"] * 3 + ["lose"]))
    def post(self, position: int, fate: str) -> None:
        bags = [bag for bag in (self.to_source, self.to_destination) if bag]
        bag = bags[position % len(bags)]
        message = bag[position % len(bag)]
        if fate != "repeat":
            bag.remove(message)
        if fate != "lose":
            self.deliver(message, bag is self.to_source)

    def deliver(self, message: TransferMessage, to_source: bool) -> None:
        if self.is_link_lost:
            return
        if to_source:
            self.feed_source(Received(message))
        elif isinstance(message, Offer) or self.destination.state is not DestinationState.NEW:
            self.feed_destination(Received(message))  # the side itself turns away what names no transfer

    @precondition(lambda self: not self.is_link_lost and self.source.state is not SourceState.OFFERED)
    @rule(rarely=RARELY)
    def lose_link(self, rarely: bool) -> None:
        if rarely:
            self.break_link()

    def break_link(self) -> None:
        if self.is_link_lost:
            return
        self.is_link_lost = True
        self.feed_source(LinkLost("cut"))
        if self.destination.state is not DestinationState.NEW:
            self.feed_destination(LinkLost("cut"))

    @rule(seconds=st.sampled_from([0.01] * 12 + [1.0, 3.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.feed_source(Tick())
        self.feed_destination(Tick())

    @rule(num_steps=st.integers(1, 12))
    def go_on(self, num_steps: int) -> None:
        """As on a day without faults; without this, few runs would get far."""
        for _ in range(num_steps):
            if self.destination.state in (DestinationState.NEW, DestinationState.PARKED):
                self.announce()
            elif self.destination.state is DestinationState.OFFERED:
                self.grant()
            elif self.gathers and not self.gathers[0].begun:
                self.begin_gather()
            elif self.gathers:
                self.finish_gather()
            elif self.receives and (self.receives[0].begun or self.receives[0].number in self.wire):
                if not self.receives[0].begun:
                    self.take_in(False)
                else:
                    self.finish_scatter()
            elif self.to_destination:
                self.deliver(self.to_destination.pop(0), to_source=False)
            elif self.to_source:
                self.deliver(self.to_source.pop(0), to_source=True)
            elif self.num_computed < self.num_blocks:
                self.compute(2)
            elif not self.is_committed:
                self.commit()

    # --- what must hold ---------------------------------------------------------------------------------------------

    @invariant()
    def ends_once(self) -> None:
        if not hasattr(self, "source"):
            return
        assert len(self.source_ends) == (self.source.state is SourceState.DONE)
        assert len(self.destination_ends) <= (self.destination.state is DestinationState.DONE)

    @invariant()
    def arrived_means_whole(self) -> None:
        for end in getattr(self, "destination_ends", []):
            if isinstance(end, ReportArrived):
                assert self.is_committed
                assert self.pool == {position: 1000 + position for position in range(self.num_held, self.num_blocks)}
                assert (end.first_index, end.token_ids) == (5, (42,))
                assert end.num_bytes == BLOCK_NBYTES * (self.num_blocks - self.num_held)
                assert end.num_blocks == self.num_blocks

    @invariant()
    def reports_of_a_migration_only_grow_to_what_it_has(self) -> None:
        sent = getattr(self, "sent", [])
        assert sent == sorted(sent) and all(self.num_held <= each <= self.num_blocks for each in sent)
        assert not sent or self.kind is TransferKind.MIGRATE

    def teardown(self) -> None:
        """Left alone, with the work that has begun coming to its end, both sides end."""
        if not hasattr(self, "source"):
            return
        for _ in range(3):
            while self.gathers:
                self.gathers[0].begun = True
                self.finish_gather()
            while self.receives and self.receives[0].begun:
                self.finish_scatter()
            self.wait(61.0)
        assert self.source.state is SourceState.DONE
        if self.destination.state is DestinationState.EXPECTED:
            self.feed_destination(AbortAsked("the router gave up"))
        assert self.destination.state in (DestinationState.DONE, DestinationState.NEW)
        self.ends_once()
        self.arrived_means_whole()


TestTwoMachines = TwoMachines.TestCase
TestTwoMachines.settings = settings(max_examples=300, stateful_step_count=40)


def test_the_good_path_is_reachable_in_the_model() -> None:
    """Else the properties above would hold of nothing."""
    model = TwoMachines()
    for kind in TransferKind:
        model.open(5, 1, kind, 2)
        for _ in range(30):
            model.go_on(1)
        assert isinstance(model.destination_ends[0], ReportArrived)
        assert model.source_ends == [ReportClosed()]
        model.arrived_means_whole()
        assert model.sent == ([1, 2, 4, 5] if kind is TransferKind.MIGRATE else [])


def granted(num_blocks: int = 4, num_held: int = 1) -> DestinationTransfer:
    transfer = DestinationTransfer(STAMP, "r", BLOCK_NBYTES, CONFIG)
    transfer.on(Announced(STAMP, "r"), 0)
    transfer.on(Received(Offer(STAMP, TransferKind.HANDOFF, "r", num_blocks)), 0)
    effects = transfer.on(Granted(num_held, tuple(range(10 + num_held, 10 + num_blocks))), 0)
    assert effects == [Tell(Accept(STAMP, num_held))]
    return transfer


def test_chunks_outside_the_grant_end_the_transfer() -> None:
    for chunk in (
        Chunk(STAMP, 0, 0, 1, BLOCK_NBYTES, 0),  # held already
        Chunk(STAMP, 0, 3, 2, 2 * BLOCK_NBYTES, 0),  # past the end
        Chunk(STAMP, 0, 1, 0, 0, 0),  # empty
        Chunk(STAMP, 0, 1, 3, 3 * BLOCK_NBYTES, 0),  # longer than a staging slot
        Chunk(STAMP, 0, 1, 2, BLOCK_NBYTES, 0),  # wrong length
    ):
        effects = granted().on(Received(chunk), 1)
        assert isinstance(effects[-1], ReportLost)


def migrating(num_blocks: int = 4, num_held: int = 1) -> DestinationTransfer:
    transfer = DestinationTransfer(STAMP, "r", BLOCK_NBYTES, CONFIG, TransferKind.MIGRATE)
    transfer.on(Announced(STAMP, "r", TransferKind.MIGRATE), 0)
    transfer.on(Received(Offer(STAMP, TransferKind.MIGRATE, "r", num_blocks)), 0)
    transfer.on(Granted(num_held, tuple(range(10 + num_held, 10 + num_blocks))), 0)
    return transfer


def test_a_commit_of_other_blocks_than_there_are_ends_the_transfer() -> None:
    for transfer, num_blocks in ((granted(), 3), (granted(), 5), (migrating(), 0), (migrating(), 5)):
        assert isinstance(transfer.on(Received(Commit(STAMP, 0, (1,), num_blocks)), 1)[-1], ReportLost)


def test_chunks_beyond_the_commit_end_a_migration() -> None:
    transfer, beyond = migrating(), Received(Chunk(STAMP, 0, 2, 1, BLOCK_NBYTES, 0))
    assert transfer.on(Received(Commit(STAMP, 5, (1,), 2)), 1) == []
    assert isinstance(transfer.on(beyond, 1)[-1], ReportLost)
    transfer = migrating()
    transfer.on(beyond, 1)
    assert CancelWork() in transfer.on(Received(Commit(STAMP, 5, (1,), 2)), 1)


def test_a_migration_may_be_held_whole() -> None:
    arrived = migrating().on(Received(Commit(STAMP, 5, (1,), 1)), 1)[-1]
    assert isinstance(arrived, ReportArrived)
    assert (arrived.num_blocks, arrived.num_bytes) == (1, 0)


def test_two_chunks_for_one_block_end_the_transfer() -> None:
    transfer = granted()
    assert transfer.on(Received(Chunk(STAMP, 0, 1, 2, 2 * BLOCK_NBYTES, 7)), 1) == [Receive(0, (11, 12), 7)]
    assert transfer.on(Received(Chunk(STAMP, 0, 1, 2, 2 * BLOCK_NBYTES, 7)), 1) == []  # a repeat is not a second one
    assert CancelWork() in transfer.on(Received(Chunk(STAMP, 1, 2, 1, BLOCK_NBYTES, 7)), 1)
    assert transfer.on(ChunkEnded(0, "cancelled"), 1)[-1] == ReportLost(
        "a second chunk for blocks in [2, 3)", TransferFailure.CORRUPT
    )


def test_an_offer_of_another_kind_is_refused_and_the_right_one_still_awaited() -> None:
    transfer = DestinationTransfer(STAMP, "r", BLOCK_NBYTES, CONFIG)
    transfer.on(Announced(STAMP, "r", TransferKind.PULL), 0)
    for wrong in set(TransferKind) - {TransferKind.PULL}:
        (refused,) = transfer.on(Received(Offer(STAMP, wrong, "r", 1)), 0)
        assert isinstance(refused, Tell)
        assert isinstance(refused.message, Refuse)
    assert transfer.on(Received(Offer(STAMP, TransferKind.PULL, "r", 1)), 0) == [AskHost("r", 1, 1)]


def test_an_offer_that_came_first_is_refused_where_another_kind_is_announced() -> None:
    transfer = DestinationTransfer(STAMP, "r", BLOCK_NBYTES, CONFIG, TransferKind.MIGRATE)
    assert transfer.on(Received(Offer(STAMP, TransferKind.MIGRATE, "r", 1)), 0) == []
    (refused,) = transfer.on(Announced(STAMP, "r"), 0)
    assert isinstance(refused, Tell)
    assert isinstance(refused.message, Refuse)
    assert transfer.on(Received(Offer(STAMP, TransferKind.HANDOFF, "r", 1)), 0) == [AskHost("r", 1, 1)]


def test_a_withdrawn_offer_is_lost_at_its_announcement() -> None:
    transfer = DestinationTransfer(STAMP, "r", BLOCK_NBYTES, CONFIG)
    transfer.on(Received(Offer(STAMP, TransferKind.HANDOFF, "r", 1)), 0)
    assert transfer.on(Received(Abort(STAMP, "token 0 ended it")), 0.1) == []
    assert transfer.on(Announced(STAMP, "r"), 0.2) == [ReportLost("token 0 ended it", TransferFailure.ABORTED)]


def test_an_early_ack_is_not_believed() -> None:
    source = SourceTransfer(STAMP, "r", 2, BLOCK_NBYTES, CONFIG)
    source.on(Opened(), 0)
    source.on(Received(Accept(STAMP, 0)), 0)
    source.on(BlocksComputed(0, (5, 6)), 0)
    effects = source.on(Received(Ack(STAMP)), 0)
    assert not any(isinstance(effect, ReportClosed) for effect in effects), "the gather is under way"
    assert source.on(Gathered(0, 1), 0) == [ReportClosed(TransferFailure.CORRUPT)]


def test_a_receive_of_another_length_gets_filler() -> None:
    source = SourceTransfer(STAMP, "r", 2, BLOCK_NBYTES, CONFIG)
    source.on(Opened(), 0)
    source.on(Received(Accept(STAMP, 0)), 0)
    source.on(BlocksComputed(0, (5, 6)), 0)
    source.on(Gathered(0, 1), 0)
    assert source.on(Received(Ready(STAMP, 0, 0, BLOCK_NBYTES)), 0) == [SendFiller(0, BLOCK_NBYTES)]
    assert source.on(Received(Ready(STAMP, 0, 1, 2 * BLOCK_NBYTES)), 0) == [SendChunk(0, 1)]


def test_source_deadlines() -> None:
    source = SourceTransfer(STAMP, "r", 1, BLOCK_NBYTES, CONFIG)
    source.on(Opened(), 10)
    assert source.deadline == 10 + CONFIG.offer_timeout_s
    source.on(BlocksComputed(0, (5,)), 12)
    assert source.deadline == 10 + CONFIG.offer_timeout_s, "our own work is no answer"
    assert source.on(Received(Accept(STAMP, 0)), 13) == [Gather(0, (5,))]
    assert source.deadline == 13 + CONFIG.transfer_timeout_s
    source.on(Gathered(0, 1), 14)
    assert source.deadline == 14 + CONFIG.answer_timeout_s
    assert source.on(Tick(), 15.9) == []
    assert source.on(Tick(), 16)[-1] == ReportClosed(TransferFailure.TIMEOUT)


def test_an_unanswered_offer_is_refused() -> None:
    source = SourceTransfer(STAMP, "r", 1, BLOCK_NBYTES, CONFIG)
    source.on(Opened(), 0)
    effects = source.on(Tick(), CONFIG.offer_timeout_s)
    assert isinstance(effects[-1], ReportRefused)
    assert source.on(Received(Refuse(STAMP, "late")), 9) == []


def test_commit_before_the_grant_is_sent_after_it() -> None:
    source = SourceTransfer(STAMP, "r", 3, BLOCK_NBYTES, CONFIG)
    source.on(Opened(), 0)
    assert source.on(BlocksComputed(0, (5, 6, 7)), 0) == source.on(CommitAsked(0, (1,)), 0) == []
    effects = source.on(Received(Accept(STAMP, 2)), 1)
    assert effects == [Gather(0, (7,)), Tell(Commit(STAMP, 0, (1,), 3))]
