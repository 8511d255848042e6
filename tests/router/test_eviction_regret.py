from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from router.eviction_regret import MAX_GHOSTS, MIN_EVICTIONS, WINDOW, EvictionRegret
from tests.router.values import make_router, reported, stats


def named(*numbers: int) -> list[bytes]:
    return [number.to_bytes(4, "big") for number in numbers]


def test_it_is_the_share_of_the_evicted_that_is_missed() -> None:
    regret = EvictionRegret(num_held=10_000)
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
    regret = EvictionRegret(num_held=100)
    for number in range(1000):
        regret.evicted(*named(number))
    regret.missed(named(*range(1000)))
    assert regret.share == 0.1


def test_old_times_are_forgotten() -> None:
    regret = EvictionRegret(num_held=10)
    for number in range(WINDOW):
        regret.evicted(*named(number))
        regret.missed(named(number))
    assert regret.share > 0.9
    for number in range(4 * WINDOW):
        regret.evicted(*named(number))
    assert regret.share < 0.1


def test_of_many_a_sample_tells() -> None:
    regret = EvictionRegret(num_held=16 * MAX_GHOSTS)
    links = [hashlib.blake2b(number.to_bytes(4, "big")).digest() for number in range(40_000)]
    for link in links:
        regret.evicted(link)
    regret.missed(links[:10_000])
    assert 0.2 < regret.share < 0.3


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=1500))
def test_it_is_a_share(events: list[tuple[bool, int]]) -> None:
    regret = EvictionRegret(num_held=30)
    for is_eviction, number in events:
        if is_eviction:
            regret.evicted(*named(number))
        else:
            regret.missed(named(number))
    assert 0.0 <= regret.share <= 1.0


def test_it_is_of_what_workers_that_prefill_are_thought_to_have_evicted() -> None:
    """Both have room for 200 blocks; as many evicted ones are remembered."""
    router = make_router("p-0", "d-0")
    view = router.view
    for worker in view.workers.values():
        router.on(reported(worker.worker_id, stats=stats(num_blocks=100, num_host_blocks=100)), 0.0)
        for number in range(500):
            view.note_placed(worker, named(number))
    for number in (*range(20), *range(220, 240)):  # evicted too long ago; evicted of late
        view.note_placed(view.workers["p-0"], named(number))
    assert view.regret.share == 20 / 340
