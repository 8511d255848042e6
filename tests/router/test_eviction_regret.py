from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.eviction_regret import MIN_EVICTIONS, WINDOW, EvictionRegret


def named(*numbers: int) -> list[bytes]:
    return [number.to_bytes(4, "big") for number in numbers]


def test_it_is_the_share_of_the_evicted_that_is_missed() -> None:
    regret = EvictionRegret(max_ghosts=10_000)
    for number in range(1000):
        regret.evicted(*named(number))
    regret.missed(named(*range(250), *range(5000, 6000)))
    assert regret.share == 0.25
    regret.missed(named(*range(250)))  # they have been computed again since
    assert regret.share == 0.25


def test_little_says_nothing() -> None:
    regret = EvictionRegret(10_000)
    for number in range(MIN_EVICTIONS - 1):
        regret.evicted(*named(number))
        regret.missed(named(number))
    assert regret.share == 0.0
    regret.evicted(*named(MIN_EVICTIONS))
    assert regret.share > 0.9


def test_what_was_evicted_long_ago_is_not_regretted() -> None:
    regret = EvictionRegret(max_ghosts=100)
    for number in range(1000):
        regret.evicted(*named(number))
    regret.missed(named(*range(1000)))
    assert regret.share == 0.1


def test_old_times_are_forgotten() -> None:
    regret = EvictionRegret(max_ghosts=10)
    for number in range(WINDOW):
        regret.evicted(*named(number))
        regret.missed(named(number))
    assert regret.share > 0.9
    for number in range(4 * WINDOW):
        regret.evicted(*named(number))
    assert regret.share < 0.1


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=1500))
def test_it_is_a_share(events: list[tuple[bool, int]]) -> None:
    regret = EvictionRegret(max_ghosts=30)
    for is_eviction, number in events:
        if is_eviction:
            regret.evicted(*named(number))
        else:
            regret.missed(named(number))
    assert 0.0 <= regret.share <= 1.0
