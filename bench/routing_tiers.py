"""The closest policies with device memory alone and with a host tier of 4 M tokens a worker, in the simulator: what
memory is worth, and what copies of a prefix are worth with each."""

from __future__ import annotations

from typing import Any

from bench._routing import (
    HOST_TOKENS,
    NUM_JOBS,
    Contest,
    figures_by_tier,
    hold,
    router_of,
    setup_of,
    traces,
    variant_of,
)
from bench.harness import Figure
from router.policies.config import PolicyConfig, PolicyName
from router.queue_order import QueueOrderName
from simulator.runs import processes
from simulator.setup import Setup
from simulator.sweep import Variant, contender

DESCRIPTION = "goodput with device memory alone and with a host tier, copies allowed or charged for, simulated"

ORDER: QueueOrderName = "shortest_remaining"
POLICIES: tuple[PolicyName, ...] = ("dual_map", "home_pair", "single_ring")
SCALE = 0.6  # of the requests of scripts/bench routing: there are many contenders here
# Of home_pair's settings: second copies for nothing, and hardly ever.
SWITCHES: dict[str, dict[str, Any]] = {"copies are free": {"duplicate_cost": 0.0}, "no copies": {"duplicate_cost": 1e6}}


def run(quick: bool) -> list[Figure]:
    scale, tolerance = (0.5 * SCALE, 0.04) if quick else (SCALE, 0.02)
    contests = [
        Contest(trace, setup, variants_of(setup, quick), tolerance, 1)
        for trace in traces(scale)
        for setup in (setup_of(), setup_of(num_host_tokens=HOST_TOKENS))
    ]
    with processes(NUM_JOBS) as pool:
        found = hold(contests, pool)
    return figures_by_tier(contests, found)


def variants_of(setup: Setup, quick: bool) -> tuple[Variant, ...]:
    found = [variant_of(setup, policy, ORDER) for policy in (POLICIES[:2] if quick else POLICIES)]
    for label, settings in SWITCHES.items():
        router = router_of(setup, PolicyConfig("home_pair", **settings), ORDER)
        found.append(contender(f"home_pair, {label}", router, setup))
    return tuple(found)
