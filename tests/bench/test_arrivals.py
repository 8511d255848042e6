"""Schedules of an open loop: how many requests, how regular, and that a seed repeats them."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.load.arrivals import Arrivals, schedule

RATE, DURATION_S = 50.0, 200.0


def gaps(instants: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(instants)]


@given(
    st.sampled_from(Arrivals),
    st.floats(0.1, 100),
    st.floats(0.1, 20),
    st.integers(0, 2**32),
    st.integers(1, 9),
)
def test_schedules_are_ordered_and_within_the_duration(
    arrivals: Arrivals, rate: float, duration_s: float, seed: int, burst_size: int
) -> None:
    instants = schedule(arrivals, rate, Random(seed), duration_s=duration_s, burst_size=burst_size)
    assert instants == sorted(instants)
    assert all(0 <= instant < duration_s for instant in instants)
    assert instants == schedule(arrivals, rate, Random(seed), duration_s=duration_s, burst_size=burst_size)


@pytest.mark.parametrize("arrivals", Arrivals)
def test_the_rate_holds_over_a_long_time(arrivals: Arrivals) -> None:
    instants = schedule(arrivals, RATE, Random(1), duration_s=DURATION_S, burst_size=4)
    expected = RATE * DURATION_S
    assert abs(len(instants) - expected) < 5 * math.sqrt(4 * expected)  # bursts of 4 vary twice as much


@pytest.mark.parametrize("arrivals", Arrivals)
def test_the_number_of_requests_holds_exactly(arrivals: Arrivals) -> None:
    assert len(schedule(arrivals, RATE, Random(1), num_requests=13)) == 13


def test_poisson_gaps_spread_as_much_as_their_mean() -> None:
    its_gaps = gaps(schedule(Arrivals.POISSON, RATE, Random(1), duration_s=DURATION_S))
    assert statistics.stdev(its_gaps) == pytest.approx(statistics.mean(its_gaps), rel=0.05)


def test_constant_gaps_are_all_alike() -> None:
    assert schedule(Arrivals.CONSTANT, 4, Random(1), duration_s=1) == [0, 0.25, 0.5, 0.75]


def test_bursts_come_at_once() -> None:
    sizes = Counter(schedule(Arrivals.BURSTS, RATE, Random(1), num_requests=40, burst_size=8))
    assert list(sizes.values()) == [8] * 5


@pytest.mark.parametrize("rate", [0.0, -1.0, math.inf, math.nan])
def test_a_rate_that_cannot_be_is_named(rate: float) -> None:
    with pytest.raises(ValueError, match="rate must be positive, not"):
        schedule(Arrivals.POISSON, rate, Random(1), duration_s=1)
