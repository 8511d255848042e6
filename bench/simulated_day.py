"""A day whose load rises and falls, and one whose answers also get longer by night: fixed pools against the autoscaler
that ships, with and without change of roles, simulated. SLO attainment, goodput and worker-hours of each."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import cache

from bench._day import Shape, as_they_are, day_of, short_answers_by_day
from bench._routing import TRACES, setup_of
from bench.harness import Figure
from protos.cost_model import HARDWARE
from protos.types import Role
from router.autoscaler import AutoscalerConfig
from simulator.requests import SimRequest
from simulator.result import Result
from simulator.run import simulate
from simulator.setup import Setup
from simulator.traces import read_trace
from simulator.transforms import renumbered

DESCRIPTION = "a day of rising and falling load: fixed pools, autoscaler, change of roles, simulated"

# Long prompts to a large model: a few of them keep workers busy for long, so that a day can be simulated in minutes.
HARDWARE_NAME = "70b-a100x4"
TTFT_SLO_S, TPOT_SLO_S = 15.0, 0.1  # half of the prompts take 2.8 s alone, the longest 9.1 s
MIN_PROMPT_TOKENS, MAX_PROMPT_TOKENS = 8_000, 40_000  # four in ten of the trace
MEAN_RATE = 1.0  # requests/s: 0.4 in the quietest hour, 1.6 in the busiest
HOUR_S, QUICK_HOUR_S = 80.0, 12.0  # an hour of the day lasts so long
WORKER_START_S, SLOW_START_S = 60.0, 180.0  # process and model, until it serves
ALONE = AutoscalerConfig(enabled=True)
WITH_ROLES = replace(ALONE, changes_roles=True)
DAYS: dict[str, Shape] = {"load": as_they_are, "load_and_mix": short_answers_by_day}


@dataclass(frozen=True, slots=True)
class Arm:
    """Pools as they begin, and whether they stay so."""

    day: str
    name: str
    num_prefill: int
    num_decode: int
    autoscaler: AutoscalerConfig | None = None
    worker_start_s: float = WORKER_START_S

    @property
    def setup(self) -> Setup:
        setup, hardware = setup_of(self.num_decode), HARDWARE[HARDWARE_NAME]
        router = replace(setup.router, cost=hardware.cost, ttft_slo_s=TTFT_SLO_S, tpot_slo_s=TPOT_SLO_S)
        return replace(
            setup,
            hardware=hardware,
            num_prefill=self.num_prefill,
            router=replace(router, refuses_early=True),  # as it ships: overload does not pile up
            autoscaler=self.autoscaler or AutoscalerConfig(),
            worker_start_s=self.worker_start_s,
        )


@dataclass(frozen=True, slots=True)
class Measured:
    arm: Arm
    attainment: float
    ttft_attainment: float
    goodput: float  # requests/s
    num_refused: int
    num_workers: tuple[float, float]  # mean over the day: prefill, decode
    num_changes: int

    @property
    def good_per_worker_hour(self) -> float:
        return self.goodput * 3600 / sum(self.num_workers)


PEAK = "fixed for the peak"
ARMS = [
    Arm("load", PEAK, 6, 2),
    Arm("load", "fixed, one fewer than for the peak", 5, 2),
    Arm("load", "fixed for the mean", 3, 1),
    Arm("load", "autoscaler", 3, 1, ALONE),
    Arm("load", "autoscaler, roles change", 3, 1, WITH_ROLES),
    Arm("load_and_mix", PEAK, 6, 4),
    Arm("load_and_mix", "fixed for the mean", 3, 2),
    Arm("load_and_mix", "autoscaler", 3, 2, ALONE),
    Arm("load_and_mix", "autoscaler, roles change", 3, 2, WITH_ROLES),
    Arm("load_and_mix", "autoscaler, start in 180 s", 3, 2, ALONE, SLOW_START_S),
    Arm("load_and_mix", "autoscaler, roles change, start in 180 s", 3, 2, WITH_ROLES, SLOW_START_S),
]


def run(quick: bool) -> list[Figure]:
    if not TRACES.exists():
        raise SystemExit(f"no traces in {TRACES}: see docs/simulator.md, and set TWINRING_TRACES to their folder")
    hour_s = QUICK_HOUR_S if quick else HOUR_S
    found = {arm: measured(arm, hour_s) for arm in ARMS}
    peaks = {arm.day: found[arm] for arm in ARMS if arm.name == PEAK}
    return [figure for arm in ARMS for figure in _figures(found[arm], peaks[arm.day])]


def measured(arm: Arm, hour_s: float) -> Measured:
    """Told on stderr: the whole benchmark takes minutes."""
    requests = requests_of(arm.day, hour_s)
    result = simulate(arm.setup, requests)
    summary, end_s = result.summary(), requests[-1].at_s
    prefill, decode = (result.worker_s(role, 0.0, end_s) / end_s for role in Role)
    one = Measured(
        arm,
        summary.attainment,
        summary.ttft_attainment,
        summary.goodput,
        summary.num_refused,
        (prefill, decode),
        len(result.events),
    )
    print(f"{arm.day}, {arm.name}: {_note(one)}", *_by_hour(result, hour_s), sep="\n  ", file=sys.stderr, flush=True)
    return one


@cache
def requests_of(day: str, hour_s: float) -> tuple[SimRequest, ...]:
    """Arrivals of Azure's conversation trace, bodies of Mooncake's."""
    arrivals = [request.at_s for request in read_trace(TRACES / "azure2023_conv.csv.zst").requests]
    conversations = read_trace(TRACES / "mooncake_conversation.jsonl.zst").requests
    bodies = renumbered(r for r in conversations if MIN_PROMPT_TOKENS <= r.num_prompt_tokens <= MAX_PROMPT_TOKENS)
    return day_of(arrivals, bodies, MEAN_RATE, hour_s, DAYS[day])


def _figures(one: Measured, peak: Measured) -> list[Figure]:
    """Of each what it came to, and its share of what the pools sized for the peak come to."""
    key, hours, peak_hours = f"{one.arm.day}/{one.arm.name}", sum(one.num_workers), sum(peak.num_workers)
    return [
        Figure(f"{key}: in both SLOs", one.attainment, "of the requests", note=_note(one)),
        Figure(f"{key}: goodput", one.goodput, "requests/s", note=f"{one.goodput / peak.goodput:.3f} of the peak's"),
        Figure(f"{key}: workers", hours, "mean", better="lower", note=f"{hours / peak_hours:.2f} of the peak's"),
        Figure(
            f"{key}: in SLOs per worker-hour",
            one.good_per_worker_hour,
            "requests",
            note=f"{one.good_per_worker_hour / peak.good_per_worker_hour:.2f} of the peak's",
        ),
    ]


def _note(one: Measured) -> str:
    prefill, decode = one.num_workers
    return (
        f"{one.attainment:.1%} in both SLOs, {one.ttft_attainment:.1%} in TTFT, {one.num_refused} refused; "
        f"{prefill:.2f} + {decode:.2f} workers, {one.num_changes} changes"
    )


def _by_hour(result: Result, hour_s: float) -> list[str]:
    """And what the autoscaler did in it."""
    lines = []
    for hour, window in enumerate(result.windows(hour_s)):
        end_s = window.start_s + hour_s
        sizes = "+".join(f"{result.worker_s(role, window.start_s, end_s) / hour_s:.1f}" for role in Role)
        done = [event.reason.partition(":")[0] for event in result.events if window.start_s <= event.at_s < end_s]
        lines.append(f"{hour:2} h: {window.num_requests} requests, {window.attainment:.1%}, {sizes}; {', '.join(done)}")
    return lines
