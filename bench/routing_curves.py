"""Goodput and hit rate by rate, as curves, in the simulator: where each policy's knee is, and what comes behind it.
Draws them into the folder TWINRING_FIGURES, where that is set; docs/routing.md shows them."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from bench._routing import HARDWARE_NAME, HOST_TOKENS, NUM_JOBS, setup_of, tier_of, traces, variant_of
from bench.harness import Figure
from router.policies.config import PolicyName
from router.queue_order import QueueOrderName
from simulator.figure import draw
from simulator.limits import reference_for
from simulator.report import Report
from simulator.runs import processes, run_all
from simulator.sweep import CaseResult, Experiment, run_case

DESCRIPTION = "goodput and hit rate by rate as curves, simulated"

ORDER: QueueOrderName = "shortest_remaining"
POLICIES: tuple[PolicyName, ...] = ("dual_map", "home_pair", "threshold", "round_robin")
SCALE = 0.25  # of the requests of scripts/bench routing
SHARES = (0.6, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35)


@dataclass(frozen=True, slots=True)
class Panel:
    """One figure: a load and a memory, and the rate about which the curves bend."""

    trace: str
    num_host_tokens: int
    knee: float  # requests/s, DualMap's


PANELS = (
    Panel("conversation", 0, 20.0),
    Panel("tool_agent", 0, 37.0),
    Panel("tool_agent", HOST_TOKENS, 52.0),
)


def run(quick: bool) -> list[Figure]:
    scale, policies = (0.3 * SCALE, POLICIES[:2]) if quick else (SCALE, POLICIES)
    folder = os.environ.get("TWINRING_FIGURES")
    figures: list[Figure] = []
    for panel in PANELS[:1] if quick else PANELS:
        for trace in (trace for trace in traces(scale) if trace.name == panel.trace):
            setup = replace(setup_of(num_host_tokens=panel.num_host_tokens), num_warmup=trace.num_warmup)
            variants = tuple(variant_of(setup, policy, ORDER) for policy in policies)
            rates = tuple(round(share * panel.knee, 1) for share in SHARES)
            report = report_of(Experiment(trace.offered, setup, variants, rates, (0,)), panel.trace)
            if folder is not None:
                tier = tier_of(setup).replace(" ", "_")
                draw(report, Path(folder) / f"{panel.trace}_{tier}.svg")
            figures += [figure_of(panel.trace, tier_of(setup), case) for case in report.cases]
    return figures


def report_of(experiment: Experiment, source: str) -> Report:
    with processes(NUM_JOBS) as pool:
        tasks = [
            partial(run_case, experiment, variant, rate, 0)
            for variant in experiment.variants
            for rate in experiment.rates
        ]
        cases = sorted(run_all(tasks, pool), key=lambda case: (case.label, case.rate))
    reference = reference_for(experiment.offered, experiment.setup)
    return Report(experiment, source, HARDWARE_NAME, reference, tuple(cases))


def figure_of(trace: str, tier: str, case: CaseResult) -> Figure:
    each = case.summary
    note = f"in SLO {each.attainment:.1%}; hit {each.hit_rate:.1%}; TTFT p50 {each.ttft_p50_s:.2f} s"
    return Figure(f"{trace}/{tier}: {case.label} at {case.rate:g}/s", each.goodput, "requests/s", note=note)
