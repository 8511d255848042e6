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
    scaler, sizes = Autoscaler(config, may_turn=False), list[int]()
    for number, load in enumerate(loads):
        for resize in scaler.decide({Role.DECODE: pool(size, load)}, number * LOOK_S):
            size = resize.num_workers
        sizes.append(size)
    return sizes


def num_changes(sizes: list[int]) -> int:
    return sum(before != after for before, after in itertools.pairwise(sizes))


def test_it_grows_after_a_while_and_says_why() -> None:
    scaler = Autoscaler(CONFIG, may_turn=False)
    short = {Role.PREFILL: PoolLoad(2, 0.6, 0.0, 0.7)}
    assert scaler.decide(short, 0.0) == scaler.decide(short, 5.0) == []
    reason = "prefill 2 -> 3: 60.0% of requests meet the TTFT SLO, 95.0% should"
    assert scaler.decide(short, 10.0) == [Resize(Role.PREFILL, 3, reason)]
    still = {Role.PREFILL: replace(short[Role.PREFILL], num_workers=3)}
    assert scaler.decide(still, 25.0) == [], "the new one is still warming up"
    assert scaler.decide(still, 35.0)[0].num_workers == 4


def test_what_was_before_a_gap_counts_for_nothing() -> None:
    scaler = Autoscaler(replace(CONFIG, window_s=30.0), may_turn=False)
    idle, bad = ({Role.DECODE: PoolLoad(3, share, 0.0, 0.1)} for share in (1.0, 0.5))
    assert [scaler.decide(idle, at) for at in (0.0, 5.0, 100.0, 125.0, 150.0)] == [[]] * 5, "not seen for 60 s on end"
    assert scaler.decide(idle, 165.0)[0].num_workers == 2
    short = Autoscaler(replace(CONFIG, window_s=30.0), may_turn=False)
    assert [short.decide(bad, at) for at in (0.0, 100.0, 105.0)] == [[]] * 3, "who knows what was in between"
    assert short.decide(bad, 110.0)


def test_a_good_look_in_between_starts_the_while_anew() -> None:
    bad, good = PoolLoad(2, 0.6, 0.0, 0.8), PoolLoad(2, 1.0, 0.0, 0.8)
    scaler = Autoscaler(CONFIG, may_turn=False)
    for now, load in ((0.0, bad), (5.0, bad), (9.0, good), (10.0, bad), (15.0, bad)):
        assert scaler.decide({Role.DECODE: load}, now) == []
    assert scaler.decide({Role.DECODE: bad}, 20.0)


def test_it_grows_to_what_the_load_needs_at_once() -> None:
    scaler = Autoscaler(CONFIG, may_turn=False)
    waits = {Role.DECODE: PoolLoad(2, 1.0, 3.0, 1.5)}
    scaler.decide(waits, 0.0)
    (resize,) = scaler.decide(waits, 10.0)
    assert resize.num_workers == 4
    assert resize.reason == "decode 2 -> 4: 300% of the TTFT SLO wait for each worker, 40% are allowed"


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
    scaler = Autoscaler(CONFIG, may_turn=False)
    fine = PoolLoad(9, 1.0, 0.0, 0.8)
    assert scaler.decide({Role.DECODE: fine}, 0.0) == [Resize(Role.DECODE, 6, "decode 9 -> 6: limits")]


def test_chance_does_not_keep_a_pool_from_shrinking_and_a_moment_of_want_is_not_remembered() -> None:
    scaler = Autoscaler(CONFIG, may_turn=False)
    resizes: list[Resize] = []
    for look in range(30):
        use = 0.84 if look % 3 == 0 else 0.2  # every third look looks as if 3 were needed
        load = PoolLoad(4, 1.0, 0.5 if look == 1 else 0.0, use)
        resizes += scaler.decide({Role.PREFILL: load}, look * LOOK_S)
        if resizes:
            break
    assert resizes == [Resize(Role.PREFILL, 3, "prefill 4 -> 3: 45% in use, which is 59% of the rest")]
    assert look * LOOK_S >= CONFIG.shrink_after_s


def test_what_a_pool_had_to_do_before_it_grew_is_no_reason_to_shrink() -> None:
    scaler = Autoscaler(CONFIG, may_turn=False)
    for look in range(20):
        assert scaler.decide({Role.PREFILL: PoolLoad(2, 1.0, 0.0, 0.45)}, look * LOOK_S) == []
    late = PoolLoad(2, 0.5, 0.0, 0.45)
    found = [scaler.decide({Role.PREFILL: late}, (20 + look) * LOOK_S) for look in range(3)]
    assert [each[0].num_workers for each in found if each] == [3]
    after = [scaler.decide({Role.PREFILL: PoolLoad(3, 1.0, 0.0, 0.2)}, (23 + look) * LOOK_S) for look in range(12)]
    assert after == [[]] * 12, "a minute has to pass"


AMPLE, SHORT = PoolLoad(4, 1.0, 0.0, 0.1), PoolLoad(2, 0.5, 0.0, 0.9)


def resizes_of(idle: PoolLoad, busy: PoolLoad, may_turn: bool = True, **changes: object) -> list[Resize]:
    """Both pools have been like that for a while, prefill short for a shorter one."""
    config = replace(CONFIG, shrink_after_s=1000.0, **{"changes_roles": True, **changes})  # type: ignore[arg-type]
    scaler = Autoscaler(config, may_turn)
    for look in range(20):
        prefill = busy if look >= 15 else PoolLoad(busy.num_workers, 1.0, 0.0, 0.8)
        found = scaler.decide({Role.PREFILL: prefill, Role.DECODE: idle}, look * LOOK_S)
        if found:
            return found
    return []


def test_where_one_pool_is_short_the_other_gives_what_it_can_do_without() -> None:
    assert resizes_of(AMPLE, SHORT) == [
        Resize(Role.PREFILL, 3, "prefill 2 -> 3: 50.0% of requests meet the TTFT SLO, 95.0% should"),
        Resize(Role.DECODE, 3, "decode 4 -> 3: 10% in use, and the other pool is short"),
    ]
    twice = PoolLoad(2, 0.5, 0.0, 1.4)
    assert [(each.role, each.num_workers) for each in resizes_of(AMPLE, twice)] == [(Role.PREFILL, 4), (Role.DECODE, 2)]


@pytest.mark.parametrize(
    ("idle", "changes"),
    [
        (AMPLE, {"may_turn": False}),
        (AMPLE, {"changes_roles": False}),
        (replace(AMPLE, use=0.6), {}),  # 80 % of three
        (replace(AMPLE, num_workers=1), {}),
        (AMPLE, {"decode": PoolLimits(4, 6)}),
        (AMPLE, {"window_s": 100.0}),  # not known for so long
    ],
)
def test_where_it_cannot_a_worker_is_started(idle: PoolLoad, changes: dict[str, object]) -> None:
    may_turn = bool(changes.pop("may_turn", True))
    assert [each.role for each in resizes_of(idle, SHORT, may_turn, **changes)] == [Role.PREFILL]


def test_a_worker_that_would_end_goes_over_where_it_may_soon_be_wanted() -> None:
    def after_a_while(use: float, limits: PoolLimits = CONFIG.prefill) -> list[Resize]:
        scaler = Autoscaler(replace(CONFIG, prefill=limits, changes_roles=True), may_turn=True)
        for look in range(20):
            loads = {Role.PREFILL: PoolLoad(3, 1.0, 0.0, use), Role.DECODE: AMPLE}
            if found := scaler.decide(loads, look * LOOK_S):
                return found
        return []

    taken = Resize(Role.PREFILL, 4, "prefill 3 -> 4: 75% in use, and the other pool has one too many")
    given = Resize(Role.DECODE, 3, "decode 4 -> 3: 10% in use, which is 13% of the rest")
    assert after_a_while(0.75) == [given, taken]
    assert after_a_while(0.65) == after_a_while(0.75, PoolLimits(1, 3)) == [given]


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
        (lambda: PoolLimits(max_queue=0.0), "max_queue must be positive, got 0"),
        (lambda: AutoscalerConfig(window_s=0.0), "window_s must be positive, got 0"),
        (lambda: AutoscalerConfig(prefill=PoolLimits(0, 2)), "prefill.min_workers must be at least 1, got 0"),
        (lambda: AutoscalerConfig(min_attainment=0.0), "min_attainment must be in"),
        (lambda: AutoscalerConfig(cool_down_s=-1.0), "cool_down_s must not be negative, got -1"),
    ],
)
def test_settings_that_could_never_work_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
