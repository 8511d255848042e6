"""ExplainRoute names what Generate then chooses, and leaves no trace."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import inference_pb2 as pb
from protos.cost_model import PullCost
from router.explain import Explanation, explain
from router.policies.config import PolicyConfig
from router.responses import explain_response
from router.router import Router
from tests.router.answers import sampling
from tests.router.conftest import with_fields
from tests.router.values import CONFIG, arrived, make_router, reported, sends, stats

WORKERS = ("p-0", "p-1", "p-2", "d-0", "d-1")


def explained(router: Router, prompt: list[int], max_tokens: int = 8) -> Explanation:
    event = arrived("x", prompt, max_tokens)
    return explain(CONFIG, router.view, router.planner, event.links, len(prompt), max_tokens)


def snapshot(router: Router) -> object:
    """All that a Router knows and decides by."""
    workers = {
        worker_id: (
            view.stats,
            list(view.prefixes._links),
            dict(view.pending_tokens),
            dict(view.placed_blocks),
        )
        for worker_id, view in router.view.workers.items()
    }
    order = [view.worker_id for view in (*router.view.prefill_workers(), *router.view.decode_workers())]
    statistics = {name: getattr(router.statistics, name) for name in type(router.statistics).__slots__}
    return workers, order, statistics, list(router._in_flight), deepcopy(router._by_client_id)


prompts = st.lists(st.integers(0, 3), min_size=1, max_size=24)
loads = st.tuples(st.integers(0, 100), st.sampled_from([0.0, 0.001, 0.5]))


@given(
    st.lists(prompts, max_size=6),
    st.lists(loads, min_size=5, max_size=5),
    st.sets(st.sampled_from(WORKERS)),
    prompts,
    st.sampled_from([1, 8]),
)
def test_it_names_what_generate_then_chooses(
    earlier: list[list[int]], loads: list[tuple[int, float]], up: set[str], prompt: list[int], max_tokens: int
) -> None:
    router = make_router(*sorted(up))
    for worker_id, (num_free, s_per_token) in zip(WORKERS, loads, strict=True):
        links = {"warm_links": ("d-0",) if s_per_token else ("d-0", "d-1")}
        router.on(
            reported(worker_id, stats=stats(num_free_blocks=num_free, prefill_s_per_token=s_per_token, **links)), 0
        )
    for number, one in enumerate(earlier):
        router.on(arrived(f"r{number}", one), 0.0)
    before = snapshot(router)
    route = explained(router, prompt, max_tokens)
    assert snapshot(router) == before
    chosen = {
        worker_id: send.submits[0]
        for worker_id, send in sends(router.on(arrived("x", prompt, max_tokens), 0.0)).items()
    }
    assert set(chosen) == {route.prefill_worker, route.decode_worker} - {""}
    assert not route.prefill_reason.startswith("refused") or not chosen
    if chosen:
        in_flight = router._in_flight["x"]
        assert in_flight.attempt is not None
        plan = in_flight.attempt.plan
        assert (plan.prefill_reason, plan.decode_reason) == (route.prefill_reason, route.decode_reason)
        assert plan.home_worker_ids in ((), route.home_worker_ids)


def test_every_worker_is_a_candidate_with_its_estimates() -> None:
    router = make_router("p-0", "p-1", "d-0")
    for worker_id in ("p-0", "p-1"):
        router.on(reported(worker_id, stats=stats(prefill_s_per_token=0.5)), 0.0)
    prompt = list(range(9))
    effects = router.on(arrived("first", prompt), 0.0)
    warm = next(worker_id for worker_id in sends(effects) if worker_id.startswith("p"))
    route = explained(router, prompt)
    assert {one.candidate.worker_id for one in route.prefill_candidates} == {"p-0", "p-1"} == set(route.home_worker_ids)
    options = (*route.prefill_candidates, *route.decode_candidates)
    by_id = {one.candidate.worker_id: one.candidate for one in options}
    assert (by_id[warm].num_cached_tokens, by_id[warm].num_pending_tokens) == (8, 9)
    assert by_id["d-0"].num_free_blocks == 97  # 9 tokens, 3 blocks, placed
    answer = explain_response(route, len(prompt), 7)
    estimates = {one.worker_id: one.ttft_estimate_s for one in answer.prefill_candidates}
    assert estimates.pop(warm) == (9 + 9 - 8) * 0.5
    assert list(estimates.values()) == [9 * 0.5]


def test_it_tells_what_would_be_pulled_and_who_waits_there() -> None:
    config = replace(CONFIG, policy=PolicyConfig("round_robin"), dispatch_tokens=1, refuses_early=False)
    router = make_router("p-0", "p-1", "d-0", config=config)
    for worker_id in ("p-0", "p-1"):
        router.on(reported(worker_id, stats=stats(prefill_s_per_token=1.0, pull_cost=PullCost(0.25))), 0.0)
    shared = list(range(8))
    for number in range(5):
        router.on(arrived(f"r{number}", [*(shared if number == 0 else ()), 50 + number]), 0.0)
    event = arrived("x", [*shared, 99])
    route = explain(config, router.view, router.planner, event.links, 9, 8)
    by_id = {one.candidate.worker_id: one for one in route.prefill_candidates}
    held = {worker_id: one.candidate.num_cached_tokens for worker_id, one in by_id.items()}
    [cold] = [worker_id for worker_id, num_tokens in held.items() if num_tokens == 0]
    assert by_id[cold].num_pulled_tokens == 8
    assert by_id[cold].ttft_s == by_id[cold].candidate.ttft_s - 8 * (1.0 - 0.25)
    assert sorted(one.num_queued for one in by_id.values()) == [1, 2]
    chosen = by_id[route.prefill_worker]
    assert route.prefill_reason.endswith(f"; queued, {chosen.num_queued} there before")
    router.on(event, 0.0)
    queued = router._in_flight["x"].queued
    assert queued is not None and queued.prefill_reason == route.prefill_reason


def test_no_worker_is_up() -> None:
    route = explained(make_router(), [1, 2, 3])
    assert (route.prefill_worker, route.decode_worker) == ("", "")
    assert route.prefill_reason == "no worker is up; the request would wait 30 s for one"


# --- over gRPC ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["disaggregated", "colocated"])
async def test_the_rpc_agrees_with_generate(launch: Any, mode: str) -> None:
    service = await launch("p-0", "p-1", "d-0", "d-1", config=with_fields(mode=mode))
    request = pb.GenerateRequest(text="abcdefghijk", sampling_params=sampling(max_tokens=4))
    for _ in range(2):
        route = await service.inference.ExplainRoute(request, timeout=10)
        assert not route.decode_worker or mode == "disaggregated"
        (response,) = await service.generate(text=request.text, sampling_params=request.sampling_params)
        placement = response.complete.placement
        assert route.prompt_tokens == response.complete.prompt_tokens == 11
        assert (route.prefill_worker, route.prefill_reason) == (placement.prefill_worker, placement.prefill_reason)
        assert (route.decode_worker or route.prefill_worker) == placement.decode_worker
        assert route.decode_reason == placement.decode_reason
    (warm,) = [one for one in route.prefill_candidates if one.worker_id == route.prefill_worker]
    assert (warm.num_cached_tokens, warm.is_home) == (8, True)
    assert service.server._driver.router.statistics.num_finished == 2  # explaining is not a request


async def test_it_refuses_what_generate_refuses(launch: Any) -> None:
    service = await launch("p-0", "d-0")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await service.inference.ExplainRoute(pb.GenerateRequest(text=""), timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    cold = await launch()
    with pytest.raises(grpc.aio.AioRpcError, match="no workers are configured yet"):
        await cold.inference.ExplainRoute(pb.GenerateRequest(text="a"), timeout=10)


async def test_server_info(launch: Any) -> None:
    service = await launch("p-0", "d-0", config=with_fields(max_in_flight=77, ttft_slo_s=2.5))
    first = await service.inference.GetServerInfo(pb.GetServerInfoRequest(), timeout=10)
    assert (first.mode, first.max_model_len, first.max_in_flight) == ("disaggregated", 200, 77)
    assert (first.max_stop_strings, first.max_stop_len, first.ttft_slo_s) == (16, 256, 2.5)
    assert first.max_message_bytes == 8 * 1024 * 1024
    second = await service.inference.GetServerInfo(pb.GetServerInfoRequest(), timeout=10)
    assert second.uptime_s > first.uptime_s > 0
