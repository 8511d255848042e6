"""DualMap and the default with 8 prefill and 8 decode workers, in the simulator: goodput within both SLOs, with every
request handed over, and with short rests prefilled where they are decoded."""

from __future__ import annotations

from dataclasses import replace

from bench._routing import NUM_JOBS, Cell, Contest, figure_of, hold, router_of, setup_of, traces, variant_of
from bench.harness import Figure
from router.policies.config import PolicyConfig, PolicyName
from router.queue_order import QueueOrderName
from simulator.runs import processes
from simulator.setup import Setup
from simulator.sweep import Variant, contender

DESCRIPTION = "goodput with prefill and decode workers, with and without conditional disaggregation, simulated"

TRACES = ("conversation", "tool_agent", "long_sessions")
NUM_DECODE = 8
SCALE = 0.5  # of the requests of scripts/bench routing: decoding takes most of the time
ORDER: QueueOrderName = "shortest_remaining"
MAX_LOCAL_TOKENS = 2048
LOCAL = "short rests prefilled locally"
BASELINE: PolicyName = "dual_map"
DEFAULT: PolicyName = "home_pair"


def run(quick: bool) -> list[Figure]:
    scale, tolerance = (0.3 * SCALE, 0.04) if quick else (SCALE, 0.02)
    setup = setup_of(NUM_DECODE)
    chosen = [trace for trace in traces(scale) if trace.name in TRACES]
    contests = [Contest(trace, setup, variants_of(setup), tolerance, 1) for trace in chosen]
    with processes(NUM_JOBS) as pool:
        found = hold(contests, pool)
    figures: list[Figure] = []
    for contest, cells in zip(contests, found, strict=True):
        figures += [figure_of(cell, contest.reference) for cell in cells]
        figures += ratios_of(contest.trace.name, cells)
    return figures


def variants_of(setup: Setup) -> tuple[Variant, ...]:
    policies = (BASELINE, DEFAULT)
    return (
        *(variant_of(setup, policy, ORDER) for policy in policies),
        *(local_variant(setup, policy) for policy in policies),
    )


def local_variant(setup: Setup, policy: PolicyName) -> Variant:
    router = router_of(setup, PolicyConfig(policy), ORDER)
    router = replace(router, decode_policy="held_room", max_local_prefill_tokens=MAX_LOCAL_TOKENS)
    return contender(f"{policy}, {LOCAL}", router, setup)


def ratios_of(trace: str, cells: list[Cell]) -> list[Figure]:
    goodput = {cell.label: cell.goodput for cell in cells}
    own = goodput[f"{DEFAULT}, {ORDER}"]
    local, local_baseline = (goodput[f"{policy}, {LOCAL}"] for policy in (DEFAULT, BASELINE))
    return [
        Figure(f"{trace}/ratio to {BASELINE}", own / goodput[f"{BASELINE}, {ORDER}"], "x", 1.05),
        Figure(f"{trace}/ratio, both with local prefills", local / local_baseline, "x", 1.05),
        Figure(f"{trace}/what local prefills give", local / own, "x"),
    ]
