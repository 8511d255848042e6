"""Running decodes that move between workers, under a Router: workers that die at any step, routers that restart,
clients that leave, KV that is lost before and after its commit, acks that never come, reports late and twice. A client
sees every token once and in order, no worker computes what another one owns, and in the end nobody holds anything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.events import Effect as EngineEffect
from engine.events import (
    ExpectTransfer,
    OpenTransfer,
    Submitted,
    TransferArrived,
    TransferClosed,
    TransferLost,
    TransferOffered,
    TransferRefused,
)
from engine.request import RequestStatus
from protos.types import (
    Abort,
    HandoffRefused,
    MigrationFailed,
    PeerRef,
    Role,
    TokenOutput,
    TransferFailure,
    WorkerReport,
)
from router.config import RouterConfig
from router.events import (
    ClientCancelled,
    Deliver,
    Event,
    Fail,
    MigrationWanted,
    Reported,
    Send,
    Tick,
    WorkerDown,
    WorkerUp,
)
from router.router import Router
from tests.engine.fake_worker import FakeNetwork, FakeTransfer, FakeWorker, expected_output
from tests.router.values import Transfers, arrived

BLOCK = 4
CONFIG = RouterConfig(
    hash_block_size=2, block_size=BLOCK, max_attempts=50, num_virtual_nodes=8, refuses_early=False, dispatch_tokens=0
)
WORKERS = {"p-0": Role.PREFILL, "d-0": Role.DECODE, "d-1": Role.DECODE, "d-2": Role.DECODE}
PICKS = st.integers(0, 1_000_000)


@dataclass
class Life:
    """One incarnation of one worker. Invariant: what the router sends comes in order; what it says is on_the_way."""

    ref: PeerRef
    worker: FakeWorker
    inbox: list[Send] = field(default_factory=list)


class MigrationMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.num_blocks = 12
        self.num_lives = 0
        self.transfer_ids = Transfers()
        self.router = Router(CONFIG, self.transfer_ids)
        self.network = FakeNetwork()
        self.lives: dict[str, Life] = {}
        self.every_life: dict[PeerRef, FakeWorker] = {}
        self.expected: set[bytes] = set()  # transfers that the router has announced
        self.on_the_way: list[Reported] = []
        self.prompts: dict[str, list[int]] = {}
        self.seen: dict[str, list[int]] = {}
        self.open: set[str] = set()
        self.now = 0.0

    @initialize(num_blocks=st.sampled_from([16, 20, 60]), num_decoding=st.integers(1, 3))
    def start(self, num_blocks: int, num_decoding: int = 0) -> None:
        self.num_blocks = num_blocks
        for worker_id in WORKERS:
            self.join(worker_id)
        for number in range(num_decoding):
            self.arrive(5 + 4 * number, 40)
        self.go_on(6)

    # --- the shells ---------------------------------------------------------------------------------------------------

    def feed(self, event: Event) -> None:
        self.now += 0.1
        for effect in self.router.on(event, self.now):
            match effect:
                case Send():
                    self.lives[effect.worker_id].inbox.append(effect)
                case Deliver():
                    self.deliver(effect)
                case Fail():
                    raise AssertionError(effect)

    def deliver(self, effect: Deliver) -> None:
        seen = self.seen[effect.request_id]
        assert effect.request_id in self.open
        assert effect.first_index == len(seen)
        seen += effect.token_ids
        assert seen == expected_output(self.prompts[effect.request_id], len(seen))
        if effect.finish_reason is not None:
            self.open.remove(effect.request_id)

    def note(self, life: Life, effects: list[EngineEffect]) -> None:
        """What a worker does, carried out as WorkerHost would."""
        for effect in effects:
            match effect:
                case TokenOutput():
                    self.say(life, WorkerReport(outputs=(effect,)))
                case HandoffRefused():
                    self.say(life, WorkerReport(refusals=(effect,)))
                case MigrationFailed():
                    self.say(life, WorkerReport(failed_migrations=(effect,)))
                case ExpectTransfer(handoff):
                    self.expected.add(handoff.transfer_id)
                    if self.transfer(handoff.transfer_id, handoff.peer, life.ref).ended:
                        self.tell(life.worker, TransferLost(handoff.transfer_id, "withdrawn"))
                case OpenTransfer(handoff):
                    self.transfer(handoff.transfer_id, life.ref, handoff.peer)
                    self.network.note(life.worker, [effect])
                case _:
                    self.network.note(life.worker, [effect])

    def transfer(self, transfer_id: bytes, source: PeerRef, destination: PeerRef) -> FakeTransfer:
        fresh = FakeTransfer(self.every_life[source], self.every_life[destination])
        return self.network.transfers.setdefault(transfer_id, fresh)

    def say(self, life: Life, report: WorkerReport) -> None:
        self.on_the_way.append(Reported(life.ref.worker_id, life.ref.incarnation, report))

    # --- clients ------------------------------------------------------------------------------------------------------

    @rule(length=st.integers(1, 14), max_tokens=st.integers(2, 40))
    def arrive(self, length: int, max_tokens: int) -> None:
        name = f"r{len(self.prompts)}"
        self.prompts[name] = [*range(length - 1), 100 + len(self.prompts)]
        self.seen[name] = []
        self.open.add(name)
        self.feed(arrived(name, self.prompts[name], max_tokens))

    @precondition(lambda self: self.open)
    @rule(pick=PICKS)
    def leave(self, pick: int) -> None:
        if pick % 5 == 0:
            name = sorted(self.open)[pick % len(self.open)]
            self.open.remove(name)
            self.feed(ClientCancelled(name))

    # --- what moves ---------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.open)
    @rule(pick=PICKS, to=st.sampled_from(sorted(WORKERS)))
    def migrate(self, pick: int, to: str) -> None:
        self.feed(MigrationWanted(sorted(self.open)[pick % len(self.open)], to, "as drawn"))

    @precondition(lambda self: self.open)
    @rule(to=st.sampled_from(sorted(WORKERS)), num_rounds=st.integers(1, 8), is_heard=st.booleans())
    def migrate_all(self, to: str, num_rounds: int, is_heard: bool) -> None:
        """And let them get somewhere, so that what goes wrong next goes wrong at any stage of it."""
        for name in sorted(self.open):
            self.feed(MigrationWanted(name, to, "all of them"))
        self.go_on(num_rounds, is_heard)

    @rule(pick=PICKS)
    def hear(self, pick: int) -> None:
        """One frame of the router, by one worker: submits, retargets, migrates, aborts."""
        busy = [life for life in self.lives.values() if life.inbox]
        if busy:
            self.take_frame(busy[pick % len(busy)], 1 + pick % 3)

    def take_frame(self, life: Life, num_sends: int) -> None:
        sends, life.inbox = life.inbox[:num_sends], life.inbox[num_sends:]
        events = [
            *(Submitted(each) for send in sends for each in send.submits),
            *(each for send in sends for each in send.retargets),
            *(each for send in sends for each in send.migrates),
            *(each for send in sends for each in send.aborts),
        ]
        for event in events:
            self.note(life, life.worker.on(event))

    @rule(pick=PICKS)
    def half_step(self, pick: int) -> None:
        life = sorted(self.lives.items())[pick % len(self.lives)][1]
        self.note(life, life.worker.begin_step() if life.worker.output is None else life.worker.end_step())

    @precondition(lambda self: self.on_the_way)
    @rule(pick=PICKS, again=st.booleans())
    def report(self, pick: int, again: bool) -> None:
        """Late, out of order, and outputs maybe twice."""
        place = pick % len(self.on_the_way)
        event = self.on_the_way[place]
        if not (again and event.report.outputs):
            del self.on_the_way[place]
        self.feed(event)

    @rule(pick=PICKS)
    def carry_on(self, pick: int) -> None:
        under_way = [each for each in self.network.transfers.items() if not (each[1].closed and each[1].ended)]
        if under_way:
            self.advance(*under_way[pick % len(under_way)])

    @rule(num_rounds=st.integers(1, 6), is_heard=st.sampled_from([True, True, False]))
    def go_on(self, num_rounds: int, is_heard: bool = True) -> None:
        """As on a day without faults; without this, few requests would get far. What is said may be late, though."""
        for _ in range(num_rounds):
            for life in list(self.lives.values()):
                self.take_frame(life, len(life.inbox))
                self.note(life, life.worker.begin_step() if life.worker.output is None else life.worker.end_step())
            for item in list(self.network.transfers.items()):
                self.advance(*item)
            for event in self.take_reports() if is_heard else ():
                self.feed(event)

    def take_reports(self) -> Iterator[Reported]:
        while self.on_the_way:
            yield self.on_the_way.pop(0)

    # --- what goes wrong ----------------------------------------------------------------------------------------------

    @rule(pick=PICKS, ack_only=st.booleans())
    def lose(self, pick: int, ack_only: bool) -> None:
        """A link breaks: before the commit nothing has arrived; after it, it may have, and only the ack is lost."""
        items = [each for each in self.network.transfers.items() if not (each[1].closed and each[1].ended)]
        if not items:
            return
        transfer_id, transfer = items[pick % len(items)]
        if ack_only and transfer.commit is not None and transfer.grant is not None and not transfer.ended:
            self.arrive_whole(transfer_id, transfer)
        self.end_destination(transfer_id, transfer)
        self.end_source(transfer_id, transfer, TransferFailure.LINK_LOST)

    @rule(pick=PICKS)
    def kill(self, pick: int) -> None:
        if pick % 3 or len(self.lives) < 3:
            return
        worker_id = sorted(self.lives)[pick % len(self.lives)]
        life = self.lives.pop(worker_id)
        self.feed(WorkerDown(worker_id, life.ref.incarnation, "killed"))

    @rule(worker_id=st.sampled_from(sorted(WORKERS)))
    def join(self, worker_id: str) -> None:
        if worker_id in self.lives:
            return
        self.num_lives += 1
        ref = PeerRef(worker_id, str(self.num_lives), "host:1", WORKERS[worker_id])
        self.every_life[ref] = FakeWorker(self.num_blocks, worker_id, max_model_len=64, max_num_seqs=3)
        self.lives[worker_id] = Life(ref, self.every_life[ref])
        self.feed(WorkerUp(ref))
        warm = tuple(WORKERS) if ref.role is Role.PREFILL else ()
        stats = replace(self.lives[worker_id].worker.core.stats(), warm_links=warm)
        self.feed(Reported(worker_id, ref.incarnation, WorkerReport(stats=stats)))

    @rule(rarely=st.sampled_from([False] * 9 + [True]))
    def restart_router(self, rarely: bool) -> None:
        """Its sessions end: every worker gives its requests up. Clients come back with what they have."""
        if rarely:
            self.end_sessions()
            for name in sorted(self.open):
                self.open.remove(name)  # its client comes again as a new request: another test's matter
            self.router = Router(CONFIG, self.transfer_ids)
            self.num_lives += 1
            for life in self.lives.values():
                self.feed(WorkerUp(life.ref))

    def end_sessions(self) -> None:
        self.on_the_way.clear()
        for life in self.lives.values():
            life.inbox.clear()
            for request in list(life.worker.core._requests.values()):
                self.note(life, life.worker.on(Abort(request.request_id, request.attempt)))
        self.on_the_way.clear()

    # --- transfers ----------------------------------------------------------------------------------------------------

    def is_up(self, worker: FakeWorker) -> Life | None:
        return next((life for life in self.lives.values() if life.worker is worker), None)

    def tell(self, worker: FakeWorker, event: object) -> None:
        life = self.is_up(worker)
        if life is not None:
            self.note(life, worker.on(event))  # type: ignore[arg-type]

    def advance(self, transfer_id: bytes, transfer: FakeTransfer) -> bool:
        """The next thing that a sound network does with a transfer; False where it can only wait."""
        gone = not (self.is_up(transfer.source) and self.is_up(transfer.destination))
        if gone or transfer.source_aborted or transfer.destination_aborted:
            ended = self.end_destination(transfer_id, transfer)
            return self.end_source(transfer_id, transfer, TransferFailure.LINK_LOST) or ended
        news = transfer.news(transfer_id)
        is_new = transfer.opened is not None and not transfer.offered and not transfer.closed
        if is_new and transfer_id not in self.expected:
            destination = self.is_up(transfer.destination)
            if destination is None or destination.inbox:
                return False  # its announcement may still come
            transfer.closed = transfer.ended = True
            self.tell(transfer.source, TransferRefused(transfer_id, "not announced"))
        elif is_new and transfer.opened is not None:
            transfer.offered = True
            opened = transfer.opened
            offer = TransferOffered(transfer_id, opened.request_id, opened.attempt, opened.num_blocks)
            self.tell(transfer.destination, offer)
        elif transfer.refusal is not None and not transfer.closed:
            transfer.closed = transfer.ended = True
            self.tell(transfer.source, TransferRefused(transfer_id, transfer.refusal))
        elif news is not None:
            self.tell(transfer.source, news)
        elif transfer.commit is not None and transfer.grant is not None and not transfer.ended and not transfer.closed:
            self.arrive_whole(transfer_id, transfer)
        elif transfer.ended:
            return self.end_source(transfer_id, transfer, None)
        else:
            return False
        return True

    def arrive_whole(self, transfer_id: bytes, transfer: FakeTransfer) -> None:
        assert transfer.commit is not None
        transfer.copy()
        transfer.ended = True
        commit, num_blocks = transfer.commit, len(transfer.blocks)
        whole = TransferArrived(transfer_id, commit.first_index, commit.token_ids, 1, 0.0, 0.0, num_blocks)
        self.tell(transfer.destination, whole)

    def end_source(self, transfer_id: bytes, transfer: FakeTransfer, failure: TransferFailure | None) -> bool:
        if transfer.closed or transfer.opened is None:
            return False
        transfer.closed = True
        self.tell(transfer.source, TransferClosed(transfer_id, failure))
        return True

    def end_destination(self, transfer_id: bytes, transfer: FakeTransfer) -> bool:
        if transfer.ended:
            return False
        transfer.ended = True
        self.tell(transfer.destination, TransferLost(transfer_id, "lost"))
        return True

    # --- what must hold -----------------------------------------------------------------------------------------------

    @invariant()
    def ledgers_balance(self) -> None:
        for life in self.lives.values():
            assert life.worker.core.ledger().balanced

    @invariant()
    def nobody_works_for_a_request_that_is_not_its_to_work_for(self) -> None:
        """Two may run one only while a word of the router to the one that is to give it up is on its way."""
        for name in self.open:
            in_flight = self.router._in_flight[name]
            attempt = in_flight.attempt
            views = attempt.workers if attempt else ()
            for worker_id, life in self.lives.items():
                request = life.worker.core._requests.get(name)
                is_told = any(
                    abort.request_id == name for send in life.inbox for abort in send.aborts
                ) or life.ref not in [view.ref for view in self.router.view.workers.values()]
                if request is None or is_told:
                    continue
                assert attempt is not None and request.attempt == attempt.number, (worker_id, name)
                assert worker_id in [view.worker_id for view in views]

    @invariant()
    def one_at_most_computes_it_for_good(self) -> None:
        """Past prefill, with neither an abort nor a commit of its own under way."""
        for name in self.open:
            running = [life for life in self.lives.values() if self.decodes(life, name)]
            assert len(running) <= 1, [life.ref.worker_id for life in running]

    def decodes(self, life: Life, name: str) -> bool:
        request = life.worker.core._requests.get(name)
        if request is None or request.status is not RequestStatus.RUNNING or request.handoff_to is not None:
            return False
        return not any(abort.request_id == name for send in life.inbox for abort in send.aborts)

    def teardown(self) -> None:
        """With every worker up and the network sound, every request ends, and nothing is left anywhere."""
        for worker_id in WORKERS:
            self.join(worker_id)
        for _ in range(400):
            self.go_on(1)
            self.feed(Tick())
            if not self.open and not any(life.worker.core._requests for life in self.lives.values()):
                break
        self.go_on(8)
        assert not self.open, self.open
        for name, seen in self.seen.items():
            assert seen == expected_output(self.prompts[name], len(seen))
        for life in self.lives.values():
            ledger = life.worker.core.ledger()
            assert (ledger.held, ledger.leased) == (0, 0), (life.ref.worker_id, ledger)
            assert not life.worker.core._requests
        for view in self.router.view.workers.values():
            assert not view.pending_tokens and not view.placed_blocks and not view.decoding


TestMigrationMachine = MigrationMachine.TestCase
TestMigrationMachine.settings = settings(max_examples=40, stateful_step_count=50)


def test_requests_do_migrate_in_the_model() -> None:
    """Else the properties above would hold of nothing."""
    machine = MigrationMachine()
    machine.start(60)
    machine.arrive(9, 14)
    for _ in range(30):
        machine.go_on(1)
        for worker_id in WORKERS:
            if machine.open:
                machine.feed(MigrationWanted("r0", worker_id, "to and fro"))
    machine.teardown()
    assert machine.router.statistics.num_migrations >= 2
    assert machine.router.statistics.num_failovers == 0
    assert len(machine.seen["r0"]) == 14
