"""Three workers that hand requests to each other, pull prefixes from each other and bring them home over a network
that loses, delays and repeats, with aborts at any time: every ledger balances after every event, every token is the
right one, every request that was not aborted ends, and in the end no block is in use."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from engine.config import HostTierConfig, PullConfig
from engine.events import (
    Event,
    PullRefused,
    PullRequested,
    ReturnOffered,
    TransferArrived,
    TransferClosed,
    TransferLost,
    TransferOffered,
    TransferRefused,
)
from protos.types import Abort, Handoff, Retarget, ServingMode
from tests.engine.fake_worker import PEER, FakeNetwork, FakeTransfer, FakeWorker, expected_output, generate, measured

NUM_WORKERS = 3
MAX_TOKENS = 6
WORKERS = st.integers(0, NUM_WORKERS - 1)
NUM_SHARED = st.sampled_from([0, 3, 8, 13, 16])  # tokens
HOMES = st.permutations([f"w{place}" for place in range(NUM_WORKERS)])
PULLS = PullConfig(s_per_token=0.5, deadline_s=60.0, max_served=2, max_returns=2, returns_answers=True)


def worker(name: str, host: HostTierConfig | None) -> FakeWorker:
    changes = {} if host is None else {"host": host}
    return measured(FakeWorker(num_blocks=10, worker_id=name, max_num_seqs=3, pulls=PULLS, **changes))


class HandoffMachine(RuleBasedStateMachine):
    HOST: HostTierConfig | None = None

    def __init__(self) -> None:
        super().__init__()
        self.workers = [worker(f"w{place}", self.HOST) for place in range(NUM_WORKERS)]
        self.network = FakeNetwork(self.workers)
        self.prompts: dict[str, list[int]] = {}
        self.sources: dict[str, FakeWorker] = {}
        self.local: dict[str, FakeWorker] = {}  # who was to run it alone, unless it was aborted
        self.delivered: list[tuple[FakeWorker, Event]] = []

    def deliver(self, worker: FakeWorker, event: Event) -> None:
        self.delivered.append((worker, event))
        self.network.note(worker, worker.on(event))

    def draw_transfer(self, data: st.DataObject) -> tuple[bytes, FakeTransfer] | None:
        under_way = [item for item in self.network.transfers.items() if not (item[1].closed and item[1].ended)]
        return data.draw(st.sampled_from(under_way)) if under_way else None

    # --- the router's doing ---------------------------------------------------------------------------------------

    @rule(
        worker=WORKERS,
        num_shared=NUM_SHARED,
        num_own=st.integers(1, 6),
        priority=st.integers(0, 1),
        homes=HOMES,
        num_homes=st.integers(0, 2),
    )
    def submit_local(
        self, worker: int, num_shared: int, num_own: int, priority: int, homes: list[str], num_homes: int
    ) -> None:
        name = self.new_prompt(num_shared, num_own)
        self.local[name] = self.workers[worker]
        self.submit(worker, name, priority, None, None, homes[:num_homes], returns_to=homes[0])

    @rule(source=WORKERS, away=st.integers(1, 2), num_shared=NUM_SHARED, num_own=st.integers(1, 6), homes=HOMES)
    def submit_handoff(self, source: int, away: int, num_shared: int, num_own: int, homes: list[str]) -> None:
        name = self.new_prompt(num_shared, num_own)
        transfer_id = self.new_transfer(self.workers[source], self.workers[(source + away) % NUM_WORKERS])
        self.sources[name] = self.workers[source]
        self.submit((source + away) % NUM_WORKERS, name, 0, None, transfer_id, returns_to=homes[0])
        self.submit(source, name, 0, transfer_id, None, homes[:2], returns_to=homes[0])

    @rule(worker=WORKERS, data=st.data())
    def abort(self, worker: int, data: st.DataObject) -> None:
        if self.prompts:
            name = data.draw(st.sampled_from(sorted(self.prompts)))
            if self.local.get(name) is self.workers[worker]:
                del self.local[name]
            self.deliver(self.workers[worker], Abort(name, 1))

    @rule(data=st.data(), away=st.integers(0, 2))
    def retarget(self, data: st.DataObject, away: int) -> None:
        if not self.sources:
            return
        name = data.draw(st.sampled_from(sorted(self.sources)))
        source = self.sources[name]
        if away == 0:
            self.deliver(source, Retarget(name, 1, None))
            return
        destination = (self.workers.index(source) + away) % NUM_WORKERS
        transfer_id = self.new_transfer(source, self.workers[destination])
        self.deliver(self.workers[destination], Abort(name, 1))
        self.submit(destination, name, 0, None, transfer_id)
        self.deliver(source, Retarget(name, 1, Handoff(transfer_id, PEER)))

    # --- the workers' -----------------------------------------------------------------------------------------------

    @rule(worker=WORKERS)
    def half_step(self, worker: int) -> None:
        each = self.workers[worker]
        self.network.note(each, each.begin_step() if each.output is None else each.end_step())

    # --- the network's ----------------------------------------------------------------------------------------------

    @rule(data=st.data())
    def carry_on(self, data: st.DataObject) -> None:
        drawn = self.draw_transfer(data)
        if drawn is not None:
            self.advance(*drawn)

    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        drawn = self.draw_transfer(data)
        if drawn is not None:
            self.end_source(*drawn)
            self.end_destination(*drawn)

    @rule()
    def tell_home(self) -> None:
        """That a prefix of its own was computed elsewhere. A home that is nobody here hears nothing."""
        if self.network.offers:
            source, offer = self.network.offers.pop()
            offered = ReturnOffered(source.ref.worker_id, offer.request_id, offer.attempt, offer.block_hashes)
            if (home := self.network.workers.get(offer.home_worker_id)) is not None:
                self.deliver(home, offered)

    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        """Any event that has come before."""
        if self.delivered:
            worker, event = data.draw(st.sampled_from(self.delivered[-20:]))
            self.network.note(worker, worker.on(event))

    def advance(self, transfer_id: bytes, transfer: FakeTransfer) -> bool:
        """The next thing that a sound network does with a transfer; False where it can only wait."""
        if transfer.asked is not None and not transfer.asked_source:
            transfer.asked_source = True
            asked, destination = transfer.asked, transfer.destination.ref
            event = PullRequested(
                transfer_id, destination, asked.request_id, asked.attempt, asked.block_hashes, asked.kind
            )
            self.network.note(transfer.source, transfer.source.on(event))
        elif transfer.pull_refusal is not None and not transfer.closed:
            transfer.closed = transfer.ended = True
            self.deliver(transfer.destination, PullRefused(transfer_id, transfer.pull_refusal))
        elif transfer.opened is not None and not transfer.offered and not transfer.closed:
            transfer.offered = True
            opened = transfer.opened
            self.deliver(
                transfer.destination,
                TransferOffered(transfer_id, opened.request_id, opened.attempt, opened.num_blocks),
            )
        elif transfer.refusal is not None and not transfer.closed:
            transfer.closed = True
            self.deliver(transfer.source, TransferRefused(transfer_id, transfer.refusal))
        elif transfer.source_aborted or transfer.destination_aborted:
            return self.end_source(transfer_id, transfer) | self.end_destination(transfer_id, transfer)
        elif transfer.commit is not None and transfer.grant is not None and not transfer.ended and not transfer.closed:
            transfer.copy()
            transfer.ended = True
            commit = transfer.commit
            self.deliver(
                transfer.destination,
                TransferArrived(transfer_id, commit.first_index, commit.token_ids, 1, 0.0, 0.0),
            )
        elif transfer.ended:
            return self.end_source(transfer_id, transfer)
        else:
            return False
        return True

    def end_source(self, transfer_id: bytes, transfer: FakeTransfer) -> bool:
        if transfer.closed or transfer.opened is None:
            return False
        transfer.closed = True
        self.deliver(transfer.source, TransferClosed(transfer_id))
        return True

    def end_destination(self, transfer_id: bytes, transfer: FakeTransfer) -> bool:
        if transfer.ended:
            return False
        transfer.ended = True
        self.deliver(transfer.destination, TransferLost(transfer_id, "lost"))
        return True

    # --- what must hold ---------------------------------------------------------------------------------------------

    @invariant()
    def ledgers_balance(self) -> None:
        for worker in self.workers:
            ledger = worker.core.ledger()
            assert ledger.balanced, ledger

    def teardown(self) -> None:
        num_moves = 0
        while self.move_anything():
            self.ledgers_balance()
            num_moves += 1
            assert num_moves < 5000, "livelock"
        for worker in self.workers:
            stats = worker.core.stats()
            assert (stats.num_running, stats.num_waiting) == (0, 0)
            assert (stats.num_held_blocks, stats.num_leased_blocks) == (0, 0)
            assert stats.ledger_balanced
        for name, prompt in self.prompts.items():
            expected = dict(enumerate(expected_output(prompt, MAX_TOKENS)))
            for worker in self.workers:
                first = worker.first_index(name)
                for index, token_id in enumerate(worker.tokens_of(name), start=first):
                    assert expected[index] == token_id
        for name, worker in self.local.items():
            assert worker.tokens_of(name) == expected_output(self.prompts[name], MAX_TOKENS)
            account = worker.last_output(name).account
            assert account is not None and account.mode is ServingMode.LOCAL
            if account.num_preemptions == 0:
                num_hits = account.num_cached_tokens + account.num_pulled_tokens
                assert num_hits + worker.num_computed[name] == len(self.prompts[name]) + MAX_TOKENS - 1

    def move_anything(self) -> bool:
        for worker in self.workers:
            if worker.output is None:
                self.network.note(worker, worker.begin_step())
            if worker.output is not None:
                self.network.note(worker, worker.end_step())
                return True
        if any(self.advance(*item) for item in list(self.network.transfers.items())):
            return True
        if self.network.offers:
            self.tell_home()
            return True
        if self.network.refusals:
            refused = self.network.refusals.pop()
            self.deliver(self.sources[refused.request_id], Retarget(refused.request_id, refused.attempt, None))
            return True
        # What is left waits for a source or a destination that has gone: deadlines end it on both sides.
        return any(
            self.end_source(*item) | self.end_destination(*item) for item in list(self.network.transfers.items())
        )

    # --- making things ----------------------------------------------------------------------------------------------

    def new_prompt(self, num_shared: int, num_own: int) -> str:
        name = f"r{len(self.prompts)}"
        self.prompts[name] = [*range(num_shared), *[100 + len(self.prompts)] * num_own]
        return name

    def new_transfer(self, source: FakeWorker, destination: FakeWorker) -> bytes:
        transfer_id = len(self.network.transfers).to_bytes(16)
        self.network.transfers[transfer_id] = FakeTransfer(source, destination)
        return transfer_id

    def submit(
        self,
        worker: int,
        name: str,
        priority: int,
        to: bytes | None,
        source: bytes | None,
        homes: Sequence[str] = (),
        returns_to: str = "",
    ) -> None:
        request = generate(
            name,
            self.prompts[name],
            max_tokens=MAX_TOKENS,
            priority=priority,
            to=to,
            source=source,
            homes=homes,
            returns_to=returns_to,
        )
        each = self.workers[worker]
        self.network.note(each, each.submit(request))


TestHandoffMachine = HandoffMachine.TestCase
TestHandoffMachine.settings = settings(max_examples=80, stateful_step_count=50)
