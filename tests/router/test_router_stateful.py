"""A Router among workers that die, restart, refuse, and whose reports come late, twice and out of order: clients see
every token once and in order, and nothing is left behind."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import get_args

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from protos.cost_model import CostModel, PullCost, prefill_line
from protos.types import FinishReason, GenerateRequest, Role
from router.config import DecodePolicyName, RouterConfig
from router.events import (
    AbortRequested,
    ClientCancelled,
    Deliver,
    Effect,
    Event,
    Fail,
    Reported,
    Send,
    StopMatched,
    Tick,
    WorkerDown,
    WorkerDraining,
    WorkerUp,
)
from router.policies.config import PolicyConfig, PolicyName
from router.policy import by_pending
from router.queue_order import QueueOrderName
from router.router import Router
from tests.router.model_workers import ModelWorker, expected_output
from tests.router.values import BLOCK, Transfers, arrived, peer, reported, stats

WORKERS = ("p-0", "p-1", "d-0", "d-1")
CONFIG = RouterConfig(
    hash_block_size=BLOCK, block_size=BLOCK, max_attempts=6, num_virtual_nodes=8, ttft_slo_s=0.3, refuses_early=False
)
SECOND_PER_TOKEN = CostModel(0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0)
BY_AFFINITY = PolicyConfig("dual_map", has_slo_switch=False)  # leaves the most to rebalancing
configs = st.builds(
    partial(replace, CONFIG),
    dispatch_tokens=st.sampled_from((0, 1, 8)),
    queue_order=st.sampled_from(get_args(QueueOrderName)),
    max_queue_wait_s=st.sampled_from((0.05, 30.0)),
    rebalances=st.sampled_from((True, True, False)),
    adapts_key_depth=st.booleans(),
    cost=st.sampled_from((None, SECOND_PER_TOKEN)),
    ttft_slo_s=st.sampled_from((1.0, 20.0)),  # with the cost model and without, a few requests are in time
    pull_s_per_token=st.sampled_from((None, 0.0, 0.1)),
    decode_policy=st.sampled_from(get_args(DecodePolicyName)),
    max_local_prefill_tokens=st.sampled_from((0, 3, 12)),
    policy=st.sampled_from([PolicyConfig(name) for name in get_args(PolicyName)]) | st.just(BY_AFFINITY),
)
picks = st.integers(0, 1_000_000)


class RouterMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.config = CONFIG
        self.router = Router(CONFIG, Transfers())
        self.now = 0.0
        self.workers: dict[str, ModelWorker] = {}
        self.num_lives = 0
        self.num_requests = 0
        self.requests: dict[str, GenerateRequest] = {}
        self.seen: dict[str, list[int]] = {}
        self.open: set[str] = set()  # requests whose last word has not come
        self.on_the_way: list[Reported] = []

    # --- the shell ------------------------------------------------------------------------------------------------

    def feed(self, event: Event) -> list[Effect]:
        self.now += 0.01
        effects = self.router.on(event, self.now)
        for effect in effects:
            match effect:
                case Send():
                    assert not (effect.submits and effect.worker_id in self.router.view.draining)
                    self.workers[effect.worker_id].take(effect)  # only live workers are sent anything
                case Deliver():
                    self.deliver(effect)
                case Fail():
                    assert effect.code == "UNAVAILABLE", effect
                    self.open.remove(effect.request_id)
        return effects

    def deliver(self, effect: Deliver) -> None:
        assert effect.request_id in self.open, "nothing after the last word"
        seen = self.seen[effect.request_id]
        assert effect.first_index == len(seen)
        seen += effect.token_ids
        expected = expected_output(self.requests[effect.request_id])
        assert seen == expected[: len(seen)]
        if effect.finish_reason is None:
            assert effect.token_ids
            return
        assert effect.account is not None
        self.open.remove(effect.request_id)

    def check_whole(self, effects: list[Effect]) -> None:
        """An end that workers report comes with all tokens."""
        for effect in effects:
            if isinstance(effect, Deliver) and effect.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
                assert self.seen[effect.request_id] == expected_output(self.requests[effect.request_id])

    # --- what happens ---------------------------------------------------------------------------------------------

    @initialize(num_up=st.integers(0, 4), config=configs)
    def start(self, num_up: int, config: RouterConfig) -> None:
        self.config = config
        self.router = Router(config, Transfers())
        for worker_id in WORKERS[:num_up]:
            self.start_worker(worker_id)

    @rule(
        prompt=st.lists(st.integers(0, 3), min_size=1, max_size=12),
        max_tokens=st.integers(1, 9),
        priority=st.sampled_from((0, 0, 1)),
    )
    def arrive(self, prompt: list[int], max_tokens: int, priority: int) -> None:
        self.num_requests += 1
        event = arrived(f"r{self.num_requests}", prompt, max_tokens)
        event = replace(event, request=replace(event.request, priority=priority))
        self.requests[event.request.request_id] = event.request
        self.seen[event.request.request_id] = []
        self.open.add(event.request.request_id)
        self.feed(event)

    @rule(prefix=st.lists(st.integers(0, 3), min_size=4, max_size=8), num=st.integers(2, 7))
    def arrive_together(self, prefix: list[int], num: int) -> None:
        """One prefix, more than its worker has credit for."""
        for index in range(num):
            self.arrive([*prefix, index, index, index, index], 3, 0)

    @rule(worker_id=st.sampled_from(WORKERS), pull=st.sampled_from((None, PullCost(0.01))), fits=st.booleans())
    def start_worker(self, worker_id: str, pull: PullCost | None = None, fits: bool = False) -> None:
        if worker_id not in self.workers:
            self.num_lives += 1
            self.workers[worker_id] = ModelWorker(peer(worker_id, str(self.num_lives)))
            self.feed(WorkerUp(self.workers[worker_id].ref))
            fitted = prefill_line(0.1, 0.05, 0.001) if fits else None
            measured = stats(prefill_s_per_token=0.05, pull_cost=pull, prefill_cost=fitted)
            self.feed(reported(worker_id, incarnation=str(self.num_lives), stats=measured))

    @precondition(lambda self: self.workers)
    @rule(pick=picks)
    def kill(self, pick: int) -> None:
        """Its reports on the way still come, before or after the router hears of it."""
        worker = self.workers.pop(sorted(self.workers)[pick % len(self.workers)])
        self.feed(WorkerDown(worker.ref.worker_id, worker.ref.incarnation, "killed"))

    @precondition(lambda self: self.workers)
    @rule(pick=picks)
    def drain(self, pick: int) -> None:
        worker = self.workers[sorted(self.workers)[pick % len(self.workers)]]
        self.feed(WorkerDraining(worker.ref.worker_id, worker.ref.incarnation))

    @rule()
    def leave(self) -> None:
        """Those that drain go as soon as nothing needs them, and that costs no request an attempt."""
        for worker_id, view in list(self.router.view.draining.items()):
            if self.router.num_needing(view) == 0:
                num_failovers = self.router.statistics.num_failovers
                self.kill(sorted(self.workers).index(worker_id))
                assert self.router.statistics.num_failovers == num_failovers

    @rule(pick=picks, num_tokens=st.integers(1, 4))
    def generate(self, pick: int, num_tokens: int) -> None:
        jobs = [(w, r) for w in self.workers.values() for r in w.jobs]
        if jobs:
            worker, request_id = jobs[pick % len(jobs)]
            output = worker.generate(request_id, num_tokens)
            if output is not None:
                self.on_the_way.append(reported(worker.ref.worker_id, output, incarnation=worker.ref.incarnation))

    @rule(pick=picks)
    def transfer(self, pick: int) -> None:
        """The KV of one waiting job arrives, where its source has committed; or is lost, where the source is gone."""
        waiting = [(w, r) for w in self.workers.values() for r, job in w.jobs.items() if job.awaits_kv]
        if not waiting:
            return
        worker, request_id = waiting[pick % len(waiting)]
        handoff = worker.jobs[request_id].request.handoff_from
        assert handoff is not None
        attempt = worker.jobs[request_id].request.attempt
        source = self.workers.get(handoff.peer.worker_id)
        if source is None or source.ref != handoff.peer:
            worker.receive_kv(request_id, attempt, arrived=False)
            return
        job = source.jobs.get(request_id)
        is_meant = (
            job is not None
            and job.request.handoff_to is not None
            and job.request.handoff_to.transfer_id == handoff.transfer_id
        )
        if job is not None and is_meant and not job.awaits_retarget:
            if job.next_index > job.request.num_committed_tokens:
                worker.receive_kv(request_id, attempt, arrived=True)
                job.has_handed_off = True
                del source.jobs[request_id]
            elif pick % 3 == 0:  # lost on the way, the source living: the destination computes it
                worker.receive_kv(request_id, attempt, arrived=False)
                del source.jobs[request_id]

    @rule(pick=picks)
    def refuse(self, pick: int) -> None:
        jobs = [(w, r) for w in self.workers.values() if w.ref.role is Role.PREFILL for r in w.jobs]
        if jobs:
            worker, request_id = jobs[pick % len(jobs)]
            refusal = worker.refuse(request_id)
            if refusal is not None:
                event = reported(worker.ref.worker_id, incarnation=worker.ref.incarnation, refusals=(refusal,))
                self.on_the_way.append(event)

    @precondition(lambda self: self.on_the_way)
    @rule(pick=picks, again=st.booleans())
    def report(self, pick: int, again: bool) -> None:
        index = pick % len(self.on_the_way)
        event = self.on_the_way[index]
        if not (again and event.report.outputs):  # outputs may come twice
            self.on_the_way.pop(index)
        self.check_whole(self.feed(event))

    @precondition(lambda self: self.open)
    @rule(pick=picks, how=st.sampled_from((ClientCancelled, AbortRequested, StopMatched)))
    def client_ends(self, pick: int, how: type[ClientCancelled | AbortRequested | StopMatched]) -> None:
        if pick % 4:
            return  # seldom, so that most requests run on
        request_id = sorted(self.open)[pick % len(self.open)]
        self.feed(how(request_id))
        self.open.discard(request_id)

    @rule(seconds=st.sampled_from((0.1, 1.0, 40.0)))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.feed(Tick())

    # --- what holds -----------------------------------------------------------------------------------------------

    @invariant()
    def the_router_holds_the_open_requests_and_no_others(self) -> None:
        assert set(self.router._in_flight) == self.open
        assert len(self.router._by_client_id) == len(self.open)
        for view in self.router.view.workers.values():
            assert set(view.pending_tokens) == set(view.pending_us) <= self.open
            assert set(view.placed_blocks) == set(view.decoding) <= self.open
            for request_id, decoding in view.decoding.items():
                assert decoding is self.router._in_flight[request_id]

    @invariant()
    def each_request_runs_or_is_queued_once_or_waits(self) -> None:
        view = self.router.view
        queued = {
            entry.request_id: worker
            for worker in view.workers.values()
            for entry in worker.queue.in_order(self.now, 0.0)
        }
        assert len(queued) == sum(len(worker.queue) for worker in view.workers.values())
        assert set(self.router._queues._members) == set(queued)
        for request_id, in_flight in self.router._in_flight.items():
            assert (in_flight.attempt is None) or (in_flight.queued is None)
            assert (in_flight.queued.prefill if in_flight.queued else None) is queued.get(request_id)
            assert not (in_flight.waits_for_a_worker and any(map(view.takes_work, view.workers)))

    @invariant()
    def the_sums_are_right(self) -> None:
        view = self.router.view
        prefill = [view.workers[worker_id] for worker_id in view.prefill_worker_ids]
        assert view.prefill_workers() == sorted(prefill, key=by_pending)
        assert view.num_pending_tokens == sum(worker.num_pending_tokens for worker in prefill)
        for worker in view.workers.values():
            entries = worker.queue.in_order(self.now, 0.0)
            assert worker.queue.num_tokens == sum(entry.num_tokens for entry in entries)
            assert abs(worker.queue.work_s - sum(entry.prefill_s for entry in entries)) < 1e-9
            assert worker.pending_tokens.total == sum(worker.pending_tokens.values())

    @invariant()
    def the_credit_is_used_and_overdrawn_by_one_request_at_most(self) -> None:
        limit = self.config.dispatch_tokens
        for worker in self.router.view.workers.values():
            sent = worker.pending_tokens
            if limit == 0:
                assert len(worker.queue) == 0
                continue
            assert len(worker.queue) == 0 or sent.total >= limit
            assert not sent or sent.total - max(sent.values()) < limit

    @invariant()
    def workers_work_for_current_attempts_only(self) -> None:
        for worker in self.workers.values():
            for request_id, job in worker.jobs.items():
                attempt = self.router._in_flight[request_id].attempt
                assert attempt is not None
                assert attempt.number == job.request.attempt
                assert worker.ref in [view.ref for view in attempt.workers]

    def teardown(self) -> None:
        """With every worker up and nobody dying, every request ends."""
        for worker_id in list(self.router.view.draining):
            self.kill(sorted(self.workers).index(worker_id))
        for worker_id in WORKERS:
            self.start_worker(worker_id)
        for _ in range(2000):
            if not self.open:
                break
            for pick in range(3 * sum(len(worker.jobs) for worker in self.workers.values())):
                self.generate(pick, 3)
                self.transfer(pick)
            while self.on_the_way:
                self.report(0, again=False)
        assert not self.open
        self.the_router_holds_the_open_requests_and_no_others()
        for view in self.router.view.workers.values():
            assert not view.pending_tokens
            assert not view.placed_blocks
            assert not view.decoding
            assert view.backlog_s(1.0) == 0
        assert not self.router._queues._members
        assert not any(worker.jobs for worker in self.workers.values()), "every worker was told"


TestRouter = RouterMachine.TestCase
TestRouter.settings = settings(max_examples=70, stateful_step_count=60)
