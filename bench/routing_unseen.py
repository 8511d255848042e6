"""DualMap and the default where no setting was chosen by the results: later requests of the conversation trace and
other draws of the generators. With device memory alone and with a host tier, in the simulator."""

from __future__ import annotations

from bench._routing import HOST_TOKENS, NUM_JOBS, Contest, figures_by_tier, hold, setup_of, tier_of, traces, variant_of
from bench.harness import Figure
from router.queue_order import QueueOrderName
from simulator.runs import processes
from simulator.setup import Setup
from simulator.sweep import Variant

DESCRIPTION = "goodput of DualMap and the default on traces that no setting was chosen by, simulated"

ORDER: QueueOrderName = "shortest_remaining"


def run(quick: bool) -> list[Figure]:
    scale, num_seeds, tolerance = (0.3, 1, 0.04) if quick else (1.0, 2, 0.02)
    contests = [
        Contest(trace, setup, variants_of(setup), tolerance, num_seeds)
        for trace in traces(scale, is_unseen=True)
        for setup in (setup_of(), setup_of(num_host_tokens=HOST_TOKENS))
    ]
    with processes(NUM_JOBS) as pool:
        found = hold(contests, pool)
    figures = figures_by_tier(contests, found)
    for contest, (baseline, default) in zip(contests, found, strict=True):
        key = f"{contest.trace.name}/{tier_of(contest.setup)}: ratio to dual_map"
        figures.append(Figure(key, default.goodput / baseline.goodput, "x", 1.05))
    return figures


def variants_of(setup: Setup) -> tuple[Variant, Variant]:
    return variant_of(setup, "dual_map", ORDER), variant_of(setup, "home_pair", ORDER)
