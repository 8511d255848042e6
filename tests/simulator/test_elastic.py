"""Pools that change by themselves: the shipping autoscaler in a simulated cluster."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.types import Role
from router.autoscaler import AutoscalerConfig, PoolLimits
from simulator.requests import SimRequest
from simulator.result import End, Result
from simulator.run import simulate
from simulator.setup import Change, ChangeKind, Setup
from tests.simulator.values import HARDWARE, request, setup, workloads

QUICK = AutoscalerConfig(
    enabled=True,
    prefill=PoolLimits(1, 4, max_queue=0.3),
    decode=PoolLimits(1, 4),
    window_s=10.0,
    grow_after_s=5.0,
    shrink_after_s=15.0,
    cool_down_s=10.0,
    changes_roles=True,
)


def elastic(autoscaler: AutoscalerConfig = QUICK, **changes: Any) -> Setup:
    values: dict[str, Any] = {"num_prefill": 1, "worker_start_s": 7.0, "worker_drain_timeout_s": 5.0, "hardware": SLOW}
    values |= changes
    return setup(autoscaler=autoscaler, ttft_slo_s=1.0, **values)


def requests(*phases: tuple[float, float], num_blocks: int = 8, num_output_tokens: int = 2) -> list[SimRequest]:
    """Each phase: seconds and requests/s. Prompts share nothing."""
    at_s, found = 0.0, list[SimRequest]()
    for duration_s, rate in phases:
        until = at_s + duration_s
        while at_s < until:
            first = 100 * len(found)
            found.append(request(at_s, tuple(range(first, first + num_blocks)), num_output_tokens))
            at_s += 1 / rate
    return found


# A prompt of 8 blocks takes two steps, 0.2 s: one worker prefills 5 in a second.
SLOW = replace(HARDWARE, cost=replace(HARDWARE.cost, prefill_base_s=0.1))
WAVE = requests((30, 1.5), (60, 7), (100, 0.7))


def reasons(result: Result) -> list[str]:
    return [event.reason.partition(":")[0] for event in result.events]


def test_pools_follow_the_load_and_what_is_loading_costs() -> None:
    result = simulate(elastic(), WAVE)
    assert reasons(result)[0] == "prefill 1 -> 2"
    assert reasons(result)[-1].endswith("-> 1")
    first = result.events[0].at_s
    (second,) = (span for span in result.spans if span.worker_id == "prefill-1" and span.start_s == first)
    served = [record for record in result.records if record.prefill_worker == "prefill-1"]
    assert min(record.at_s for record in served) == pytest.approx(first + 7.0, abs=1.5), "when it has loaded"
    assert second.end_s < result.ended_at, "it went again"
    end_s = WAVE[-1].at_s
    worker_s = result.worker_s(Role.PREFILL, 0.0, end_s)
    by_hand = sum(min(s.end_s, end_s) - s.start_s for s in result.spans if s.role is Role.PREFILL and s.start_s < end_s)
    assert worker_s == pytest.approx(by_hand)
    assert end_s < worker_s < 3 * end_s
    fixed = simulate(elastic(replace(QUICK, enabled=False)), WAVE)
    assert fixed.worker_s(Role.PREFILL, 0.0, end_s) == end_s
    assert not fixed.events
    assert result.summary().attainment > 1.2 * fixed.summary().attainment


def test_a_worker_goes_over_where_the_other_pool_can_do_with_less() -> None:
    rising = requests((10, 1.5), (60, 7))
    patient = replace(QUICK, shrink_after_s=100.0)
    turning = simulate(elastic(patient, num_decode=3), rising)
    loading = simulate(elastic(replace(patient, changes_roles=False), num_decode=3), rising)
    went, came = turning.events[1], turning.events[0]
    assert came.reason.startswith("prefill 1 -> 2: ")
    assert went.reason.startswith("decode 3 -> 2: ") and went.reason.endswith("in use, and the other pool is short")
    (former,) = (span for span in turning.spans if span.worker_id == "decode-2")
    (second,) = (span for span in turning.spans if span.worker_id == "prefill-1" and span.end_s > former.end_s)
    assert former.end_s == second.start_s, "one process, without a break"
    turned_s, loaded_s = (
        min(record.at_s for record in result.records if record.prefill_worker == "prefill-1") - result.events[0].at_s
        for result in (turning, loading)
    )
    assert turned_s < 4.0 < 7.0 <= loaded_s, "it needs no loading"


def test_a_pool_that_meets_its_goals_by_refusing_requests_grows() -> None:
    blind = replace(QUICK, prefill=PoolLimits(1, 4, max_queue=100.0, max_use=1.0), decode=PoolLimits(1, 1))
    result = simulate(elastic(blind, refuses_early=True), requests((10, 1.5), (40, 9)))
    assert result.events[0].reason.startswith("prefill 1 -> 2: ")
    assert "meet the TTFT SLO" in result.events[0].reason
    taken = [record for record in result.records if record.end is End.FINISHED and record.at_s < result.events[0].at_s]
    assert all(record.meets(1.0, 1.0) for record in taken)


def test_where_memory_is_not_handed_on_none_goes_over() -> None:
    patient = replace(QUICK, shrink_after_s=100.0)
    result = simulate(elastic(patient, num_decode=3, num_host_tokens=64), requests((10, 1.5), (30, 7)))
    assert result.events[0].reason.startswith("prefill 1 -> 2")
    assert not any("the other pool is short" in event.reason for event in result.events)


def test_one_that_takes_too_long_to_drain_leaves_and_its_requests_go_on_elsewhere() -> None:
    long = [replace(one, num_output_tokens=3000) for one in requests((4, 1), num_blocks=1)]
    short = requests((100, 2), num_blocks=1)
    ids = [replace(one, hash_ids=tuple(10**6 + i for i in one.hash_ids)) for one in long]
    both = sorted([*ids, *short], key=lambda one: (one.at_s, one.hash_ids))
    busy = replace(QUICK, shrink_after_s=0.0, decode=PoolLimits(1, 4, max_use=1.0))
    roomy = replace(SLOW, num_kv_tokens=12_000)
    result = simulate(elastic(busy, num_decode=2, worker_drain_timeout_s=0.0, hardware=roomy), both)
    assert any(event.reason.startswith("decode 2 -> 1") for event in result.events)
    assert [record.num_output_tokens for record in result.records] == [one.num_output_tokens for one in both]
    assert any(record.num_attempts > 1 for record in result.records)


@pytest.mark.parametrize(("drain_timeout_s", "decode_base_s"), [(0.25, 0.0391), (30.0, 0.03)])
def test_a_drain_that_begins_in_mid_step_sees_every_token_that_has_been_made(
    drain_timeout_s: float, decode_base_s: float
) -> None:
    """Steps of 32 tokens take longer than it is from one look at the decode workers to the next."""
    lazy = replace(SLOW, num_kv_tokens=12_000, cost=replace(SLOW.cost, decode_base_s=decode_base_s))
    work = [replace(one, num_output_tokens=200 + 50 * i) for i, one in enumerate(requests((5, 3), num_blocks=1))]
    shrinks = replace(QUICK, shrink_after_s=0.0, cool_down_s=0.0)
    plain = elastic(shrinks, num_decode=3, hardware=lazy, worker_drain_timeout_s=drain_timeout_s)
    fast, slow = simulate(plain, work), simulate(replace(plain, fast_forwards=False), work)
    assert any(event.reason.startswith("decode 3 -> 2") for event in fast.events)
    assert fast.router.num_migrations + fast.router.num_failovers > 0
    assert (fast.records, fast.router, fast.spans) == (slow.records, slow.router, slow.spans)


@settings(max_examples=15)
@given(workloads(), st.booleans(), st.integers(1, 3), st.sampled_from([0.0, 0.25, 30.0]))
def test_tokens_made_at_once_change_nothing_and_nothing_is_lost(
    work: list[SimRequest], changes_roles: bool, num_decode: int, drain_timeout_s: float
) -> None:
    """simulate() itself checks that every request has ended and no block is left over."""
    work = [replace(one, at_s=9 * one.at_s) for one in work]
    at_once = replace(QUICK, grow_after_s=0.0, shrink_after_s=0.0, cool_down_s=0.0, changes_roles=changes_roles)
    plain = elastic(at_once, num_decode=num_decode, worker_drain_timeout_s=drain_timeout_s, worker_start_s=2.0)
    fast = simulate(plain, work)
    slow = simulate(replace(plain, fast_forwards=False), work)
    assert fast.records == slow.records
    assert (fast.events, fast.spans) == (slow.events, slow.spans)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_decode": 0}, "autoscaler needs workers that prefill and others that decode"),
        ({"changes": (Change(1.0, ChangeKind.FAIL, "prefill-0"),)}, "fail cannot be given beside it"),
        ({"worker_start_s": -1.0}, "worker_start_s must not be negative, got -1"),
        ({"turn_s": -1.0}, "turn_s must not be negative, got -1"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        elastic(**changes)
