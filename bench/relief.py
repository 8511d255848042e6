"""Relief of hot decode workers by live migration, with and without it: in the simulator one hot worker beside three
cool ones, and pools of 16 as Llumnix had them (OSDI'24); then one hot worker in a running cluster."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import partial

from bench._relief import Load, Measured, colocated_pool, hot_and_cool, measured, merged, split_pool
from bench._relief_live import live
from bench.harness import Figure
from router.policies.config import PolicyConfig, PolicyName
from router.relief import ReliefConfig
from simulator.runs import processes, run_all
from simulator.setup import Setup

DESCRIPTION = "relief of hot decode workers: TPOT, preemptions and goodput with migration and without"

NUM_JOBS = 2
RELIEF = ReliefConfig()
JOIN_AT_S = 60.0
HOT_RATE = 2.8  # requests/s: about what one worker gets through
SPLIT_RATE, COLOCATED_RATE = 44.0, 36.0  # likewise, of 16
COLOCATED_POLICIES: tuple[PolicyName, ...] = ("least_loaded", "round_robin")


@dataclass(frozen=True, slots=True)
class Case:
    """One set-up under one load, with relief or without."""

    name: str
    relieves: bool
    setup: Setup
    load: Load
    at_s: float | None = None  # only what was there then counts; None: everything


def run(quick: bool) -> list[Figure]:
    cases = [*_hot_cases(2 if quick else 6), *_pool_cases(200 if quick else 2000)]
    found: dict[tuple[str, bool], list[Measured]] = {}
    with processes(NUM_JOBS) as pool:
        for case, part in run_all([partial(_run, case) for case in cases], pool):
            found.setdefault((case.name, case.relieves), []).append(part)
    figures: list[Figure] = []
    for name in dict.fromkeys(case.name for case in cases):
        figures += figures_of(name, *(merged(found[name, relieves]) for relieves in (False, True)))
    without, relieved = (live(relieves, 20.0 if quick else 60.0) for relieves in (False, True))
    return figures + figures_of("live", without, relieved)


def _hot_cases(num_seeds: int) -> list[Case]:
    """What the one worker had when three more joined."""
    load = Load(HOT_RATE, num_requests=int((JOIN_AT_S + 10) * HOT_RATE), mean_prompt=256, mean_output=256, seed=0)
    return [
        Case("hot", relief is not None, hot_and_cool(relief, JOIN_AT_S), replace(load, seed=seed), JOIN_AT_S)
        for seed in range(num_seeds)
        for relief in (None, RELIEF)
    ]


def _pool_cases(num_requests: int) -> list[Case]:
    load = Load(SPLIT_RATE, num_requests, mean_prompt=256, mean_output=256, seed=0)
    cases: list[Case] = []
    for relief in (None, RELIEF):
        cases.append(Case("split16", relief is not None, split_pool(relief), load))
        for name in COLOCATED_POLICIES:
            setup = colocated_pool(relief, PolicyConfig(name))
            cases.append(Case(f"colocated16_{name}", relief is not None, setup, replace(load, rate=COLOCATED_RATE)))
    return cases


def _run(case: Case) -> tuple[Case, Measured]:
    found = measured(case.setup, case.load, case.at_s)
    print(f"{case.name}, seed {case.load.seed}, relief {case.relieves}: {_note(found)}", file=sys.stderr, flush=True)
    return case, found


def figures_of(name: str, without: Measured, relieved: Measured) -> list[Figure]:
    """Relief's own values, and how they compare."""

    def compared(key: str, value: float, other: float, unit: str, higher: bool = False) -> Figure:
        note = f"{other:.3g} without" + (f", {value / other:.2f} of it" if other else "")
        return Figure(f"{name}/{key}", value, unit, better="higher" if higher else "lower", note=note)

    return [
        compared("ttft_p99", relieved.ttft_s(0.99), without.ttft_s(0.99), "s"),
        compared("tpot_p50", 1e3 * relieved.tpot_s(0.5), 1e3 * without.tpot_s(0.5), "ms"),
        compared("tpot_p99", 1e3 * relieved.tpot_s(0.99), 1e3 * without.tpot_s(0.99), "ms"),
        compared("preemptions", relieved.num_preemptions, without.num_preemptions, ""),
        compared("in_slo", relieved.attainment, without.attainment, "of the requests", higher=True),
        compared("goodput", relieved.goodput, without.goodput, "requests/s", higher=True),
        Figure(f"{name}/migrations", relieved.num_migrations, f"of {relieved.num_requests} requests"),
    ]


def _note(found: Measured) -> str:
    return (
        f"{found.num_requests} requests, TTFT p50 {found.ttft_s(0.5):.2f} p99 {found.ttft_s(0.99):.2f} s, TPOT p50 "
        f"{1e3 * found.tpot_s(0.5):.0f} p99 {1e3 * found.tpot_s(0.99):.0f} ms, {found.num_preemptions} preemptions, "
        f"{found.num_local} local, {found.num_migrations} migrated and "
        f"{found.num_failed_migrations} in vain, goodput {found.goodput:.2f}/s"
    )
