"""The settings of the baselines, swept on loads that are not reported elsewhere, in the simulator: each one's best, and
where that is not the default, what it then does on the reported loads, beside home_pair."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from bench._routing import NUM_JOBS, Cell, Contest, figure_of, hold, router_of, setup_of, traces, variant_of
from bench.harness import Figure
from router.policies.config import PolicyConfig, PolicyName
from router.queue_order import QueueOrderName
from simulator.runs import processes
from simulator.setup import Setup
from simulator.sweep import Variant, contender

DESCRIPTION = "the baselines' settings, swept on other loads, and their best on the reported ones, simulated"

ORDER: QueueOrderName = "shortest_remaining"
TUNING_SCALE = 0.3
SWEPT: dict[PolicyName, tuple[dict[str, Any], ...]] = {
    "single_ring": tuple({"load_factor": factor} for factor in (1.1, 1.25, 1.5, 2.0)),
    "prefix_hash": tuple({"num_prefix_blocks": num} for num in (2, 4, 8, 16)),
    "threshold": tuple(
        {"min_match_share": share, "max_imbalance_tokens": tokens} for share in (0.25, 0.5) for tokens in (8192, 32_768)
    ),
    "overlap_cost": tuple({"overlap_weight": weight} for weight in (0.5, 1.0, 2.0, 4.0)),
    "exploit_explore": tuple({"min_match_share": share} for share in (0.25, 0.5, 0.75)),
}


def run(quick: bool) -> list[Figure]:
    scale, tolerance = (0.3, 0.04) if quick else (1.0, 0.02)
    setup = setup_of()
    contenders = [(policy, settings) for policy, choices in SWEPT.items() for settings in choices]
    swept = tuple(_variant(setup, policy, settings) for policy, settings in contenders)
    tuning = [Contest(trace, setup, swept, tolerance, 1) for trace in traces(scale * TUNING_SCALE, is_unseen=True)]
    with processes(NUM_JOBS) as pool:
        tuned = hold(tuning, pool)
        best = [_best(policy, tuned, contenders, swept) for policy in SWEPT]
        better = [variant for variant in best if variant.router.policy != PolicyConfig(variant.router.policy.name)]
        rivals = (variant_of(setup, "home_pair", ORDER), *better)
        reported = [Contest(trace, setup, rivals, tolerance, 1) for trace in traces(scale)]
        found = hold(reported, pool)
    figures = [
        _renamed("tuning", figure_of(cell, contest.reference))
        for contest, cells in zip(tuning, tuned, strict=True)
        for cell in cells
    ]
    for contest, cells in zip(reported, found, strict=True):
        figures += [_renamed("reported", figure_of(cell, contest.reference)) for cell in cells]
    return figures


def _variant(setup: Setup, policy: PolicyName, settings: dict[str, Any]) -> Variant:
    words = ", ".join(f"{name} {value:g}" for name, value in settings.items())
    return contender(f"{policy}, {words}", router_of(setup, PolicyConfig(policy, **settings), ORDER), setup)


def _best(
    policy: PolicyName,
    tuned: Sequence[Sequence[Cell]],
    contenders: Sequence[tuple[PolicyName, dict[str, Any]]],
    swept: Sequence[Variant],
) -> Variant:
    """By the product of goodputs over the tuning loads: each load counts alike."""
    places = [place for place, (name, _) in enumerate(contenders) if name == policy]
    return swept[max(places, key=lambda place: prod(cells[place].goodput for cells in tuned))]


def _renamed(prefix: str, figure: Figure) -> Figure:
    return Figure(f"{prefix}: {figure.key}", figure.value, figure.unit, note=figure.note)
