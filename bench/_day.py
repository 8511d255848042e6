"""A day of requests, made out of traces of an hour: when they come, and what they ask for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count, islice, pairwise

from simulator.requests import SimRequest
from simulator.transforms import renumbered

NUM_HOURS = 24
PEAK_HOUR = 15
SWING = 0.6  # of the mean: the busiest hour has four times the rate of the quietest

Shape = Callable[[int, SimRequest], SimRequest]  # what a request of this hour asks for


def rate_in(hour: int, mean_rate: float) -> float:
    """Requests/s."""
    return mean_rate * (1 + SWING * math.cos(2 * math.pi * (hour - PEAK_HOUR) / NUM_HOURS))


def day_of(
    arrivals: Sequence[float], bodies: Sequence[SimRequest], mean_rate: float, hour_s: float, shape: Shape
) -> tuple[SimRequest, ...]:
    """Each hour lasts hour_s and takes as many of the next arrivals as its rate asks for; the gaps between them are
    stretched or compressed alike until they fill it. So bursts within an hour keep their size, and what the trace does
    over an hour is replaced by the day's curve. Bodies come in their order. Both begin anew at their end: arrivals as
    they were, bodies with prompts that nobody has had."""
    gaps, following = _gaps(arrivals), _endless(bodies)
    found: list[SimRequest] = []
    for hour in range(NUM_HOURS):
        here = list(islice(gaps, max(1, round(rate_in(hour, mean_rate) * hour_s))))
        at_s, stretch = hour * hour_s, hour_s / sum(here)
        for gap in here:
            found.append(replace(shape(hour, next(following)), at_s=at_s))
            at_s += gap * stretch
    return renumbered(found)


def as_they_are(hour: int, request: SimRequest) -> SimRequest:
    return request


def short_answers_by_day(hour: int, request: SimRequest) -> SimRequest:
    """A third of the length from 8 to 20 o'clock, three times as long at night."""
    factor = 1 / 3 if 8 <= hour < 20 else 3.0
    return replace(request, num_output_tokens=max(1, round(factor * request.num_output_tokens)))


def dispersion(at_s: Sequence[float], width_s: float) -> float:
    """Variance over mean of how many come in each interval: 1 where they come at random."""
    counts = [0] * (int(at_s[-1] / width_s) + 1)
    for each in at_s:
        counts[int(each / width_s)] += 1
    mean = sum(counts) / len(counts)
    return sum((one - mean) ** 2 for one in counts) / len(counts) / mean


def _gaps(arrivals: Sequence[float]) -> Iterator[float]:
    while True:
        yield from (later - earlier for earlier, later in pairwise(arrivals))


def _endless(bodies: Sequence[SimRequest]) -> Iterator[SimRequest]:
    num_ids = 1 + max(max(body.hash_ids) for body in bodies)
    for turn in count():
        for body in bodies:
            yield replace(body, hash_ids=tuple(turn * num_ids + hash_id for hash_id in body.hash_ids))
