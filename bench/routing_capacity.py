"""Effective request capacity, the share of requests within the TTFT SLO, below, at and beyond DualMap's knee, in the
simulator: how each policy fails when there is too much to do."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from bench._routing import NUM_JOBS, Contest, Trace, hold, setup_of, traces, variant_of
from bench.harness import Figure
from router.policies.config import PolicyName
from router.queue_order import QueueOrderName
from simulator.runs import processes, run_all
from simulator.setup import Setup
from simulator.sweep import CaseResult, Experiment, Variant, run_case

DESCRIPTION = "share of requests in SLO below, at and beyond DualMap's knee, simulated"

ORDER: QueueOrderName = "shortest_remaining"
POLICIES: tuple[PolicyName, ...] = ("dual_map", "home_pair", "single_ring", "threshold", "min_ttft", "least_loaded")
SHARES = (0.9, 1.0, 1.1, 1.25)  # of DualMap's goodput
TRACES = ("conversation", "tool_agent")


def run(quick: bool) -> list[Figure]:
    scale, tolerance = (0.3, 0.04) if quick else (1.0, 0.02)
    setup = setup_of()
    chosen = [trace for trace in traces(scale) if trace.name in TRACES]
    contests = [Contest(trace, setup, (variant_of(setup, "dual_map", ORDER),), tolerance, 1) for trace in chosen]
    variants = [variant_of(setup, policy, ORDER) for policy in (POLICIES[:2] if quick else POLICIES)]
    with processes(NUM_JOBS) as pool:
        knees = [cells[0].goodput for cells in hold(contests, pool)]
        tasks = [
            partial(_case, trace, setup, variant, share, knee)
            for trace, knee in zip(chosen, knees, strict=True)
            for share in SHARES
            for variant in variants
        ]
        return sorted((_figure(*found) for found in run_all(tasks, pool)), key=lambda figure: figure.key)


def _case(trace: Trace, setup: Setup, variant: Variant, share: float, knee: float) -> tuple[str, float, CaseResult]:
    setup = replace(setup, num_warmup=trace.num_warmup)
    experiment = Experiment(trace.offered, setup, (variant,), (share * knee,), (0,))
    return trace.name, share, run_case(experiment, variant, share * knee, 0)


def _figure(trace: str, share: float, case: CaseResult) -> Figure:
    each = case.summary
    note = (
        f"at {case.rate:.1f}/s; TTFT {each.ttft_p50_s:.2f}/{each.ttft_p90_s:.1f}/{each.ttft_p99_s:.1f} s, longest "
        f"{each.longest_wait_s:.0f} s; hit {each.hit_rate:.1%}"
    )
    return Figure(f"{trace}/{share:.2f} x the knee/{case.label}", each.ttft_attainment, "in SLO", note=note)
