"""Queues in the Router: who is sent when, who leaves, who moves."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest

from protos.cost_model import CostModel
from protos.types import FinishReason
from router.config import RouterConfig
from router.events import AbortRequested, ClientCancelled, Deliver, Effect, Fail, Send, Tick, WorkerDown, WorkerUp
from router.policies.config import PolicyConfig, PolicyName
from router.router import Router
from router.sampling import Sampler
from tests.router.values import CONFIG, arrived, make_router, output, peer, reported, sends, stats

SECOND_PER_TOKEN = CostModel(0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0)
QUEUED = replace(CONFIG, dispatch_tokens=6, cost=SECOND_PER_TOKEN, ttft_slo_s=100.0)


def prompt(seed: int, num_tokens: int = 6) -> list[int]:
    return [100 * seed + i for i in range(num_tokens)]


def sent(effects: list[Effect]) -> list[tuple[str, str]]:
    return [(e.worker_id, submit.request_id) for e in effects if isinstance(e, Send) for submit in e.submits]


def plan_of(router: Router, request_id: str) -> object:
    in_flight = router._in_flight[request_id]
    plan = in_flight.queued or (in_flight.attempt and in_flight.attempt.plan)
    assert plan is not None
    return plan


def test_more_is_sent_when_a_prompt_is_prefilled_and_not_before() -> None:
    router = make_router("p-0", "d-0", config=QUEUED)
    assert sent(router.on(arrived("a", prompt(1)), 0.0)) == [("d-0", "a"), ("p-0", "a")]
    assert sent(router.on(arrived("b", prompt(2)), 1.0)) == []
    assert sent(router.on(arrived("c", prompt(3)), 2.0)) == []
    assert sent(router.on(Tick(), 2.5)) == []
    view = router.view.workers["p-0"]
    assert (view.num_pending_tokens, view.backlog_s(1.0), view.sent_s, len(view.queue)) == (18, 18.0, 6.0, 2)
    assert not router.view.workers["d-0"].placed_blocks.keys() & {"b", "c"}, "a queued request holds nothing"
    effects = router.on(reported("p-0", output("a", 0, 7)), 3.0)
    assert sent(effects) == [("d-0", "b"), ("p-0", "b")]
    assert router._in_flight["b"].attempt is not None
    assert router._in_flight["b"].attempt.queued_s == 2.0
    assert sent(router.on(reported("d-0", output("a", 1, 7, finish=FinishReason.LENGTH)), 4.0)) == []
    assert sent(router.on(ClientCancelled("b"), 5.0)) == [("d-0", "c"), ("p-0", "c")]


def test_more_is_sent_when_the_decode_worker_has_computed_the_prompt_itself() -> None:
    """The KV was lost on its way: the prefill worker forgets the request and reports no token of it."""
    router = make_router("p-0", "d-0", config=QUEUED)
    router.on(arrived("a", prompt(1)), 0.0)
    assert sent(router.on(arrived("b", prompt(2)), 1.0)) == []
    assert sent(router.on(reported("d-0", output("a", 0, 7)), 9.0)) == [("d-0", "b"), ("p-0", "b")]


def test_priority_goes_ahead_in_the_queue() -> None:
    router = make_router("p-0", "d-0", config=QUEUED)
    for name, priority in (("a", 0), ("b", 0), ("c", 1)):
        event = arrived(name, prompt(priority))
        router.on(replace(event, request=replace(event.request, priority=priority)), 0.0)
    assert sent(router.on(ClientCancelled("a"), 1.0)) == [("d-0", "c"), ("p-0", "c")]


@pytest.mark.parametrize("event", [ClientCancelled("b"), AbortRequested("b")])
def test_one_that_ends_in_the_queue_leaves_it(event: ClientCancelled | AbortRequested) -> None:
    router = make_router("p-0", "d-0", config=QUEUED)
    router.on(arrived("a", prompt(1)), 0.0)
    router.on(arrived("b", prompt(2)), 0.0)
    effects = router.on(event, 1.0)
    assert not sends(effects), "no worker has heard of it"
    assert [type(effect) for effect in effects] == ([Deliver] if isinstance(event, AbortRequested) else [])
    assert len(router.view.workers["p-0"].queue) == 0
    assert sent(router.on(ClientCancelled("a"), 2.0)) == []


def test_the_queue_of_a_lost_worker_is_placed_anew_and_no_attempt_is_counted() -> None:
    router = make_router("p-0", "d-0", config=QUEUED)
    for name in "abc":
        router.on(arrived(name, prompt(ord(name))), 0.0)
    effects = router.on(WorkerDown("p-0", "1", "test"), 40.0)
    # Only d-0 is left: it prefills what failed over, and what was queued goes on waiting for its credit.
    assert [pair for pair in sent(effects) if pair[1] != "a"] == []
    assert [router._in_flight[name].num_attempts for name in "abc"] == [2, 0, 0]
    assert not any(isinstance(effect, Fail) for effect in router.on(Tick(), 41.0))
    effects = router.on(WorkerDown("d-0", "1", "test"), 42.0)
    assert sent(effects) == []
    assert all(router._in_flight[name].waits_for_a_worker for name in "abc")
    assert not any(isinstance(effect, Fail) for effect in router.on(Tick(), 71.0)), "it waits since 42, not since 0"
    assert len(sent(router.on(WorkerUp(peer("p-1")), 71.5))) == 1
    assert len(router.view.workers["p-1"].queue) == 2


def test_who_decodes_is_chosen_when_it_is_sent() -> None:
    router = make_router("p-0", "d-0", config=replace(QUEUED, dispatch_tokens=1))
    router.on(arrived("a", prompt(1)), 0.0)
    router.on(arrived("b", prompt(2)), 0.0)
    router.on(WorkerDown("d-0", "1", "test"), 1.0)  # a starts anew, before b, and decodes where it prefills
    for worker_id in ("d-1", "d-2"):
        router.on(WorkerUp(peer(worker_id)), 1.0)
    router.on(reported("d-2", stats=stats()), 1.0)
    assert ("d-2", "b") in sent(router.on(ClientCancelled("a"), 2.0))


def test_a_refusal_counts_the_queue() -> None:
    router = make_router("p-0", "d-0", config=replace(QUEUED, ttft_slo_s=17.0))
    for name in "ab":
        router.on(arrived(name, prompt(ord(name))), 0.0)
    (refused,) = router.on(arrived("c", prompt(3)), 0.0)
    assert isinstance(refused, Fail)
    assert refused.message.startswith("the first token would come after 18.00 s, 17 s are allowed: 12 tokens")


def overloaded(**fields: object) -> tuple[Router, str, str]:
    """Two workers, of which one has it all: a's prefix is in its cache, and everybody shares it."""
    config = replace(QUEUED, rebalances=True, refuses_early=False, **fields)  # type: ignore[arg-type]
    router = make_router("p-0", "p-1", "d-0", config=config)
    ((_, _), (warm, _)) = sent(router.on(arrived("a", prompt(1, 12)), 0.0))
    return router, warm, "p-0" if warm == "p-1" else "p-1"


def test_queued_requests_move_when_they_would_be_late() -> None:
    router, warm, cold = overloaded(ttft_slo_s=20.0, policy=PolicyConfig("dual_map", has_slo_switch=False))
    for name in "bc":
        router.on(arrived(name, prompt(1, 12) + prompt(ord(name), 2)), 0.0)
    assert router.statistics.num_rebalanced == 0  # 12 + 2 + 2 s
    # Here after 12 + 2 + 2 + 8 s; 16 + 4 s there.
    effects = router.on(arrived("d", prompt(1, 12) + prompt(4, 8)), 0.0)
    assert router.statistics.num_rebalanced == 1
    assert (cold, "d") in sent(effects)
    plan = router._in_flight["d"].attempt.plan  # type: ignore[union-attr]
    assert plan.prefill_reason == f"rebalanced: TTFT 20.00 s, 24.00 s in the queue of {warm}"
    assert len(router.view.workers[warm].queue) == 2


def test_time_alone_can_make_a_queue_hot() -> None:
    router, warm, cold = overloaded(ttft_slo_s=20.0, policy=PolicyConfig("dual_map", has_slo_switch=False))
    router.on(arrived("b", prompt(1, 12) + prompt(2, 2)), 0.0)
    assert router.on(Tick(), 5.0) == []  # 5 + 12 + 2 s
    assert sent(router.on(Tick(), 5.95)) == []
    assert router.statistics.num_rebalanced == 0
    router.on(arrived("c", prompt(1, 12) + prompt(3, 2)), 6.0)
    assert router.statistics.num_rebalanced == 0
    # b: 7 + 14 s here and there, so it would be late in both; c: 1 + 16 s here, 1 + 14 s there.
    assert sent(router.on(Tick(), 7.0)) == [("d-0", "c"), (cold, "c")]
    assert len(router.view.workers[warm].queue) == 1


def test_off_nothing_moves() -> None:
    router, warm, _ = overloaded(ttft_slo_s=20.0, policy=PolicyConfig("dual_map", has_slo_switch=False))
    router._config = replace(router._config, rebalances=False)
    for name in "bcde":
        router.on(arrived(name, prompt(1, 12) + prompt(ord(name), 8)), 0.0)
    router.on(Tick(), 1.0)
    assert router.statistics.num_rebalanced == 0
    assert len(router.view.workers[warm].queue) == 4


@pytest.mark.parametrize("name", get_args(PolicyName))
def test_every_policy_places_and_does_so_again_alike(name: PolicyName) -> None:
    """With equal histories two routers choose alike, randomness included; and explaining changes no choice."""
    config = replace(CONFIG, policy=PolicyConfig(name), cost=SECOND_PER_TOKEN, ttft_slo_s=30.0, refuses_early=False)
    workers = [f"p-{i}" for i in range(5)]
    one, two = make_router(*workers, config=config), make_router(*reversed(workers), config=config)
    for number in range(40):
        event = arrived(f"r{number}", prompt(number % 7, 4 + number % 9))
        planned = one.planner.copy().plan(event.links, len(event.request.token_ids), 8)
        chosen = sent(one.on(event, 0.0))
        assert chosen == sent(two.on(event, 0.0))
        assert planned is not None
        assert chosen == [(planned.prefill.worker_id, f"r{number}")]
    assert one.view.num_pending_tokens == two.view.num_pending_tokens > 0


def test_a_pull_from_home_is_reckoned_with() -> None:
    """Away from home the worker computes what it cannot fetch, and is charged with that only."""
    config = replace(CONFIG, cost=SECOND_PER_TOKEN, refuses_early=False, ttft_slo_s=1.0, pull_s_per_token=0.01)
    config = replace(config, policy=PolicyConfig("home_pair", num_sampled=9, duplicate_cost=0.0))
    router = make_router(*(f"p-{i}" for i in range(4)), config=config)
    shared = prompt(1, 40)
    effects = [sends(router.on(arrived(f"r{i}", [*shared, 1000 + i]), 0.0)) for i in range(4)]
    placed = [worker_id for one in effects for worker_id in one]
    assert len(set(placed)) == 4
    assert [router.view.workers[worker_id].num_pending_tokens for worker_id in placed] == [41, 1, 1, 1]
    asked = [one[worker_id].submits[0].home_worker_ids for one, worker_id in zip(effects, placed, strict=True)]
    assert asked[0] == ()  # nobody has anything yet
    assert all(placed[0] in homes for homes in asked[1:])


def test_key_depth_adapts_where_it_is_asked_to() -> None:
    config = replace(CONFIG, adapts_key_depth=True, key_depth=replace(CONFIG.key_depth, window=8), refuses_early=False)
    router = make_router(*(f"p-{i}" for i in range(8)), config=config)
    chains = [arrived(f"r{i}", prompt(1, 4) + prompt(10 + i)).links for i in range(40)]
    assert len({router.view.home_worker_ids(links) for links in chains}) == 1, "one common block makes the key"
    for i in range(40):
        router.on(arrived(f"r{i}", prompt(1, 4) + prompt(10 + i)), 0.0)
    assert len({router.view.home_worker_ids(links) for links in chains}) > 3


def test_samples_are_distinct_repeatable_and_even() -> None:
    items = [f"p-{i}" for i in range(10)]
    one, two = Sampler(3), Sampler(3)
    counts = dict.fromkeys(items, 0)
    for _ in range(2000):
        chosen = one.sample(items, 3)
        assert chosen == two.sample(items, 3)
        assert len(set(chosen)) == 3
        for item in chosen:
            counts[item] += 1
    assert all(500 < count < 700 for count in counts.values()), counts
    assert sorted(one.sample(items, 99)) == items
    assert one.sample([], 2) == ()


@pytest.mark.parametrize(
    ("field", "value"), [("dispatch_tokens", -1), ("max_queue_wait_s", -0.5), ("queue_order", "newest")]
)
def test_odd_settings_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} must .*{value}"):
        RouterConfig(**{field: value})  # type: ignore[arg-type]
