"""A day that is made of traces of an hour."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench._day import NUM_HOURS, as_they_are, day_of, dispersion, rate_in, short_answers_by_day
from simulator.requests import SimRequest

BODIES = [SimRequest(0.0, 30 * (n + 1), (7, n), 600 + n) for n in range(5)]


def arrivals(num: int = 300, seed: int = 0) -> list[float]:
    """In bunches."""
    rng, at_s, found = Random(seed), 0.0, []
    for _ in range(num):
        at_s += rng.expovariate(10.0 if rng.random() < 0.9 else 0.1)
        found.append(at_s)
    return found


def test_the_curve_has_its_mean_and_its_peak() -> None:
    rates = [rate_in(hour, 5.0) for hour in range(NUM_HOURS)]
    assert sum(rates) / NUM_HOURS == pytest.approx(5.0)
    assert max(rates) == rates[15] == pytest.approx(4 * min(rates))


@given(st.floats(0.5, 4.0), st.sampled_from([20.0, 60.0]), st.integers(0, 3))
def test_every_hour_has_as_many_as_its_rate_asks_for(mean_rate: float, hour_s: float, seed: int) -> None:
    requests = day_of(arrivals(seed=seed), BODIES, mean_rate, hour_s, as_they_are)
    times = [request.at_s for request in requests]
    assert times == sorted(times)
    for hour in range(NUM_HOURS):
        num = sum(hour * hour_s <= at_s < (hour + 1) * hour_s for at_s in times)
        assert abs(num - rate_in(hour, mean_rate) * hour_s) <= 1.5


def test_bursts_stay_bursts() -> None:
    times = [request.at_s for request in day_of(arrivals(3000), BODIES, 2.0, 100.0, as_they_are)]
    at_random = [100.0 * 24 * i / len(times) for i in range(len(times))]
    assert dispersion(times, 5.0) > 3 > dispersion(at_random, 5.0)


def test_bodies_come_in_their_order_and_share_nothing_with_an_earlier_turn() -> None:
    requests = day_of(arrivals(), BODIES, 1.0, 20.0, as_they_are)
    firsts = [request.hash_ids[0] for request in requests]
    assert [request.num_prompt_tokens for request in requests[:7]] == [600, 601, 602, 603, 604, 600, 601]
    assert len(set(firsts[:5])) == 1 and firsts[5] != firsts[0]
    assert len(set(firsts)) == -(-len(requests) // 5)


def test_answers_are_short_by_day() -> None:
    body = BODIES[0]
    assert [short_answers_by_day(hour, body).num_output_tokens for hour in (3, 8, 19, 20)] == [90, 10, 10, 90]
