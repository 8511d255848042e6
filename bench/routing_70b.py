"""DualMap and the default on larger workers: 8 prefill workers of the 70b-h100x4 row, with device memory alone and with
a host tier, in the simulator. A token of KV is 2.5 times as large as the 8B model's, and takes three times as long to
compute."""

from __future__ import annotations

from dataclasses import replace

from bench._routing import HOST_TOKENS, NUM_JOBS, Contest, figures_by_tier, hold, setup_of, tier_of, traces, variant_of
from bench.harness import Figure
from protos.cost_model import HARDWARE
from router.policies.config import PolicyName
from router.queue_order import QueueOrderName
from simulator.runs import processes
from simulator.setup import Setup

DESCRIPTION = "goodput of DualMap, the default and others on 70B workers, simulated"

HARDWARE_NAME = "70b-h100x4"
ORDER: QueueOrderName = "shortest_remaining"
POLICIES: tuple[PolicyName, ...] = ("dual_map", "home_pair", "threshold", "exploit_explore")
SCALE = 0.4  # of the requests of scripts/bench routing: at a third of the rate that is as long


def run(quick: bool) -> list[Figure]:
    scale, tolerance = (0.5 * SCALE, 0.04) if quick else (SCALE, 0.02)
    contests = [
        Contest(trace, setup, tuple(variant_of(setup, policy, ORDER) for policy in POLICIES), tolerance, 1)
        for trace in traces(scale)
        for setup in (larger(setup_of()), larger(setup_of(num_host_tokens=HOST_TOKENS)))
    ]
    with processes(NUM_JOBS) as pool:
        found = hold(contests, pool)
    figures = figures_by_tier(contests, found)
    for contest, (baseline, default, *_) in zip(contests, found, strict=True):
        key = f"{contest.trace.name}/{tier_of(contest.setup)}: ratio to {POLICIES[0]}"
        figures.append(Figure(key, default.goodput / baseline.goodput, "x", 1.05))
    return figures


def larger(setup: Setup) -> Setup:
    hardware = HARDWARE[HARDWARE_NAME]
    return replace(setup, hardware=hardware, router=replace(setup.router, cost=hardware.cost))
