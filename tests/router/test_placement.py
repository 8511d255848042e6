from __future__ import annotations

from dataclasses import replace

from router.config import RouterConfig
from router.events import WorkerDown, WorkerUp
from router.placement import Plan, Planner
from router.router import Router
from tests.router.values import CONFIG, arrived, make_router, peer, reported, stats

PROMPT = list(range(12))


def plan(router: Router, prompt: list[int] = PROMPT, max_tokens: int = 8, config: RouterConfig = CONFIG) -> Plan:
    links = arrived("r", prompt).links
    found = Planner(config, router.view).plan(links, len(prompt), max_tokens)
    assert found is not None
    return found


def test_requests_with_one_prefix_share_a_home_pair() -> None:
    router = make_router("p-0", "p-1", "p-2", "p-3", "d-0")
    first = plan(router)
    longer = plan(router, [*PROMPT, 99, 98, 97])
    assert len(first.home_worker_ids) == 2
    assert first.home_worker_ids == longer.home_worker_ids
    assert first.prefill.worker_id in first.home_worker_ids
    others = [plan(router, [100 + seed, *PROMPT]).home_worker_ids for seed in range(20)]
    assert len(set(others)) > 3


def test_the_worker_that_had_the_prefix_is_chosen_again() -> None:
    router = make_router("p-0", "p-1", "p-2", "d-0")
    effects = router.on(arrived("r", PROMPT), 0.0)
    first = router._in_flight["r"].attempt
    assert first is not None
    assert effects
    again = plan(router, [*PROMPT, 50, 51])
    assert again.prefill is first.plan.prefill
    assert again.num_predicted_cached_tokens == 12
    assert again.prefill_reason.startswith("affinity: 12 of 14 tokens cached")
    # A prompt that is all cached still computes its last token.
    assert plan(router).num_predicted_cached_tokens == 8


def test_the_other_home_takes_over_when_the_slo_is_threatened() -> None:
    router = make_router("p-0", "p-1", "d-0")
    router.on(arrived("r", PROMPT), 0.0)
    busy = router._in_flight["r"].attempt
    assert busy is not None
    for worker_id in ("p-0", "p-1"):
        router.on(reported(worker_id, stats=stats(prefill_s_per_token=1.0)), 0.0)
    other = plan(router)
    assert other.prefill is not busy.plan.prefill
    assert other.prefill_reason.startswith("load: ")


def test_decode_goes_where_the_room_is_and_counts_what_was_just_placed() -> None:
    router = make_router("p-0", "d-0", "d-1")
    chosen = []
    for index in range(4):
        router.on(arrived(f"r{index}", PROMPT), 0.0)
        attempt = router._in_flight[f"r{index}"].attempt
        assert attempt is not None
        chosen.append(attempt.plan.decoding_worker.worker_id)
    assert sorted(chosen) == ["d-0", "d-0", "d-1", "d-1"]
    router.on(reported("d-0", stats=stats(num_free_blocks=10)), 0.0)
    assert plan(router).decoding_worker.worker_id == "d-1"


def test_a_warm_link_is_preferred() -> None:
    router = make_router("p-0", "d-0", "d-1")
    router.on(reported("p-0", stats=stats(warm_links=("d-1",))), 0.0)
    assert plan(router).decoding_worker.worker_id == "d-1"
    router.on(WorkerDown("d-1", "1", "test"), 0.0)
    assert plan(router).decoding_worker.worker_id == "d-0"


def test_no_full_block_no_home() -> None:
    router = make_router("p-0", "p-1", "d-0")
    found = plan(router, [1, 2, 3])
    assert found.home_worker_ids == ()
    assert found.prefill_reason.startswith("no home: 3 tokens fill no hash block")


def test_served_whole_on_one_worker() -> None:
    colocated = replace(CONFIG, mode="colocated")
    router = make_router("p-0", "d-0", config=colocated)
    found = plan(router, config=colocated)
    assert (found.decode, found.decode_reason.split(":")[0]) == (None, "colocated")
    assert set(found.home_worker_ids) == {"p-0", "d-0"}  # any role serves
    router = make_router("p-0")
    assert plan(router).decode_reason == "no decode worker is up"
    router = make_router("d-0")
    found = plan(router)
    assert (found.prefill.worker_id, found.decode) == ("d-0", None)
    assert found.prefill_reason.startswith("no prefill worker is up; most room: 100")
    router = make_router("p-0", "d-0")
    assert plan(router, max_tokens=1).decode is None


def test_no_worker_no_plan() -> None:
    router = make_router()
    assert Planner(CONFIG, router.view).plan((), 4, 4) is None


def test_equal_views_plan_alike() -> None:
    one, two = make_router("p-0", "p-1", "p-2", "d-0"), make_router("p-2", "p-0")
    two.on(WorkerUp(peer("p-1")), 0.0)
    two.on(WorkerUp(peer("d-0")), 0.0)
    for seed in range(30):
        prompt = [seed, *PROMPT]
        assert plan(one, prompt).home_worker_ids == plan(two, prompt).home_worker_ids
