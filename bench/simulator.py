"""How much of one core's time the simulator takes, and how that grows with workers and requests. Peak memory of this
process beside it."""

from __future__ import annotations

import resource
from dataclasses import replace
from random import Random

from bench.harness import Figure, core_time_of
from protos.cost_model import HARDWARE
from router.policies.config import PolicyConfig
from simulator.generator import generate, preset
from simulator.limits import reference_of
from simulator.run import simulate
from simulator.setup import Setup, default_router
from simulator.transforms import at_rate, renumbered

DESCRIPTION = "processor time and memory of the simulator, by workers and requests"

LOAD = 0.7  # of the rate at which balanced workers saturate
WITH_DECODE = (100, 100_000)  # workers, half of them decode; requests
PREFILL_ONLY = ((8, 1_000), (8, 10_000), (64, 10_000), (64, 100_000), (1_000, 100_000), (1_000, 1_000_000))
QUICK_PREFILL_ONLY = ((8, 500), (8, 2_000), (64, 2_000))


def run(quick: bool) -> list[Figure]:
    figures = [_timed(num_workers, 0, num) for num_workers, num in (QUICK_PREFILL_ONLY if quick else PREFILL_ONLY)]
    num_workers, num_requests = (16, 1_000) if quick else WITH_DECODE
    figures.append(_timed(num_workers // 2, num_workers // 2, num_requests, None if quick else 1800.0))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return [*figures, Figure("peak_memory", peak, "GiB", 8.0, "lower")]


def _timed(num_prefill: int, num_decode: int, num_requests: int, target_s: float | None = None) -> Figure:
    hardware = HARDWARE["8b-h100"]
    router = replace(default_router(), policy=PolicyConfig("home_pair"), cost=hardware.cost)
    setup = Setup(hardware=hardware, num_prefill=num_prefill, num_decode=num_decode, router=router)
    requests = renumbered(generate(preset("tool_agent"), num_requests, Random(0)))
    requests = at_rate(requests, LOAD * reference_of(requests, setup).rate)
    core_s = core_time_of(lambda: simulate(setup, requests))
    workers = f"{num_prefill}p" + (f"{num_decode}d" if num_decode else "")
    note = f"{num_requests / core_s:.0f} requests/s of one core"
    return Figure(f"{workers}_{num_requests}", core_s, "s", target_s, "lower", note)
