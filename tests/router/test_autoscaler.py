"""What the autoscaler wants of a pool that does as its size and load make it do."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.types import Role
from router.autoscaler import Autoscaler, AutoscalerConfig, PoolLimits, PoolLoad, Resize

LOOK_S = 5.0
CONFIG = AutoscalerConfig(
    prefill=PoolLimits(1, 6), decode=PoolLimits(1, 6), grow_after_s=10.0, shrink_after_s=60.0, cool_down_s=20.0
)
Pool = Callable[[int, float], PoolLoad]  # of its size and the load, in workers


def honest(size: int, load: float) -> PoolLoad:
    """It misses its SLO, and work waits, once it is full."""
    use = load / size
    return PoolLoad(size, 1.0 if use < 1 else 1 / use, max(0.0, use - 1), min(use, 1.0))


def fragile(at_use: float) -> Pool:
    """It misses its SLO long before it is full."""
    return lambda size, load: PoolLoad(size, 0.5 if load / size > at_use else 1.0, 0.0, min(load / size, 1.0))


def run(pool: Pool, loads: list[float], size: int = 1, config: AutoscalerConfig = CONFIG) -> list[int]:
    """Its size after every look."""
    scaler, sizes = Autoscaler(config), list[int]()
    for number, load in enumerate(loads):
        for resize in scaler.decide({Role.DECODE: pool(size, load)}, number * LOOK_S):
            size = resize.num_workers
        sizes.append(size)
    return sizes


def num_changes(sizes: list[int]) -> int:
    return sum(before != after for before, after in itertools.pairwise(sizes))


def test_it_grows_after_a_while_and_says_why() -> None:
    scaler = Autoscaler(CONFIG)
    short = {Role.PREFILL: PoolLoad(2, 0.6, 0.0, 0.7)}
    assert scaler.decide(short, 0.0) == scaler.decide(short, 5.0) == []
    reason = "prefill 2 -> 3: 60.0% of requests meet the TTFT SLO, 95.0% should"
    assert scaler.decide(short, 10.0) == [Resize(Role.PREFILL, 3, reason)]
    still = {Role.PREFILL: replace(short[Role.PREFILL], num_workers=3)}
    assert scaler.decide(still, 25.0) == [], "the new one is still warming up"
    assert scaler.decide(still, 35.0)[0].num_workers == 4


def test_a_good_look_in_between_starts_the_while_anew() -> None:
    bad, good = PoolLoad(2, 0.6, 0.0, 0.8), PoolLoad(2, 1.0, 0.0, 0.8)
    scaler = Autoscaler(CONFIG)
    for now, load in ((0.0, bad), (5.0, bad), (9.0, good), (10.0, bad), (15.0, bad)):
        assert scaler.decide({Role.DECODE: load}, now) == []
    assert scaler.decide({Role.DECODE: bad}, 20.0)


def test_it_grows_to_what_the_load_needs_at_once() -> None:
    scaler = Autoscaler(CONFIG)
    waits = {Role.DECODE: PoolLoad(2, 1.0, 3.0, 1.5)}
    scaler.decide(waits, 0.0)
    (resize,) = scaler.decide(waits, 10.0)
    assert resize.num_workers == 4
    assert resize.reason == "decode 2 -> 4: 3.00 s of work wait for each worker, 1 s are allowed"


def test_it_shrinks_one_by_one_when_the_load_has_gone() -> None:
    sizes = run(honest, [5.0] * 30 + [0.5] * 200)
    assert sizes[29] == 6
    assert sizes[-1] == 1
    assert all(after >= before - 1 for before, after in itertools.pairwise(sizes))


def test_what_was_too_small_is_not_tried_again_until_the_load_is_less() -> None:
    sizes = run(fragile(0.4), [1.5] * 600, size=3)
    # 3 workers are 50 % in use and miss the SLO; 4 do not, and 3 would look ample.
    assert num_changes([3, *sizes]) == 1
    assert sizes[-1] == 4
    assert run(fragile(0.4), [1.5] * 100 + [0.3] * 200, size=3)[-1] == 1


def test_sizes_beyond_the_limits_are_brought_back() -> None:
    scaler = Autoscaler(CONFIG)
    fine = PoolLoad(9, 1.0, 0.0, 0.8)
    assert scaler.decide({Role.DECODE: fine}, 0.0) == [Resize(Role.DECODE, 6, "decode 9 -> 6: limits")]


pools = st.sampled_from([honest, fragile(0.3), fragile(0.6), fragile(0.84)])


@given(pools, st.lists(st.floats(0.0, 20.0), max_size=200), st.integers(1, 9))
def test_whatever_the_load_it_stays_within_its_limits_and_takes_its_time(
    pool: Pool, loads: list[float], size: int
) -> None:
    sizes = run(pool, loads, size)
    assert all(1 <= one <= 6 for one in sizes)
    changed_at = [i for i, (before, after) in enumerate(zip([size, *sizes], sizes, strict=False)) if before != after]
    assert all((b - a) * LOOK_S >= CONFIG.cool_down_s for a, b in itertools.pairwise(changed_at))


@given(pools, st.floats(0.01, 12.0), st.integers(1, 6), st.lists(st.floats(-0.09, 0.09), min_size=10, max_size=10))
def test_a_load_that_only_wavers_does_not_make_it_flap(pool: Pool, load: float, size: int, noise: list[float]) -> None:
    loads = [load * (1 + noise[i % len(noise)]) for i in range(800)]
    sizes = run(pool, loads, size)
    assert num_changes(sizes[400:]) == 0, "it comes to rest"
    directions = [b > a for a, b in itertools.pairwise(sizes) if a != b]
    assert sum(one != other for one, other in itertools.pairwise(directions)) <= 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PoolLimits(3, 2), "min_workers must be within 0 and max_workers 2, got 3"),
        (lambda: PoolLimits(max_use=1.5), "max_use must be in"),
        (lambda: PoolLimits(max_queue_s=0.0), "max_queue_s must be positive, got 0"),
        (lambda: AutoscalerConfig(prefill=PoolLimits(0, 2)), "prefill.min_workers must be at least 1, got 0"),
        (lambda: AutoscalerConfig(min_attainment=0.0), "min_attainment must be in"),
        (lambda: AutoscalerConfig(cool_down_s=-1.0), "cool_down_s must not be negative, got -1"),
    ],
)
def test_settings_that_could_never_work_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
