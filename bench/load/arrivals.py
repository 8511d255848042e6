"""When the requests of an open loop are due. Knows a rate and a source of randomness, nothing of who sends them."""

from __future__ import annotations

import math
from enum import StrEnum
from itertools import count, islice, takewhile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from random import Random


class Arrivals(StrEnum):
    POISSON = "poisson"
    CONSTANT = "constant"
    BURSTS = "bursts"


def schedule(
    arrivals: Arrivals,
    rate: float,  # requests per second, over a long time
    rng: Random,
    *,
    duration_s: float | None = None,
    num_requests: int | None = None,
    burst_size: int = 8,
) -> list[float]:
    """Instants in seconds since the start, in order: those in [0, duration_s), or the first num_requests."""
    require_positive("rate", rate)
    require_positive("burst_size", burst_size)
    instants = _instants(arrivals, rate, rng, burst_size)
    if num_requests is not None:
        require_positive("requests", num_requests)
        return list(islice(instants, num_requests))
    if duration_s is None:
        raise ValueError("an open loop needs a duration or a number of requests")
    require_positive("duration", duration_s)
    return list(takewhile(lambda instant: instant < duration_s, instants))


def _instants(arrivals: Arrivals, rate: float, rng: Random, burst_size: int) -> Iterator[float]:
    match arrivals:
        case Arrivals.CONSTANT:
            return (index / rate for index in count())
        case Arrivals.POISSON:
            return _poisson(rate, rng)
        case Arrivals.BURSTS:  # whole bursts arrive at random, with the rate that keeps the requests' rate
            bursts = _poisson(rate / burst_size, rng)
            return (instant for instant in bursts for _ in range(burst_size))


def _poisson(rate: float, rng: Random) -> Iterator[float]:
    instant = 0.0
    while True:
        instant += rng.expovariate(rate)
        yield instant


def require_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive, not {value}")
