"""From DualMap as published to the default, one switch at a time, in the simulator. What brings nothing, or harm, stays
in the table."""

from __future__ import annotations

from dataclasses import replace
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
)
from bench.harness import Figure
from router.config import RouterConfig
from router.policies.config import PolicyConfig
from simulator.runs import processes
from simulator.setup import Setup
from simulator.sweep import Variant, contender

DESCRIPTION = "what each lever between DualMap as published and the default gives, simulated"

TRACES = ("conversation", "tool_agent")
SCALE = 0.6  # of the requests of scripts/bench routing: there are many contenders here
PAIR_ALONE = PolicyConfig("home_pair", num_sampled=0, pulls=False, remembers=False, duplicate_cost=0.0)


def run(quick: bool) -> list[Figure]:
    scale, tolerance = (0.5 * SCALE, 0.04) if quick else (SCALE, 0.02)
    contests = [
        Contest(trace, setup, ladder_of(setup), tolerance, 1)
        for trace in traces(scale)
        if trace.name in TRACES
        for setup in (setup_of(), setup_of(num_host_tokens=HOST_TOKENS))
    ]
    with processes(NUM_JOBS) as pool:
        found = hold(contests, pool)
    return figures_by_tier(contests, found)


def ladder_of(setup: Setup) -> tuple[Variant, ...]:
    """Each step has the ones before, but for those that are marked with -: these are tried and taken back."""
    published = router_of(setup, PolicyConfig("dual_map"), "cached_first")
    ordered = replace(published, queue_order="shortest_remaining")
    pair = replace(ordered, estimates_by_order=True, rebalances=False, policy=PAIR_ALONE)
    fixed = replace(pair, adapts_key_depth=False)
    sampled = with_policy(fixed, num_sampled=2)
    charged = with_policy(sampled, duplicate_cost=PolicyConfig().duplicate_cost)
    remembering = with_policy(charged, remembers=True)
    pulling = with_policy(remembering, pulls=True)
    steps: dict[str, RouterConfig] = {
        "DualMap as published": published,
        "- without its SLO switch": with_policy(published, has_slo_switch=False),
        "- without rebalancing": replace(published, rebalances=False),
        "shortest remaining prefill first": ordered,
        "estimates by the queue's order": replace(ordered, estimates_by_order=True),
        "least estimate of the pair, without rebalancing": pair,
        "key of two blocks": fixed,
        "two sampled workers": sampled,
        "copies charged for": charged,
        "where the last turn was placed": remembering,
        "pulls: the default": pulling,
        "- returns": replace(pulling, returns=True),
        "- rebalancing": replace(pulling, rebalances=True),
        "- Moore-Hodgson": replace(pulling, queue_order="moore_hodgson"),
        "- all workers sampled": with_policy(pulling, num_sampled=8),
    }
    return tuple(contender(f"{step} {label}", router, setup) for step, (label, router) in enumerate(steps.items()))


def with_policy(router: RouterConfig, **settings: Any) -> RouterConfig:
    return replace(router, policy=replace(router.policy, **settings))
