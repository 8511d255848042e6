"""Returns in whole runs: nothing is lost or left over, and what was computed away from home is found there."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given

from engine.config import PullConfig
from router.policies.config import PolicyConfig
from simulator.requests import SimRequest
from simulator.result import Result
from simulator.run import simulate
from simulator.setup import Change, ChangeKind, Setup
from simulator.sweep import MAX_RETURNS, contender
from tests.simulator.test_cluster import CAREFULLY, conserved
from tests.simulator.values import HARDWARE, request, setup, workloads

HOME_PAIR = PolicyConfig("home_pair", num_sampled=2, remembers=False, duplicate_cost=0.0)


def returning(**changes: object) -> Setup:
    chosen = setup(num_prefill=4, policy=HOME_PAIR, returns=True, cost=HARDWARE.cost, **changes)
    variant = contender("returning", chosen.router, chosen)
    assert variant.pulls is not None and variant.pulls.max_returns == MAX_RETURNS
    return replace(chosen, router=variant.router, scheduler=replace(chosen.scheduler, pulls=variant.pulls))


def without_returns(chosen: Setup) -> Setup:
    pulls = chosen.scheduler.pulls
    assert pulls is not None
    return replace(
        chosen,
        router=replace(chosen.router, returns=False),
        scheduler=replace(chosen.scheduler, pulls=replace(pulls, max_returns=0)),
    )


@CAREFULLY
@given(workloads())
def test_returns_conserve(requests: list[SimRequest]) -> None:
    for num_decode in (0, 2):
        conserved(returning(num_decode=num_decode), requests)


def test_returns_outlive_a_worker_that_fails() -> None:
    changes = tuple(Change(0.02 * (1 + i), ChangeKind.FAIL, f"prefill-{i}") for i in range(2))
    requests = [request(0.005 * i, (1, 2, *range(100 * i, 100 * i + 6))) for i in range(1, 20)]
    result = simulate(returning(num_decode=0, changes=changes), requests)
    assert result.router.num_finished == len(requests)


def crowded_then_longer() -> list[SimRequest]:
    """Requests of one home pair that drive each other away, and long after each of them its next turn."""
    first = [request(0.001 * i, (1, 2, *range(100 * i, 100 * i + 8))) for i in range(1, 13)]
    return first + [request(10.0 + i, (1, 2, *range(100 * i, 100 * i + 9))) for i in range(1, 13)]


def num_hits(result: Result) -> int:
    return sum(record.num_cached_tokens for record in result.records[12:])


def test_the_next_turn_hits_at_home() -> None:
    chosen = returning(num_decode=0, hardware=replace(HARDWARE, num_kv_tokens=500 * 16))
    requests = crowded_then_longer()
    with_returns, without = simulate(chosen, requests), simulate(without_returns(chosen), requests)
    num_away = sum(record.why.startswith("away from home") for record in with_returns.records[:12])
    assert 0 < num_away < 12
    assert num_hits(with_returns) == 12 * 10 * 16 > num_hits(without)
    assert with_returns.transfers.num_arrived > without.transfers.num_arrived


def test_contenders_that_do_not_pull_or_return_are_not_returned_to() -> None:
    chosen = setup(policy=HOME_PAIR)
    assert contender("off", chosen.router, chosen).pulls == PullConfig(
        s_per_token=1e-5, max_returns=0, returns_answers=False
    )
    dual_map = replace(chosen.router, policy=PolicyConfig("dual_map"), returns=True)
    assert contender("dual_map", dual_map, chosen).pulls is None
