"""Workers that join, leave and are lost in mid-run: the share of requests in their SLO before, while and after, for
DualMap and the default, simulated."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from random import Random
from statistics import fmean

from bench._routing import NUM_JOBS, router_of, setup_of
from bench.harness import Figure
from router.policies.config import PolicyConfig, PolicyName
from router.queue_order import QueueOrderName
from simulator.generator import preset
from simulator.offered import Generated
from simulator.result import ArrivalWindow
from simulator.runs import processes, run_all
from simulator.setup import Change, ChangeKind
from simulator.sweep import MIN_ATTAINMENT, Experiment, contender, run_case

DESCRIPTION = "attainment over time while workers join, leave and are lost, simulated"

CHANGE_S, WINDOW_S, DURATION_S = 120.0, 15.0, 300.0  # after a warm-up of a minute
ORDER: QueueOrderName = "shortest_remaining"
POLICIES: tuple[PolicyName, ...] = ("dual_map", "home_pair")
# Workers before, requests/s, what happens: chosen so that those that are there after it can just serve the rate.
SCENES = {
    "4 join 4": (4, 25.0, [Change(CHANGE_S, ChangeKind.JOIN, f"prefill-{index}") for index in range(4, 8)]),
    "2 of 8 leave": (8, 25.0, [Change(CHANGE_S, ChangeKind.LEAVE, f"prefill-{index}") for index in (2, 5)]),
    "2 of 8 are lost": (8, 25.0, [Change(CHANGE_S, ChangeKind.FAIL, f"prefill-{index}") for index in (2, 5)]),
}


def run(quick: bool) -> list[Figure]:
    pairs = [(scene, policy) for scene in SCENES for policy in POLICIES]
    tasks = [partial(_windows, number, *pair, quick) for number, pair in enumerate(pairs)]
    with processes(NUM_JOBS) as pool:
        found = dict(run_all(tasks, pool))
    return [figure for number, pair in enumerate(pairs) for figure in _figures(*pair, found[number])]


def _windows(number: int, scene: str, policy: PolicyName, quick: bool) -> tuple[int, tuple[ArrivalWindow, ...]]:
    num_prefill, rate, changes = SCENES[scene]
    duration_s = CHANGE_S + 60 if quick else DURATION_S
    setup = replace(setup_of(), num_prefill=num_prefill, changes=tuple(changes))
    variant = contender(policy, router_of(setup, PolicyConfig(policy), ORDER), setup)
    offered = Generated(preset("tool_agent"), round(rate * duration_s), Random, "0/tool_agent")
    experiment = Experiment(offered, setup, (variant,), (rate,), (0,), window_s=WINDOW_S)
    return number, run_case(experiment, variant, rate, 0).windows


def _figures(scene: str, policy: str, windows: tuple[ArrivalWindow, ...]) -> list[Figure]:
    before = [each.attainment for each in windows if 60 <= each.start_s < CHANGE_S and each.num_requests]
    after = [each for each in windows if each.start_s >= CHANGE_S and each.num_requests]
    course = " ".join(f"{each.attainment:.2f}" for each in after)
    note = f"then, every {WINDOW_S:g} s: {course}; {_recovery(after)}"
    return [Figure(f"{scene}/{policy}", fmean(before), "in SLO before", note=note)]


def _recovery(after: list[ArrivalWindow]) -> str:
    """It may take a while until a change is felt."""
    bad = next((index for index, each in enumerate(after) if each.attainment < MIN_ATTAINMENT), None)
    if bad is None:
        return f"never below {MIN_ATTAINMENT:.2f}"
    good = next((each for each in after[bad:] if each.attainment >= MIN_ATTAINMENT), None)
    if good is None:
        return f"never again at {MIN_ATTAINMENT:.2f}"
    return f"again at {MIN_ATTAINMENT:.2f} in the window from {good.start_s - CHANGE_S:g} s on"
