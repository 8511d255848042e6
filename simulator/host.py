"""A worker under virtual time: its engine and its transfers, wired to the router and to its peers. The live counterpart
is engine/worker_host.py. Passes events on; decides nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from itertools import count

from engine.events import (
    AbortTransfer,
    CommitTransfer,
    CopyBlocks,
    Effect,
    ExpectTransfer,
    GrantTransfer,
    OfferReturn,
    OpenTransfer,
    PullRefused,
    PullRequested,
    RefusePull,
    RefuseTransfer,
    RequestPull,
    ReturnOffered,
    SendBlocks,
    Submitted,
)
from engine.worker_core import WorkerCore
from protos.types import HandoffRefused, MigrationFailed, PeerRef, Role, TokenOutput, WorkerReport
from router.events import Send
from simulator.arrivals import HASH_KEY, MODEL
from simulator.horizons import Horizons
from simulator.host_link import HostLink
from simulator.setup import Setup
from simulator.transfers import Links, TransferAgent
from simulator.worker import SimulatedWorker

Report = Callable[["SimulatedHost", WorkerReport], None]
FindHost = Callable[[str], "SimulatedHost | None"]  # by worker id: one that is up


class SimulatedHost:
    """One life of one worker. Invariant: what it says to others reaches them after message_s, or not at all where they
    are gone by then."""

    def __init__(
        self,
        me: PeerRef,
        setup: Setup,
        links: Links,
        report: Report,
        find_host: FindHost,
        drains: Callable[[], bool],
    ) -> None:
        """drains: whether any worker does at present."""
        self.me = me
        self.started_at = links.clock.now
        self._links = links
        self._clock = links.clock
        self._message_s = setup.message_s
        self._report = report
        self._find_host = find_host
        pull_numbers = count()

        def new_pull_id() -> bytes:
            return blake2b(f"{next(pull_numbers)} {me.incarnation}".encode(), digest_size=16).digest()

        scheduler = setup.scheduler_of(me.role)
        self.core = WorkerCore(scheduler, setup.num_blocks, HASH_KEY, MODEL, me.worker_id, new_pull_id)
        # One that only prefills hands over after its first token: a step of its own must not make more.
        fast_forwards = setup.fast_forwards and (setup.is_colocated or me.role is Role.DECODE)
        horizons = Horizons(setup, drains) if fast_forwards else None
        cost = setup.hardware.cost
        self.engine = SimulatedWorker(self.core, scheduler, cost, self._clock, self._deliver, horizons)
        self.transfers = TransferAgent(me, links, self.engine.post)
        self.host_link = HostLink(self._clock, setup.host_link_nbytes_per_s, setup.block_nbytes, self.engine.post)

    def take(self, send: Send) -> None:
        """From the router, in this order."""
        self.engine.post(*map(Submitted, send.submits), *send.retargets, *send.migrates, *send.aborts)

    def stop(self) -> None:
        self.engine.stop()
        self._links.drop(self.me.incarnation)

    def _deliver(self, effects: Sequence[Effect]) -> None:
        outputs = tuple(effect for effect in effects if isinstance(effect, TokenOutput))
        refusals = tuple(effect for effect in effects if isinstance(effect, HandoffRefused))
        failed = tuple(effect for effect in effects if isinstance(effect, MigrationFailed))
        if outputs or refusals or failed:
            self._report(self, WorkerReport(outputs=outputs, refusals=refusals, failed_migrations=failed))
        if len(outputs) + len(refusals) + len(failed) < len(effects):
            for effect in effects:
                self._do(effect)

    def _do(self, effect: Effect) -> None:
        match effect:
            case OpenTransfer(handoff, request_id, attempt, num_blocks, kind):
                self.transfers.open(handoff.transfer_id, handoff.peer, request_id, attempt, num_blocks, kind)
            case SendBlocks(transfer_id, first_block, block_ids):
                self.transfers.send_blocks(transfer_id, first_block, block_ids)
            case CommitTransfer(transfer_id, first_index, token_ids):
                self.transfers.commit(transfer_id, first_index, token_ids)
            case AbortTransfer(transfer_id, reason):
                self.transfers.abort(transfer_id, reason)
            case ExpectTransfer(handoff, request_id, attempt):
                self.transfers.expect(handoff.transfer_id, handoff.peer, request_id, attempt, handoff.kind)
            case GrantTransfer(transfer_id, num_held_blocks, block_ids):
                self.transfers.grant(transfer_id, num_held_blocks, block_ids)
            case RefuseTransfer(transfer_id, reason):
                self.transfers.refuse(transfer_id, reason)
            case RequestPull():
                self._request_pull(effect)
            case RefusePull(pull_id, destination, reason):
                self._clock.after(self._message_s, self._refuse_pull, pull_id, destination, reason)
            case CopyBlocks():
                self.host_link.copy(effect)
            case OfferReturn(home_worker_id, request_id, attempt, block_hashes):
                offered = ReturnOffered(self.me.worker_id, request_id, attempt, block_hashes)
                self._clock.after(self._message_s, self._tell_home, home_worker_id, offered)

    # --- pulls and returns --------------------------------------------------------------------------------------------

    def _request_pull(self, pull: RequestPull) -> None:
        source = self._find_host(pull.source_worker_id)
        if source is None:
            self._clock.after(0.0, self.engine.post, PullRefused(pull.pull_id, "it is not there"))
            return
        self.transfers.expect(pull.pull_id, source.me, pull.request_id, pull.attempt, pull.kind)
        asked = PullRequested(pull.pull_id, self.me, pull.request_id, pull.attempt, pull.block_hashes, pull.kind)
        self._clock.after(self._message_s, source.asked_for_pull, asked)

    def asked_for_pull(self, asked: PullRequested) -> None:
        if self.me.incarnation in self._links.agents:
            self.engine.post(asked)

    def _tell_home(self, home_worker_id: str, offered: ReturnOffered) -> None:
        if (home := self._find_host(home_worker_id)) is not None:
            home.engine.post(offered)

    def _refuse_pull(self, pull_id: bytes, destination: PeerRef, reason: str) -> None:
        asker = self._find_host(destination.worker_id)
        if asker is not None and asker.me.incarnation == destination.incarnation:
            asker.transfers.forget(pull_id)
            asker.engine.post(PullRefused(pull_id, reason))
