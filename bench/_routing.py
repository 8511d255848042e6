"""What the routing benchmarks share: traces, the cluster, contenders, and the search for each one's goodput. The set-up
is that of docs/routing.md: 8 prefill workers alone, 8b-h100, TTFT within 5 s for nine requests in ten."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from bench.harness import Figure
from protos.cost_model import HARDWARE
from router.config import RouterConfig
from router.key_depth import KeyDepthConfig
from router.policies.config import PolicyConfig, PolicyName
from router.queue_order import QueueOrderName
from simulator.generator import preset
from simulator.limits import reference_for
from simulator.offered import Compressed, Generated, OfferedLoad
from simulator.runs import run_all
from simulator.setup import Setup, default_router, default_scheduler
from simulator.sweep import CaseResult, Experiment, Variant, contender, goodput_of, is_good, search_around
from simulator.traces import read_trace
from simulator.transforms import from_zero, jittered, renumbered, truncated

TRACES = Path(os.environ.get("TWINRING_TRACES", Path(__file__).parents[2] / "shared" / "data" / "traces"))
HARDWARE_NAME = "8b-h100"
TTFT_SLO_S, TPOT_SLO_S = 5.0, 0.05
JITTER_S = 3.0  # the conversation trace has ticks of three seconds
CUT = 20_000
HOST_TOKENS = 4_000_000  # of a host tier, per worker
NUM_STEP_BUDGETS = 2
NUM_JOBS = 2
NUM_REQUESTS = {"conversation": 5000, "synthetic": 3993, "tool_agent": 6000, "long_sessions": 4000}
FIRST_UNSEEN = 6000
RING_SEEDS = (0, 1, 2, 3)
# The others choose alike whatever the rings say.
RING_POLICIES: tuple[PolicyName, ...] = ("single_ring", "prefix_hash", "dual_map", "home_pair")
# The window and the hot share of DualMap's release. Its cold share never takes effect; here a key shrinks at half.
RELEASED_DEPTHS = KeyDepthConfig(window=200, hot_share=0.0612, cold_share=0.0306)


@dataclass(frozen=True, slots=True)
class Trace:
    name: str
    offered: OfferedLoad
    num_warmup: int  # of a trace that is compressed; generated ones have a time


def traces(scale: float = 1.0, is_unseen: bool = False) -> Iterable[Trace]:
    """Public ones only where they are at hand: docs/simulator.md says where from. scale: of the number of requests.
    is_unseen: what no setting was chosen by, later requests of the conversation trace and other generated ones."""
    conversation, synthetic = TRACES / "mooncake_conversation.jsonl.zst", TRACES / "mooncake_synthetic.jsonl.zst"
    if conversation.exists():
        num, first = round(scale * NUM_REQUESTS["conversation"]), FIRST_UNSEEN if is_unseen else 0
        requests = jittered(read_trace(conversation).requests, JITTER_S, Random(0))[first : first + num]
        yield Trace("conversation", Compressed(renumbered(from_zero(requests))), num // 5)
        cut = renumbered(from_zero(truncated(requests, CUT)))
        yield Trace(f"conversation_cut_{CUT}", Compressed(cut), num // 5)
    if synthetic.exists() and not is_unseen:  # windows of it cannot be compared: its hit rate climbs
        num = round(scale * NUM_REQUESTS["synthetic"])
        yield Trace("synthetic", Compressed(renumbered(read_trace(synthetic).requests[:num])), num // 5)
    for name in ("tool_agent", "long_sessions"):
        num = round(scale * NUM_REQUESTS[name])
        yield Trace(name, Generated(preset(name), num, Random, f"{int(is_unseen)}/{name}"), 0)


def setup_of(num_decode: int = 0, num_host_tokens: int = 0) -> Setup:
    scheduler, hardware = default_scheduler(), HARDWARE[HARDWARE_NAME]
    router = replace(
        default_router(),
        ttft_slo_s=TTFT_SLO_S,
        tpot_slo_s=TPOT_SLO_S,
        cost=hardware.cost,
        dispatch_tokens=NUM_STEP_BUDGETS * scheduler.max_num_batched_tokens,
    )
    return Setup(
        hardware=hardware,
        num_prefill=8,
        num_decode=num_decode,
        num_host_tokens=num_host_tokens,
        router=router,
        scheduler=scheduler,
    )


def tier_of(setup: Setup) -> str:
    return "with host tier" if setup.num_host_tokens else "device alone"


def router_of(setup: Setup, policy: PolicyConfig, order: QueueOrderName) -> RouterConfig:
    """As its authors have it, where the order leaves that open: DualMap moves queued requests, adapts its keys and
    reckons with all that is queued. The others know what the order puts before a request."""
    router = replace(setup.router, policy=policy, queue_order=order)
    if policy.name != "dual_map":
        return router
    return replace(router, rebalances=True, estimates_by_order=False, adapts_key_depth=True, key_depth=RELEASED_DEPTHS)


def variant_of(setup: Setup, policy: PolicyName, order: QueueOrderName) -> Variant:
    return contender(f"{policy}, {order}", router_of(setup, PolicyConfig(policy), order), setup)


# --- runs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cell:
    """One contender on one trace: medians over ring seeds, of the runs at its goodput."""

    trace: str
    label: str
    goodput: float
    hit_rate: float
    ideal_hit_rate: float
    pulled_rate: float
    load_cv: float
    ttft_s: tuple[float, float, float]  # p50, p90, p99
    longest_wait_s: float


@dataclass(frozen=True, slots=True)
class Contest:
    """Contenders on one trace under one set-up. The first one's goodput is where the search for the others' begins."""

    trace: Trace
    setup: Setup
    variants: tuple[Variant, ...]
    tolerance: float
    num_seeds: int

    @property
    def reference(self) -> float:
        return reference_for(self.trace.offered, self.setup).rate

    def seeds_of(self, variant: Variant) -> Sequence[int]:
        return RING_SEEDS[: self.num_seeds if variant.router.policy.name in RING_POLICIES else 1]

    def cases(self, variant: Variant, ring_seed: int, guess: float) -> list[CaseResult]:
        """Told on stderr as they are found: a benchmark of this kind takes half an hour."""
        setup = replace(self.setup, num_warmup=self.trace.num_warmup)
        experiment = Experiment(self.trace.offered, setup, (variant,), (guess,), (ring_seed,), self.tolerance)
        cases = search_around(experiment, variant, ring_seed, guess)
        place = f"{self.trace.name}, {tier_of(self.setup)}, ring {ring_seed}"
        print(f"{place}: {variant.label}: {_goodput(cases):.3f}/s", file=sys.stderr, flush=True)
        return cases


def hold(contests: Sequence[Contest], pool: Any) -> list[list[Cell]]:
    """Cells by contest, in the order of its variants. Each step begins where the one before has ended: the first
    contender, then all with one ring seed, then the other seeds."""
    firsts = [partial(one.cases, one.variants[0], 0, one.reference / 2) for one in contests]
    starts = [_goodput(cases) for cases in _in_order(firsts, pool)]
    pairs = [(index, variant) for index, one in enumerate(contests) for variant in one.variants]
    singles = [partial(contests[index].cases, variant, 0, starts[index]) for index, variant in pairs]
    found = [[cases] for cases in _in_order(singles, pool)]
    more = [
        (place, partial(contests[index].cases, variant, seed, _goodput(found[place][0])))
        for place, (index, variant) in enumerate(pairs)
        for seed in contests[index].seeds_of(variant)[1:]
    ]
    for (place, _), cases in zip(more, _in_order([task for _, task in more], pool), strict=True):
        found[place].append(cases)
    cells: list[list[Cell]] = [[] for _ in contests]
    for (index, variant), by_seed in zip(pairs, found, strict=True):
        cells[index].append(_cell(contests[index].trace.name, variant, by_seed))
    return cells


def _in_order(tasks: Sequence[partial[list[CaseResult]]], pool: Any) -> list[list[CaseResult]]:
    numbered = [partial(_numbered, number, task) for number, task in enumerate(tasks)]
    return [cases for _, cases in sorted(run_all(numbered, pool), key=lambda pair: pair[0])]


def _numbered(number: int, task: partial[list[CaseResult]]) -> tuple[int, list[CaseResult]]:
    return number, task()


def _goodput(cases: list[CaseResult]) -> float:
    return goodput_of(cases).rate


def _cell(trace: str, variant: Variant, by_seed: list[list[CaseResult]]) -> Cell:
    best = [max((case for case in cases if is_good(case)), key=lambda case: case.rate) for cases in by_seed]
    summaries = [case.summary for case in best]
    return Cell(
        trace,
        variant.label,
        median(case.rate for case in best),
        median(each.hit_rate for each in summaries),
        median(each.ideal_hit_rate for each in summaries),
        median(each.pulled_rate for each in summaries),
        median(each.load_cv for each in summaries),
        (
            median(each.ttft_p50_s for each in summaries),
            median(each.ttft_p90_s for each in summaries),
            median(each.ttft_p99_s for each in summaries),
        ),
        max(each.longest_wait_s for each in summaries),
    )


# --- figures ------------------------------------------------------------------------------------------------------


def figures_by_tier(contests: Sequence[Contest], found: Sequence[Sequence[Cell]]) -> list[Figure]:
    """For contests that differ in their memory, too."""
    return [
        figure_of(replace(cell, label=f"{tier_of(contest.setup)}: {cell.label}"), contest.reference)
        for contest, cells in zip(contests, found, strict=True)
        for cell in cells
    ]


def figure_of(cell: Cell, reference: float) -> Figure:
    p50, p90, p99 = cell.ttft_s
    note = (
        f"{cell.goodput / reference:.3f} of reference; hit {cell.hit_rate:.1%} of {cell.ideal_hit_rate:.1%}, pulled "
        f"{cell.pulled_rate:.1%}; TTFT {p50:.2f}/{p90:.1f}/{p99:.1f} s, longest {cell.longest_wait_s:.0f} s; "
        f"CV {cell.load_cv:.2f}"
    )
    return Figure(f"{cell.trace}/{cell.label}", cell.goodput, "requests/s", note=note)
