"""Outcomes of one load level to its figures. The shape of `to_dict` is the JSON described in docs/load_testing.md."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.load.outcome import Outcome, Slo

FORMAT_VERSION = 1
MAX_LAG_S = 0.02  # above it the generator's own delay is part of what it measures
MAX_CACHED_EXCESS = 0.05  # of the prompt tokens, beyond the prefix that is shared by intention


@dataclass(frozen=True, slots=True)
class Spread:
    p50: float
    p90: float
    p99: float
    mean: float


@dataclass(frozen=True, slots=True)
class LevelReport:
    name: str  # "rate 2", "concurrency 8", "trace"
    load: float | None  # requests per second, or clients
    offered_s: float  # how long requests were started
    elapsed_s: float  # until the last success ended, if that was later; what the figures per second divide by
    num_sent: int
    num_ok: int
    num_in_slo: int
    errors: dict[str, int]  # by kind
    error_example: str
    ttft_s: Spread | None  # None where nothing was measured
    tpot_s: Spread | None
    itl_s: Spread | None
    e2e_s: Spread | None
    num_prompt_tokens_mean: float | None
    num_output_tokens_mean: float | None
    num_cached_tokens_mean: float | None  # None where the server does not say
    requests_per_s: float
    output_tokens_per_s: float
    goodput_requests_per_s: float
    send_lateness_p99_s: float
    loop_lag_p99_s: float
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        return asdict(self) | {"notes": list(self.notes)}


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks. ValueError where there are no values."""
    if not values:
        raise ValueError("no values to take a percentile of")
    ranked = sorted(values)
    rank = (len(ranked) - 1) * percent / 100
    below = math.floor(rank)
    above = min(below + 1, len(ranked) - 1)
    return ranked[below] + (ranked[above] - ranked[below]) * (rank - below)


def spread_of(values: Sequence[float]) -> Spread | None:
    if not values:
        return None
    p50, p90, p99 = (percentile(values, percent) for percent in (50, 90, 99))
    return Spread(p50, p90, p99, mean=math.fsum(values) / len(values))


def level_report(
    name: str,
    load: float | None,
    outcomes: Sequence[Outcome],
    slo: Slo,
    *,
    offered_s: float,
    loop_lags_s: Sequence[float] = (),
    num_shared_tokens: int | None = 0,  # what a cache may hold of each prompt; None: unknown, as in a trace
) -> LevelReport:
    """What a level came to. Only successes count in latencies and rates; a hung request that timed out does not make
    the others slower."""
    done = [outcome for outcome in outcomes if outcome.is_ok]
    failed = [outcome for outcome in outcomes if not outcome.is_ok]
    elapsed_s = max([offered_s, *(outcome.ended_at for outcome in done)])
    num_in_slo = sum(outcome.meets(slo) for outcome in done)
    lateness_s = percentile([outcome.lateness_s for outcome in outcomes], 99) if outcomes else 0.0
    lag_s = percentile(loop_lags_s, 99) if loop_lags_s else 0.0
    per_s = 1 / elapsed_s if elapsed_s > 0 else 0.0
    return LevelReport(
        name=name,
        load=load,
        offered_s=offered_s,
        elapsed_s=elapsed_s,
        num_sent=len(outcomes),
        num_ok=len(done),
        num_in_slo=num_in_slo,
        errors=dict(Counter(outcome.error or "" for outcome in failed).most_common()),
        error_example=failed[0].error_detail if failed else "",
        ttft_s=spread_of([outcome.ttft_s for outcome in done]),
        tpot_s=spread_of([tpot_s for outcome in done if (tpot_s := outcome.tpot_s) is not None]),
        itl_s=spread_of([itl_s for outcome in done for itl_s in outcome.itls_s]),
        e2e_s=spread_of([outcome.e2e_s for outcome in done]),
        num_prompt_tokens_mean=_mean([outcome.num_prompt_tokens for outcome in done]),
        num_output_tokens_mean=_mean([outcome.num_tokens for outcome in done]),
        num_cached_tokens_mean=_mean([outcome.num_cached_tokens for outcome in done]),
        requests_per_s=len(done) * per_s,
        output_tokens_per_s=sum(outcome.num_tokens for outcome in done) * per_s,
        goodput_requests_per_s=num_in_slo * per_s,
        send_lateness_p99_s=lateness_s,
        loop_lag_p99_s=lag_s,
        notes=tuple(_notes(done, lateness_s, lag_s, num_shared_tokens)),
    )


def _mean(values: Sequence[int | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _notes(done: Sequence[Outcome], lateness_s: float, lag_s: float, num_shared_tokens: int | None) -> list[str]:
    """Why a reader might not trust the figures."""
    notes = []
    if max(lateness_s, lag_s) > MAX_LAG_S:
        notes.append(
            f"the generator itself lagged (p99: sent {lateness_s * 1e3:.0f} ms late, event loop {lag_s * 1e3:.0f} ms): "
            "its delay is part of these latencies"
        )
    if any(outcome.num_output_tokens is None for outcome in done):
        notes.append("the server sent no usage: output tokens are counted as chunks with text")
    num_cached, num_prompt = (
        _mean([outcome.num_cached_tokens for outcome in done]),
        _mean([outcome.num_prompt_tokens for outcome in done]),
    )
    if num_shared_tokens is not None and num_cached is not None and num_prompt is not None:
        excess = num_cached - num_shared_tokens
        if excess > MAX_CACHED_EXCESS * num_prompt:
            notes.append(f"{num_cached:.0f} tokens per prompt came from a cache: take another --seed for new prompts")
    return notes
