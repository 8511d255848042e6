"""A whole cluster under virtual time: the shipping Router in front of simulated workers. The live counterparts are
router/driver.py and cluster/supervisor.py. Decides nothing: it carries effects and lets time pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import replace
from itertools import count

from engine.kv_cache_manager import Ledger
from protos.types import FinishReason, PeerRef, Role, TransferStats, WorkerReport
from router.events import Deliver, Event, Fail, Reported, Send, Tick, WorkerDown, WorkerDraining, WorkerUp
from router.router import Router
from simulator.arrivals import FrontDoor
from simulator.clock import Clock
from simulator.elastic import ElasticPools
from simulator.host import SimulatedHost
from simulator.load import LoadProbe
from simulator.requests import SimRequest
from simulator.result import End, RequestRecord
from simulator.setup import Change, ChangeKind, Setup
from simulator.transfers import Links

MAX_SILENCE_S = 600.0  # longer than any deadline


class SimulatedCluster:
    """Invariant: `_hosts` are the workers that are alive, whether or not the router knows it yet; `_open` has the
    record of every request that has arrived and not ended."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.clock = Clock()
        self.links = Links(setup, self.clock)
        self.router = Router(setup.router, _transfer_ids())
        self.records: list[RequestRecord] = []
        self.load = LoadProbe(self.router.view)
        self.pools = ElasticPools(setup, self) if setup.autoscaler.enabled else None
        self._front_door = FrontDoor(setup)
        self._hosts: dict[str, SimulatedHost] = {}
        self._open: dict[str, RequestRecord] = {}
        self._lives = count()
        self._arrivals: Iterator[SimRequest] = iter(())
        self._is_all_in = False
        self._heard_at = 0.0  # the last token
        self._max_missed: int | None = None
        self._num_late = 0  # first tokens after the TTFT SLO, the warm-up's aside

    def run(self, requests: Iterable[SimRequest], max_missed: int | None = None) -> None:
        """Until every request has ended and everything is quiet, or more than max_missed of those after the warm-up
        have missed their TTFT SLO. ValueError where they are not in order of time."""
        self._max_missed = max_missed
        self._start_workers()
        for change in self.setup.changes:
            self.clock.at(change.at_s, self._change, change)
        for interval_s, action in (
            (self.setup.stats_interval_s, self._report_stats),
            (self.setup.tick_s, self._tick),
            (self.setup.load_interval_s, self._sample_load),
        ):
            self.clock.after(interval_s, self._repeat, interval_s, action)
        self._arrivals = iter(requests)
        self._await_next()
        self.clock.run()

    def ledgers(self) -> dict[str, Ledger]:
        """Of the workers that are alive."""
        return {worker_id: host.core.ledger() for worker_id, host in self._hosts.items()}

    @property
    def worker_ids(self) -> Set[str]:
        """Of those that are up."""
        return self._hosts.keys()

    @property
    def num_open_transfers(self) -> int:
        return sum(host.transfers.num_open for host in self._hosts.values())

    # --- clients ------------------------------------------------------------------------------------------------------

    def _await_next(self) -> None:
        request = next(self._arrivals, None)
        if request is None:
            self._is_all_in = True
        elif request.at_s < self.clock.now:
            raise ValueError(f"request {len(self.records)} comes at {request.at_s}, after one at {self.clock.now}")
        else:
            self.clock.at(request.at_s, self._arrive, request)

    def _arrive(self, request: SimRequest) -> None:
        arrived, record = self._front_door.open(request, len(self.records))
        self.records.append(record)
        self._open[arrived.request.request_id] = record
        self._feed(arrived)
        self._await_next()

    def _deliver(self, deliver: Deliver) -> None:
        record, now = self._open[deliver.request_id], self.clock.now
        self._heard_at = now
        if record.first_token_at is None and deliver.token_ids:
            record.first_token_at = now
            self._num_late += self._is_late(record)
        record.num_output_tokens += len(deliver.token_ids)
        if deliver.finish_reason is None:
            return
        del self._open[deliver.request_id]
        record.ended_at = now
        record.end = End.FINISHED if deliver.finish_reason is FinishReason.LENGTH else End.FAILED
        account = deliver.account
        assert account is not None
        record.num_cached_tokens = account.num_cached_tokens
        record.num_predicted_cached_tokens = account.num_predicted_cached_tokens
        record.num_attempts = account.num_attempts
        record.num_preemptions = account.num_preemptions
        record.num_kv_bytes = account.num_kv_bytes
        record.transfer_s, record.transfer_exposed_s = account.transfer_s, account.transfer_exposed_s
        record.prefill_worker, record.decode_worker = account.prefill_worker, account.decode_worker
        record.why = account.prefill_reason

    def _fail(self, fail: Fail) -> None:
        record = self._open.pop(fail.request_id)
        record.ended_at = self.clock.now
        record.end = End.FAILED if fail.refused_for is None else End.REFUSED
        record.why = fail.message

    # --- the router ---------------------------------------------------------------------------------------------------

    def _feed(self, event: Event) -> None:
        for effect in self.router.on(event, self.clock.now):
            if self.pools is not None and isinstance(effect, Deliver | Fail):
                self.pools.heard(effect)
            match effect:
                case Send():
                    self.clock.after(self.setup.message_s, self._take_over, effect)
                case Deliver():
                    self._deliver(effect)
                case Fail():
                    self._fail(effect)

    def _take_over(self, send: Send) -> None:
        if (host := self._hosts.get(send.worker_id)) is not None:
            host.take(send)

    def _report(self, host: SimulatedHost, report: WorkerReport) -> None:
        """From a worker; it takes its time."""
        reported = Reported(host.me.worker_id, host.me.incarnation, report)
        self.clock.after(self.setup.message_s, self._take_report, reported)

    def _take_report(self, reported: Reported) -> None:
        for output in reported.report.outputs:
            record = self._open.get(output.request_id)
            if output.account is not None and record is not None:
                record.num_pulled_tokens += output.account.num_pulled_tokens
                record.pull_s += output.account.pull_s
        self._feed(reported)

    # --- workers ------------------------------------------------------------------------------------------------------

    def _start_workers(self) -> None:
        for role in Role:
            for index in range(self.setup.num_of(role)):
                self.join(f"{role.value}-{index}", role)

    def _change(self, change: Change) -> None:
        if change.kind is ChangeKind.JOIN:
            self.join(change.worker_id, change.role)
        elif change.kind is ChangeKind.DRAIN:
            self.drain(change.worker_id)
        else:
            self._leave(change)

    def join(self, worker_id: str, role: Role) -> None:
        if worker_id in self._hosts:
            raise ValueError(f"worker {worker_id} is up when it is to join")
        me = PeerRef(worker_id, f"{worker_id}#{next(self._lives)}", worker_id, role)
        host = SimulatedHost(me, self.setup, self.links, self._report, self._hosts.get, self._drains)
        self._hosts[worker_id] = host
        self.load.joined(me, host.engine, self.clock.now)
        self._feed(WorkerUp(me))
        for each in self._hosts.values():  # the others have a link to it now
            self._report_stats_of(each)

    def drain(
        self, worker_id: str, timeout_s: float = math.inf, on_left: Callable[[bool], None] = lambda is_idle: None
    ) -> None:
        """It leaves when nothing needs it, or after timeout_s; on_left is told which. It may fail before."""
        host = self._hosts.get(worker_id)
        if host is None:
            raise ValueError(f"worker {worker_id} is not up when it is to drain")
        self._feed(WorkerDraining(worker_id, host.me.incarnation))
        for each in self._hosts.values():
            each.engine.cut()  # from now on its tokens are looked at
        self.clock.after(self.setup.tick_s, self._leave_when_idle, host, self.clock.now + timeout_s, on_left)

    def _drains(self) -> bool:
        return bool(self.router.view.draining)

    def _leave_when_idle(self, host: SimulatedHost, until: float, on_left: Callable[[bool], None]) -> None:
        worker_id = host.me.worker_id
        if self._hosts.get(worker_id) is not host:
            return
        view, ledger = self.router.view.find(worker_id, host.me.incarnation), host.engine.core.ledger()
        is_idle = view is None or not (self.router.num_needing(view) or ledger.held or ledger.leased)
        if is_idle or self.clock.now >= until:
            self._leave(Change(self.clock.now, ChangeKind.LEAVE, worker_id, host.me.role))
            on_left(is_idle)
        else:
            self.clock.after(self.setup.tick_s, self._leave_when_idle, host, until, on_left)

    def _leave(self, change: Change) -> None:
        worker_id, is_silent = change.worker_id, change.kind is ChangeKind.FAIL
        host = self._hosts.pop(worker_id, None)
        if host is None:
            raise ValueError(f"worker {worker_id} is not up when it is to go")
        host.stop()
        self.load.left(worker_id, self.clock.now)
        incarnation, reason = host.me.incarnation, "no heartbeat" if is_silent else "it left"
        silence_s = self.setup.transfer.silence_timeout_s if is_silent else 0.0
        self.clock.after(silence_s, self._lose_peer, incarnation, reason)
        down = WorkerDown(worker_id, incarnation, reason)
        self.clock.after(self.setup.lease_s(change), self._take_down, down)

    def _lose_peer(self, incarnation: str, reason: str) -> None:
        for host in self._hosts.values():
            host.transfers.lose_peer(incarnation, reason)

    def _take_down(self, down: WorkerDown) -> None:
        """The router takes it off, and tells the members."""
        self._feed(down)
        self.clock.after(self.setup.message_s, self._say_it_left, down.incarnation)

    def _say_it_left(self, incarnation: str) -> None:
        for host in self._hosts.values():
            host.transfers.source_left(incarnation)
            self._report_stats_of(host)

    # --- time ---------------------------------------------------------------------------------------------------------

    def _repeat(self, interval_s: float, action: Callable[[], None]) -> None:
        """While there is a request to wait for, and hope: a bug that loses one must not keep time going."""
        action()
        if not self._is_all_in or (self._open and self.clock.now < self._heard_at + MAX_SILENCE_S):
            self.clock.after(interval_s, self._repeat, interval_s, action)

    def _is_late(self, record: RequestRecord) -> bool:
        return record.number >= self.setup.num_warmup and self.clock.now - record.at_s > self.setup.router.ttft_slo_s

    def _give_up(self) -> None:
        waiting = (record for record in self._open.values() if record.first_token_at is None)
        if self._max_missed is not None and self._num_late + sum(map(self._is_late, waiting)) > self._max_missed:
            self.clock.stop()

    def _tick(self) -> None:
        self._give_up()
        self._feed(Tick())
        if self.pools is not None:
            self.pools.tick(self.router, self.clock.now)

    def _report_stats(self) -> None:
        for host in self._hosts.values():
            if host.engine.has_changed:
                self._report_stats_of(host)

    def _report_stats_of(self, host: SimulatedHost) -> None:
        """One that only decodes opens no links, nor does one that hands nothing over."""
        opens_links = self.setup.num_decode > 0 and host.me.role is Role.PREFILL
        others = self._hosts.items() if opens_links else ()  # a thousand of them take their time
        links = tuple(worker_id for worker_id, peer in others if peer.me.role is Role.DECODE)
        transfers = TransferStats(block_nbytes=self.setup.block_nbytes)
        stats = replace(host.engine.stats(), warm_links=links, transfers=transfers)
        self._report(host, WorkerReport(stats=stats))

    def _sample_load(self) -> None:
        self.load.sample(self.clock.now)


def _transfer_ids() -> Callable[[], bytes]:
    numbers = count()
    return lambda: next(numbers).to_bytes(16, "big")
