"""Placement in a running cluster: what conversations with shared and skewed prefixes find in the caches, and what that
does to their first tokens and to the requests within their SLOs.

Two kinds of workers. Those of the demo model compute, and share this machine's cores with router and client. Those that
are modelled sleep for as long as a step takes on known hardware, and all else is real: they do not take each other's
time, but their KV has 16 bytes a token, so that moving it costs the messages only."""

from __future__ import annotations

import asyncio
import statistics
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bench._conversations import Shape
from bench._live_load import Kind, Load, closed_loop, open_loop
from bench.harness import Figure
from bench.service import serving

DESCRIPTION = "hits, first tokens and goodput of a live cluster by policy; pulls, returns, host memory on and off"

SEED = 7
NUM_ROUNDS = 3
MIB = 2**20

COMMON = ("router.refuses_early=false", "ray.start_timeout_s=180")
ROUND_ROBIN, DUAL_MAP = "router.policy.name=round_robin", "router.policy.name=dual_map"
NOTHING_MOVES = "engine.pulls=null"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Clusters that differ in one thing, under the same arrivals, one after the other. Every one has nothing in its
    caches at first."""

    name: str
    kind: Kind
    settings: tuple[str, ...]
    variants: Mapping[str, tuple[str, ...]]  # the first is what the others are held against
    round_s: float
    rate: float | None = None  # requests/s; None: `load` of what a closed loop gets through on the first variant
    load: float = 1.0


CHATS = Kind(Shape(8, 768, 32, 40, 12), num_new_tokens=40, ttft_slo_s=0.5, tpot_slo_s=0.1)
# Every document is asked about again, as often as any other.
DOCUMENTS = Kind(Shape(24, 1_024, 24, 40, 2, skew=0.0), num_new_tokens=20, ttft_slo_s=0.5, tpot_slo_s=0.1)
LONG_CHATS = Kind(Shape(8, 4_096, 24, 1_024, 8), num_new_tokens=8, ttft_slo_s=2.0, tpot_slo_s=0.1)
# One of four documents has 70 % of the questions, for 20 of them; the next one has been asked about a little by then.
HOT = Kind(Shape(4, 8_192, 32, 512, 1, renew_after=20, skew=2.0), num_new_tokens=8, ttft_slo_s=2.0, tpot_slo_s=0.1)
MODELLED = (
    *("engine.modelled=70b-a100x4", "engine.max_num_batched_tokens=1024", "num_prefill=4", "num_decode=1"),
    "ray.num_cpus_per_worker=0.2",
)

COMPARISONS = (
    Comparison(
        "policies",
        CHATS,
        ("num_prefill=3", "num_decode=1", "engine.num_blocks=400"),
        {
            "round_robin": (ROUND_ROBIN, NOTHING_MOVES),
            "dual_map": (DUAL_MAP, NOTHING_MOVES),
            "home_pair": (NOTHING_MOVES,),
            "default": (),
        },
        round_s=12.0,
        load=1.1,
    ),
    Comparison(
        "small_device",
        DOCUMENTS,
        ("num_prefill=2", "num_decode=1", "engine.num_blocks=1000", "prefill_engine.num_blocks=90", NOTHING_MOVES),
        {"alone": (), "host_memory": (f"prefill_engine.host_cache_bytes={64 * MIB}",)},
        round_s=12.0,
        load=1.1,
    ),
    Comparison(
        "modelled",
        LONG_CHATS,
        (*MODELLED, "prefill_engine.num_blocks=512"),
        {
            "round_robin": (ROUND_ROBIN, NOTHING_MOVES),
            "dual_map": (DUAL_MAP, NOTHING_MOVES),
            "home_pair": (NOTHING_MOVES,),
        },
        round_s=20.0,
        rate=5.0,
    ),
    Comparison(
        "modelled_small_device",
        LONG_CHATS,
        (*MODELLED, "prefill_engine.num_blocks=256", NOTHING_MOVES),
        {"alone": (), "host_memory": (f"prefill_engine.host_cache_bytes={16 * MIB}",)},
        round_s=20.0,
        rate=6.0,
    ),
    Comparison(
        "hot",
        HOT,
        MODELLED,
        {
            "home_pair": (NOTHING_MOVES,),
            "home_pair_pulls": (),
        },
        round_s=15.0,
        rate=12.0,
    ),
)


def run(quick: bool) -> list[Figure]:
    """Quick: one comparison of either kind of workers."""
    comparisons = (COMPARISONS[0], COMPARISONS[-1]) if quick else COMPARISONS
    return [figure for each in comparisons for figure in compared(each, quick)]


def compared(comparison: Comparison, quick: bool) -> list[Figure]:
    """Figures are medians over the rounds."""
    names = list(comparison.variants)
    names = [names[0], names[-1]] if quick else names
    rounds = Rounds(comparison, 1 if quick else NUM_ROUNDS, comparison.round_s / (3 if quick else 1))
    loads: dict[str, list[Load]] = {}
    for name in names:
        with serving((*COMMON, *comparison.settings, *comparison.variants[name])) as address:
            loads[name] = asyncio.run(rounds.of(address))
    note = "" if comparison.rate else f"{comparison.load:g} of a closed loop's, {names[0]}"
    figures = [Figure(f"rate_{comparison.name}", rounds.rate or 0.0, "requests/s", note=note)]
    for name in names:
        figures += figures_of(f"{comparison.name}_{name}", loads[name], loads[names[0]])
    return figures


class Rounds:
    """Invariant: the n-th round is the same load for every cluster."""

    def __init__(self, comparison: Comparison, num_rounds: int, round_s: float) -> None:
        self.rate = comparison.rate
        self._comparison = comparison
        self._num_rounds = num_rounds
        self._round_s = round_s

    async def of(self, address: str) -> list[Load]:
        """One after the other, on a cluster that has just started."""
        kind = self._comparison.kind
        await closed_loop(address, kind, self._round_s / 4, SEED)  # workers measure their speed; it is not asked again
        if self.rate is None:
            capacity = await closed_loop(address, kind, self._round_s, SEED + 1)
            self.rate = self._comparison.load * capacity.outcomes["OK"] / self._round_s
        seeds = range(SEED + 2, SEED + 2 + self._num_rounds)
        return [await open_loop(address, kind, self.rate, self._round_s, 1_000 * seed) for seed in seeds]


def figures_of(name: str, loads: list[Load], baseline: list[Load]) -> list[Figure]:
    def median(value_of: Callable[[Load], float]) -> float:
        return statistics.median(map(value_of, loads))

    outcomes = sum((load.outcomes for load in loads), Counter[str]())
    ended = ", ".join(f"{outcome} {num}" for outcome, num in sorted(outcomes.items()))
    in_slo = "in SLO " + ", ".join(f"{load.in_slo:.2f}" for load in loads)
    ratio = statistics.median(
        ours.goodput / max(1e-9, theirs.goodput) for ours, theirs in zip(loads, baseline, strict=True)
    )
    pulled = f"{median(lambda load: load.pulled):.1%} pulled"
    return [
        Figure(f"goodput_{name}", median(lambda load: load.goodput), "requests/s", note=f"{in_slo}; {ended}"),
        Figure(f"goodput_ratio_{name}", ratio, "", note="to the first; of each round"),
        Figure(f"hit_rate_{name}", median(lambda load: load.hit_rate), "of prompt tokens", note=pulled),
        Figure(f"ttft_ms_p50_{name}", median(lambda load: load.ttft_ms(50)), "ms", better="lower"),
        Figure(f"ttft_ms_p99_{name}", median(lambda load: load.ttft_ms(99)), "ms", better="lower"),
    ]
