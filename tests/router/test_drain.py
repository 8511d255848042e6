"""A worker that drains, as the Router sees it: nothing new goes there, what waits for it goes elsewhere, what runs
there goes on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from protos.cost_model import CostModel, PullCost
from protos.types import FinishReason, HandoffRefused, WorkerAccount
from router.config import RouterConfig
from router.events import Effect, Event, Fail, Send, Tick, WorkerDown, WorkerDraining, WorkerUp
from router.policies.config import PolicyConfig
from router.router import Router
from tests.router.values import CONFIG, arrived, make_router, output, peer, reported, stats

SECOND_PER_TOKEN = CostModel(0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0)
QUEUED = replace(CONFIG, dispatch_tokens=6, cost=SECOND_PER_TOKEN, ttft_slo_s=100.0, refuses_early=False)
PROMPT = [1, 2, 3, 4, 5, 6]


def sent(effects: list[Effect]) -> list[tuple[str, str]]:
    return [(e.worker_id, submit.request_id) for e in effects if isinstance(e, Send) for submit in e.submits]


def drain(router: Router, worker_id: str, now: float = 1.0) -> list[Effect]:
    return router.on(WorkerDraining(worker_id, "1"), now)


def num_needing(router: Router, worker_id: str) -> int:
    return router.num_needing(router.view.workers[worker_id])


@pytest.mark.parametrize("policy", ["home_pair", "dual_map", "round_robin", "least_loaded", "min_ttft", "random"])
@pytest.mark.parametrize("decode_policy", ["most_free_blocks", "peak_room", "held_room"])
def test_nothing_new_goes_there(policy: str, decode_policy: str) -> None:
    config = replace(CONFIG, policy=PolicyConfig(policy), decode_policy=decode_policy)  # type: ignore[arg-type]
    router = make_router("p-0", "p-1", "d-0", "d-1", config=config)
    for number in range(8):
        router.on(arrived(f"warm{number}", [number, *PROMPT]), 0.0)
    drain(router, "p-1")
    drain(router, "d-1")
    for number in range(24):  # the warm ones' next turns among them
        effects = router.on(arrived(f"r{number}", [number, *PROMPT, 7, 8]), 2.0)
        assert {worker_id for worker_id, _ in sent(effects)} == {"p-0", "d-0"}
    # What it reports, and time, change nothing of that.
    router.on(reported("p-1", stats=stats()), 3.0)
    router.on(Tick(), 4.0)
    assert [view.worker_id for view in router.view.prefill_workers()] == router.view.prefill_worker_ids == ["p-0"]
    assert [view.worker_id for view in router.view.decode_workers()] == ["d-0"]


def test_what_waits_for_it_goes_elsewhere_and_counts_no_attempt() -> None:
    router = make_router("p-0", "d-0", config=QUEUED)
    for name in "abc":
        router.on(arrived(name, PROMPT), 0.0)
    router.on(WorkerUp(peer("p-1")), 0.5)
    effects = drain(router, "p-0")
    assert [pair for pair in sent(effects) if pair[0] == "p-1"] == [("p-1", "b")]
    assert len(router.view.workers["p-1"].queue) == 1
    assert [router._in_flight[name].num_attempts for name in "abc"] == [1, 1, 0]
    assert num_needing(router, "p-0") == 1, "a was sent, and goes on"


def test_what_runs_there_ends_there() -> None:
    router = make_router("p-0", "p-1", "d-0", "d-1")
    effects = router.on(arrived("r", PROMPT), 0.0)
    prefill, decode = (next(w for w, _ in sent(effects) if w[0] == kind) for kind in "pd")
    assert drain(router, prefill) == drain(router, decode) == []
    assert drain(router, decode) == [], "said again, nothing happens"
    assert num_needing(router, prefill) == num_needing(router, decode) == 1
    router.on(reported(prefill, output("r", 0, 7, account=WorkerAccount())), 2.0)
    assert num_needing(router, prefill) == 1, "its transfer is under way"
    router.on(reported(decode, output("r", 1, 8)), 3.0)
    assert (num_needing(router, prefill), num_needing(router, decode)) == (0, 1)
    # It may leave, and nothing is lost with it.
    assert router.on(WorkerDown(prefill, "1", "it has left"), 3.5) == []
    router.on(reported(decode, output("r", 2, 9, finish=FinishReason.LENGTH)), 4.0)
    assert num_needing(router, decode) == 0
    assert (router.statistics.num_finished, router.statistics.num_failovers) == (1, 0)


def test_a_refused_handoff_does_not_go_there() -> None:
    router = make_router("p-0", "d-0", "d-1")
    (decode,) = (worker_id for worker_id, _ in sent(router.on(arrived("r", PROMPT), 0.0)) if worker_id != "p-0")
    drain(router, "d-1" if decode == "d-0" else "d-0")
    effects = router.on(reported("p-0", refusals=(HandoffRefused("r", 1, "full"),)), 1.0)
    assert sent(effects) == []
    (retarget,) = (retarget for effect in effects if isinstance(effect, Send) for retarget in effect.retargets)
    assert retarget.handoff_to is None, "it decodes where it was prefilled"


def test_who_waits_for_a_worker_waits_for_another_one() -> None:
    router = make_router("d-0")
    drain(router, "d-0")
    assert router.on(arrived("r", PROMPT), 1.0) == []
    assert sent(router.on(WorkerUp(peer("p-0")), 2.0)) == [("p-0", "r")]


def test_the_others_pull_from_it_what_they_lack() -> None:
    config = replace(CONFIG, policy=PolicyConfig("home_pair"))
    router = make_router("p-0", "p-1", "p-2", config=config)
    pulls = stats(pull_cost=PullCost(1e-6), prefill_s_per_token=1.0)
    for worker_id in ("p-0", "p-1", "p-2"):
        router.on(reported(worker_id, stats=pulls), 0.0)
    prompt = [*range(41)]
    ((home, _),) = sent(router.on(arrived("first", prompt), 0.0))
    router.on(reported(home, output("first", 0, 7, finish=FinishReason.STOP)), 1.0)
    drain(router, home, 2.0)
    ((worker_id, _),) = sent(effects := router.on(arrived("second", prompt), 3.0))
    assert worker_id != home
    (submit,) = (submit for effect in effects if isinstance(effect, Send) for submit in effect.submits)
    assert submit.home_worker_ids[0] == home
    plan = router._in_flight["second"].attempt.plan  # type: ignore[union-attr]
    assert (plan.num_predicted_pulled_tokens, plan.num_prefill_tokens) == (40, 1)
    router.on(WorkerDown(home, "1", "it has left"), 4.0)
    (submit,) = (
        submit for e in router.on(arrived("third", prompt), 5.0) if isinstance(e, Send) for submit in e.submits
    )
    assert home not in submit.home_worker_ids


def test_an_earlier_life_does_not_drain() -> None:
    router = make_router("p-0", "p-1")
    event: Event = WorkerDraining("p-0", "an earlier one")
    assert router.on(event, 1.0) == []
    assert router.view.prefill_worker_ids == ["p-0", "p-1"]
    drain(router, "p-0")
    router.on(WorkerUp(peer("p-0", "2")), 2.0)
    assert router.view.prefill_worker_ids == ["p-0", "p-1"], "its successor takes work"
    assert not any(isinstance(effect, Fail) for effect in router.on(Tick(), 3.0))


def test_the_defaults_drain_too() -> None:
    router = make_router("p-0", "p-1", "d-0", config=RouterConfig(hash_block_size=4, block_size=4))
    drain(router, "p-0")
    assert {worker_id for worker_id, _ in sent(router.on(arrived("r", PROMPT), 1.0))} == {"p-1", "d-0"}
