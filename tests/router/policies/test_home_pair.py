from __future__ import annotations

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.policies.home_pair import LEAST_REGRET, HomePair
from router.policy import Choice
from tests.router.policies.view import PREFILL_S_PER_TOKEN, FakeView, Load, away

IDLE = {f"p-{index}": Load() for index in range(8)}
HOME = FakeView(IDLE).home
PULL_S = PREFILL_S_PER_TOKEN / 5
ALL = 8  # sampled: every worker is a candidate


def view(home: Load, others: Load, num_tokens: int = 1000, pull_s: float = PULL_S, regret: float = 1.0) -> FakeView:
    loads = {worker_id: home if worker_id in HOME else others for worker_id in IDLE}
    return FakeView(loads, num_tokens, pull_s_per_token=pull_s, regret=regret)


def place(seen: FakeView, num_sampled: int = ALL, pulls: bool = True, duplicate_cost: float = 0.0) -> Choice:
    """Copies are free, unless it is asked for."""
    return HomePair(num_sampled, pulls, remembers=True, duplicate_cost=duplicate_cost).place(seen)


def test_a_copy_is_charged_what_it_takes_from_others() -> None:
    seen = view(Load(300, num_cached_tokens=800), Load(0))  # 0.5 s at home; away 0.36 s and a copy of 800 tokens
    assert away(seen, place(seen))
    assert away(seen, place(seen, duplicate_cost=0.17))
    assert not away(seen, place(seen, duplicate_cost=0.18))
    nothing_held = view(Load(300), Load(0))
    assert away(nothing_held, place(nothing_held, duplicate_cost=10.0))


@pytest.mark.parametrize(("regret", "counted"), [(0.5, 0.5), (0.0, LEAST_REGRET), (LEAST_REGRET / 2, LEAST_REGRET)])
def test_the_charge_is_by_what_others_miss_and_never_nothing(regret: float, counted: float) -> None:
    seen = view(Load(300, num_cached_tokens=800), Load(0), regret=regret)
    assert away(seen, place(seen, duplicate_cost=0.17 / counted))
    assert not away(seen, place(seen, duplicate_cost=0.18 / counted))


def test_where_its_last_turn_was_placed_is_a_candidate() -> None:
    last = next(worker_id for worker_id in IDLE if worker_id not in HOME)
    loads = {**IDLE, last: Load(100, num_cached_tokens=800)}
    seen = FakeView(loads, 1000, pull_s_per_token=inf, last_place=last)
    assert place(seen, num_sampled=0).worker_id == last
    assert not away(seen, HomePair(0, True, remembers=False, duplicate_cost=0.0).place(seen))
    # Too busy, it is pulled from.
    loads[last] = Load(1000, num_cached_tokens=800)
    choice = place(FakeView(loads, 1000, pull_s_per_token=PULL_S, last_place=last), num_sampled=0)
    assert (choice.worker_id in HOME, choice.sources) == (True, (last, *HOME))


def test_an_idle_home_keeps_its_prefix() -> None:
    seen = view(Load(0, num_cached_tokens=800), Load(0))
    choice = place(seen)
    assert not away(seen, choice)
    assert choice.reason == "home: TTFT 0.20 s with 800 tokens cached, the best of 8"


def test_ties_go_home() -> None:
    seen = view(Load(), Load())
    assert not away(seen, place(seen))
    # Nor does a load draw it away while no speed is known: to the lighter home at most.
    loads = {**IDLE, HOME[0]: Load(300), HOME[1]: Load(200)}
    assert place(FakeView(loads, prefill_s_per_token=0.0)).worker_id == HOME[1]


def test_a_busy_home_is_pulled_from() -> None:
    seen = view(Load(300, num_cached_tokens=800), Load(0))
    choice = place(seen)
    assert away(seen, choice)
    # 800 x 0.2 ms pulled + 200 x 1 ms computed, against 0.3 s of backlog + 0.2 s at home.
    assert choice.reason == "away from home: TTFT 0.36 s with 0 tokens cached and 800 pulled, the best of 8"
    # Computed afresh, it would take 1 s: no reason to leave.
    assert not away(seen, place(seen, pulls=False))
    assert not away(seen, place(view(Load(300, num_cached_tokens=800), Load(0), pull_s=inf)))


def test_a_pull_that_costs_more_than_computing_is_not_counted_on() -> None:
    seen = view(Load(1000, num_cached_tokens=800), Load(0), pull_s=2 * PREFILL_S_PER_TOKEN)
    choice = place(seen)
    assert away(seen, choice)
    assert "pulled" not in choice.reason


def test_one_home_pulls_from_the_other() -> None:
    loads = {**IDLE, HOME[0]: Load(1000, num_cached_tokens=800)}
    choice = place(FakeView(loads, 1000, pull_s_per_token=PULL_S), num_sampled=0)
    assert choice.worker_id == HOME[1]
    assert choice.reason == "home: TTFT 0.36 s with 0 tokens cached and 800 pulled, the best of 2"
    assert choice.sources == HOME


def test_what_an_earlier_home_holds_is_found() -> None:
    earlier = next(worker_id for worker_id in IDLE if worker_id not in HOME)
    loads = {**IDLE, earlier: Load(0, num_cached_tokens=800)}
    seen = FakeView(loads, 1000, pull_s_per_token=PULL_S, earlier_homes=[earlier])
    assert place(seen, num_sampled=0).worker_id == earlier
    loads[earlier] = Load(1000, num_cached_tokens=800)
    seen = FakeView(loads, 1000, pull_s_per_token=PULL_S, earlier_homes=[earlier])
    choice = place(seen, num_sampled=0)
    assert (away(seen, choice), choice.sources) == (False, (earlier, *HOME))
    assert place(seen, num_sampled=0, pulls=False).sources == ()


def test_without_samples_it_stays_in_the_pair() -> None:
    seen = view(Load(10**6), Load(0))
    assert not away(seen, place(seen, num_sampled=0))
    assert away(seen, place(seen))


@given(
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 60)), min_size=8, max_size=8),
    st.sampled_from([0, 1, 2, 8]),
    st.sampled_from([0.0, PULL_S, inf]),
    st.integers(0, 20),
)
def test_no_candidate_has_a_better_estimate(
    amounts: list[tuple[int, int]], num_sampled: int, pull_s: float, seed: int
) -> None:
    loads = {name: Load(pending, 16 * blocks) for name, (pending, blocks) in zip(IDLE, amounts, strict=True)}
    held = max(loads[one].num_cached_tokens for one in HOME)

    def expected_s(worker_id: str) -> float:
        load = loads[worker_id]
        missing = 1000 - load.num_cached_tokens
        best = missing * PREFILL_S_PER_TOKEN
        if held > load.num_cached_tokens and pull_s < inf:
            pulled = held - load.num_cached_tokens
            best = min(best, pulled * pull_s + (missing - pulled) * PREFILL_S_PER_TOKEN)
        return load.num_pending_tokens * PREFILL_S_PER_TOKEN + best

    seen = FakeView(loads, 1000, pull_s_per_token=pull_s, seed=seed)
    chosen = place(seen, num_sampled).worker_id
    offered = {*HOME, *FakeView(loads, 1000, seed=seed).sample(num_sampled)}
    assert chosen in offered
    assert expected_s(chosen) <= min(map(expected_s, offered)) + 1e-9
