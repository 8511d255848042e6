"""Every placement policy on every trace, in the simulator: goodput as the highest rate at which nine requests in ten
meet the TTFT SLO, with equal costs, memory and links; the closest ones under every queue order. docs/routing.md reads
it."""

from __future__ import annotations

from typing import Any

from bench._routing import NUM_JOBS, Cell, Contest, figure_of, hold, setup_of, variant_of
from bench._routing import traces as traces_of
from bench.harness import Figure
from router.policies.config import PolicyName
from router.queue_order import QueueOrderName
from simulator.runs import processes
from simulator.setup import Setup
from simulator.sweep import Variant

DESCRIPTION = "goodput of every placement policy and queue order on every trace, simulated"

BASELINE, DEFAULT, PUBLISHED = "dual_map", "home_pair", "dual_map, cached_first"
WITHOUT_PULLS: tuple[PolicyName, ...] = (
    *("round_robin", "random", "least_loaded", "single_ring", "prefix_hash", "threshold", "overlap_cost"),
)
GLOBAL_WITH_PULLS: tuple[PolicyName, ...] = ("min_ttft", "exploit_explore")
POLICIES: tuple[PolicyName, ...] = ("dual_map", "home_pair", *WITHOUT_PULLS, *GLOBAL_WITH_PULLS)
# Under the other orders: the baseline, the default and the best of the rest.
CLOSEST: tuple[PolicyName, ...] = ("dual_map", "home_pair", "single_ring", "threshold")
MAIN_ORDER: QueueOrderName = "shortest_remaining"
OTHER_ORDERS: tuple[QueueOrderName, ...] = ("first_come", "moore_hodgson")


def run(quick: bool) -> list[Figure]:
    """Four ring seeds under the main order, two under the others."""
    scale, num_seeds, num_other_seeds, tolerance = (0.3, 1, 1, 0.04) if quick else (1.0, 4, 2, 0.02)
    setup = setup_of()
    contests = [
        Contest(trace, setup, variants, tolerance, num)
        for trace in traces_of(scale)
        for variants, num in ((main_variants(setup, quick), num_seeds), (other_variants(setup, quick), num_other_seeds))
        if variants
    ]
    with processes(NUM_JOBS) as pool:
        found = hold(contests, pool)
    by_trace: dict[str, list[Cell]] = {}
    for contest, cells in zip(contests, found, strict=True):
        by_trace.setdefault(contest.trace.name, []).extend(cells)
    references = {contest.trace.name: contest.reference for contest in contests}
    figures: list[Figure] = []
    for trace, reference in references.items():
        figures.append(Figure(f"{trace}/reference", reference, "requests/s"))
        figures += [figure_of(cell, reference) for cell in by_trace[trace]]
        figures += ratios_of(trace, by_trace[trace])
    return figures


def main_variants(setup: Setup, quick: bool) -> tuple[Variant, ...]:
    """DualMap first: where the search for the others begins."""
    found = [variant_of(setup, policy, MAIN_ORDER) for policy in (CLOSEST if quick else POLICIES)]
    return (*found, variant_of(setup, "dual_map", "cached_first"))


def other_variants(setup: Setup, quick: bool) -> tuple[Variant, ...]:
    return () if quick else tuple(variant_of(setup, policy, order) for order in OTHER_ORDERS for policy in CLOSEST)


def ratios_of(trace: str, cells: list[Cell]) -> list[Figure]:
    """Of the default's goodput to the others', order by order."""
    goodput = {cell.label: cell.goodput for cell in cells}
    figures = []
    for order in (MAIN_ORDER, *OTHER_ORDERS):
        own = goodput.get(f"{DEFAULT}, {order}")
        if own is None:
            continue
        rivals: dict[str, float] = {
            policy: goodput[label] for policy in POLICIES if (label := f"{policy}, {order}") in goodput
        }
        best_alone = max(rate for policy, rate in rivals.items() if policy in WITHOUT_PULLS)
        best_global = max((rate for policy, rate in rivals.items() if policy in GLOBAL_WITH_PULLS), default=None)
        alone_target = 1.10 if trace == "long_sessions" else 0.99
        figures.append(Figure(f"{trace}/ratio, {order}, to {BASELINE}", own / rivals[BASELINE], "x", 1.05))
        figures.append(
            Figure(f"{trace}/ratio, {order}, to the best without pulls", own / best_alone, "x", alone_target)
        )
        if best_global is not None:
            figures.append(Figure(f"{trace}/ratio, {order}, to the best global", own / best_global, "x", 0.98))
    own = goodput[f"{DEFAULT}, {MAIN_ORDER}"]
    return [*figures, Figure(f"{trace}/ratio, to {PUBLISHED}", own / goodput[PUBLISHED], "x", 1.15)]


def json_of(figures: list[Figure]) -> dict[str, Any]:
    """Goodput in requests/s by trace and contender, and the rate at which balanced workers with one infinite cache
    saturate."""
    traces: dict[str, Any] = {}
    for figure in figures:
        trace, _, label = figure.key.partition("/")
        entry = traces.setdefault(trace, {"reference": 0.0, "goodput": {}})
        if label == "reference":
            entry["reference"] = figure.value
        elif not label.startswith("ratio"):
            entry["goodput"][label] = figure.value
    return {"traces": traces}
