"""Every placement policy on every trace, in the simulator: goodput as the highest rate at which nine requests in ten
meet both SLOs, each policy with each queue order, under equal costs, memory and links. docs/routing.md reads it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from bench.harness import Figure
from protos.cost_model import HARDWARE
from router.policies.config import PolicyConfig, PolicyName
from router.queue_order import QueueOrderName
from simulator.generator import generate, preset
from simulator.limits import reference_of
from simulator.offered import Compressed
from simulator.requests import SimRequest
from simulator.runs import processes, run_all
from simulator.setup import Setup, default_router, default_scheduler
from simulator.sweep import DEFAULT_SHARES, CaseResult, Experiment, Variant, contender, goodput_of, run_case, search
from simulator.traces import read_trace
from simulator.transforms import jittered, renumbered, truncated

DESCRIPTION = "goodput of every placement policy and queue order on every trace, simulated"

TRACES = Path(os.environ.get("TWINRING_TRACES", Path(__file__).parents[2] / "shared" / "data" / "traces"))
HARDWARE_NAME = "8b-h100"
TTFT_SLO_S, TPOT_SLO_S = 5.0, 0.05
JITTER_S = 3.0  # the conversation trace has ticks of three seconds
CUT = 20_000
NUM_STEP_BUDGETS = 2
NUM_JOBS = 2
POLICIES: tuple[PolicyName, ...] = (
    *("round_robin", "random", "least_loaded", "single_ring", "prefix_hash", "threshold", "min_ttft"),
    *("exploit_explore", "overlap_cost", "dual_map", "home_pair"),
)
ORDERS: tuple[QueueOrderName, ...] = ("first_come", "shortest_remaining", "moore_hodgson")
QUICK_POLICIES: tuple[PolicyName, ...] = ("least_loaded", "threshold", "min_ttft", "dual_map", "home_pair")
DEFAULT = "home_pair"


@dataclass(frozen=True, slots=True)
class Cell:
    """One policy under one order on one trace: the median of its goodput over ring seeds."""

    trace: str
    label: str
    goodput: float
    hit_rate: float
    longest_wait_s: float


def run(quick: bool) -> list[Figure]:
    num_requests, seeds, tolerance = (1000, (0,), 0.04) if quick else (4000, (0, 1, 2, 3), 0.02)
    policies, orders = (QUICK_POLICIES, ORDERS[1:2]) if quick else (POLICIES, ORDERS)
    figures: list[Figure] = []
    with processes(NUM_JOBS) as pool:
        for name, requests in traces(num_requests):
            for workers, num_decode in (("8p", 0),) if quick else (("8p", 0), ("8p8d", 8)):
                setup = setup_of(num_decode, len(requests) // 10)
                reference = reference_of(requests, setup).rate
                rates = tuple(reference * share for share in DEFAULT_SHARES)
                variants = variants_of(policies, orders, setup)
                experiment = Experiment(Compressed(requests), setup, variants, rates, seeds, tolerance)
                figures += figures_of(f"{name}/{workers}", experiment, reference, pool)
    return figures


def json_of(figures: list[Figure]) -> dict[str, Any]:
    """Goodput in requests/s by trace and policy, and the rate at which balanced workers with one infinite cache
    saturate."""
    traces: dict[str, Any] = {}
    for figure in figures:
        trace, _, label = figure.key.rpartition("/")
        entry = traces.setdefault(trace, {"reference": 0.0, "goodput": {}})
        if label == "reference":
            entry["reference"] = figure.value
        elif not label.startswith("ratio"):
            entry["goodput"][label] = figure.value
    return {"traces": traces}


# --- what is compared ---------------------------------------------------------------------------------------------


def traces(num_requests: int) -> Iterable[tuple[str, tuple[SimRequest, ...]]]:
    """Public ones only where they are at hand: docs/simulator.md says where from."""
    conversation, synthetic = TRACES / "mooncake_conversation.jsonl.zst", TRACES / "mooncake_synthetic.jsonl.zst"
    if conversation.exists():
        requests = jittered(read_trace(conversation).requests, JITTER_S, Random(0))[:num_requests]
        yield "conversation", renumbered(requests)
        yield f"conversation_cut_{CUT}", renumbered(truncated(requests, CUT))
    if synthetic.exists():
        yield "synthetic", renumbered(read_trace(synthetic).requests[:num_requests])
    for name in ("tool_agent", "long_sessions"):
        yield name, renumbered(generate(preset(name), num_requests, Random(0)))


def variants_of(policies: Iterable[PolicyName], orders: Iterable[QueueOrderName], setup: Setup) -> tuple[Variant, ...]:
    return tuple(
        contender(f"{policy}, {order}", replace(setup.router, policy=PolicyConfig(policy), queue_order=order), setup)
        for policy, order in product(policies, orders)
    )


def setup_of(num_decode: int, num_warmup: int) -> Setup:
    scheduler, hardware = default_scheduler(), HARDWARE[HARDWARE_NAME]
    router = replace(
        default_router(),
        ttft_slo_s=TTFT_SLO_S,
        tpot_slo_s=TPOT_SLO_S,
        cost=hardware.cost,
        dispatch_tokens=NUM_STEP_BUDGETS * scheduler.max_num_batched_tokens,
        rebalances=True,
    )
    return Setup(
        hardware=hardware,
        num_prefill=8,
        num_decode=num_decode,
        router=router,
        scheduler=scheduler,
        num_warmup=num_warmup,
    )


# --- runs ---------------------------------------------------------------------------------------------------------


def figures_of(trace: str, experiment: Experiment, reference: float, pool: Any) -> list[Figure]:
    cells = cells_of(trace, experiment, pool)
    figures = [Figure(f"{trace}/reference", reference, "requests/s")]
    for cell in cells:
        note = f"{cell.goodput / reference:.2f} of reference; hit {cell.hit_rate:.0%}, wait {cell.longest_wait_s:.1f} s"
        figures.append(Figure(f"{trace}/{cell.label}", cell.goodput, "requests/s", note=note))
    by_label = {cell.label: cell.goodput for cell in cells}
    for label, goodput in by_label.items():
        policy, _, order = label.partition(", ")
        baseline = by_label.get(f"dual_map, {order}")
        if policy == DEFAULT and baseline:
            figures.append(Figure(f"{trace}/ratio_to_dual_map, {order}", goodput / baseline, "x", 1.05))
    return figures


def cells_of(trace: str, experiment: Experiment, pool: Any) -> list[Cell]:
    """A sweep of rates, then a search between the last good one and the first bad one."""
    pairs = [(variant, seed) for variant in experiment.variants for seed in experiment.ring_seeds]
    sweep = [partial(run_case, experiment, variant, rate, seed) for variant, seed in pairs for rate in experiment.rates]
    cases = list(run_all(sweep, pool))
    searches = [partial(search, experiment, variant, _known(cases, variant, seed)) for variant, seed in pairs]
    for found in run_all(searches, pool):
        cases += found
    return [_cell(trace, experiment, variant, cases) for variant in experiment.variants]


def _known(cases: Iterable[CaseResult], variant: Variant, seed: int) -> list[CaseResult]:
    return [case for case in cases if (case.label, case.ring_seed) == (variant.label, seed)]


def _cell(trace: str, experiment: Experiment, variant: Variant, cases: list[CaseResult]) -> Cell:
    """Hit rate and longest wait are those of the highest good rate."""
    goodputs = [goodput_of(_known(cases, variant, seed)).rate for seed in experiment.ring_seeds]
    own = [case for case in cases if case.label == variant.label]
    at_goodput = [min(own, key=lambda case: abs(case.rate - rate)).summary for rate in goodputs]
    return Cell(
        trace,
        variant.label,
        median(goodputs),
        median(summary.hit_rate for summary in at_goodput),
        max(summary.longest_wait_s for summary in at_goodput),
    )
