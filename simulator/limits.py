"""What no placement can exceed: the rate at which balanced workers saturate, and the latencies of a request alone.
Plain arithmetic over a trace and a cost model; nothing is run."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from statistics import fmean, median
from typing import TYPE_CHECKING

from simulator.transforms import ideal_cached_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from simulator.offered import OfferedLoad
    from simulator.requests import SimRequest
    from simulator.setup import Setup


@dataclass(frozen=True, slots=True)
class Reference:
    """Requests per second at which perfectly balanced workers with one infinite shared cache, full steps and no
    transfers saturate. Orders that let one request in ten be late may pass it."""

    prefill_rate: float
    decode_rate: float  # infinite where nothing decodes

    @property
    def rate(self) -> float:
        return min(self.prefill_rate, self.decode_rate)


def reference_of(requests: Sequence[SimRequest], setup: Setup, num_warmup: int = 0) -> Reference:
    """Of the requests after the first num_warmup, which fill the cache."""
    prefill_s, decode_s = mean_prefill_s(requests, setup, num_warmup), mean_decode_s(requests[num_warmup:], setup)
    if setup.is_colocated:
        both = setup.num_prefill / (prefill_s + decode_s)
        return Reference(both, both)
    decode_rate = math.inf if setup.is_prefill_only or decode_s == 0 else setup.num_decode / decode_s
    return Reference(setup.num_prefill / prefill_s, decode_rate)


def reference_for(offered: OfferedLoad, setup: Setup) -> Reference:
    """Of the requests as they come by themselves. At much higher rates the same number of them would see less of each
    session, and a cache less of its use: an effect of short runs, which is none of the cluster's limits."""
    return reference_of(offered.own, setup, num_before(offered.own, offered.warmup_s))


def num_before(requests: Sequence[SimRequest], end_s: float) -> int:
    """Of at most half the time, so that enough are left to count."""
    return bisect_left(requests, min(end_s, requests[-1].at_s / 2), key=lambda request: request.at_s)


def mean_prefill_s(requests: Sequence[SimRequest], setup: Setup, num_warmup: int = 0) -> float:
    """Of one worker's time per request, in full steps, where only what no earlier prompt had is computed."""
    cost, max_step = setup.hardware.cost, setup.scheduler.max_num_batched_tokens
    token_s = cost.prefill_s([(max_step, 0)]) - cost.prefill_s_per_token_pair * max_step**2 / 2
    times_s = []
    for request, num_cached in list(zip(requests, ideal_cached_tokens(requests), strict=True))[num_warmup:]:
        num_new = request.num_prompt_tokens - num_cached
        pairs = num_new * (num_cached + num_new / 2)
        times_s.append(token_s / max_step * num_new + cost.prefill_s_per_token_pair * pairs)
    return fmean(times_s)


def mean_decode_s(requests: Sequence[SimRequest], setup: Setup) -> float:
    """Of one worker's time per request, in the largest batch that its memory, max_num_seqs and the TPOT SLO allow. The
    first token comes from prefill."""
    num_tokens = sum(request.num_output_tokens - 1 for request in requests)
    if num_tokens == 0 or setup.is_prefill_only:
        return 0.0
    held = sum((r.num_output_tokens - 1) * (r.num_prompt_tokens + r.num_output_tokens / 2) for r in requests)
    context = held / num_tokens  # tokens of KV behind a token that is decoded, on average
    cost = setup.hardware.cost
    seq_s = cost.decode_s_per_seq + cost.decode_s_per_kv_token * context
    by_slo = (setup.router.tpot_slo_s - cost.decode_base_s) / seq_s if seq_s else math.inf
    num_seqs = max(1.0, min(setup.scheduler.max_num_seqs, setup.hardware.num_kv_tokens / context, by_slo))
    return (cost.decode_base_s / num_seqs + seq_s) * num_tokens / len(requests)


def check_slos(requests: Sequence[SimRequest], setup: Setup, min_attainment: float) -> None:
    """ValueError for an SLO that too many requests miss even alone, on a worker that has all that earlier prompts
    share with them: no rate would do."""
    cost, max_step = setup.hardware.cost, setup.scheduler.max_num_batched_tokens
    pairs = list(zip(requests, ideal_cached_tokens(requests), strict=True))
    ttfts_s = [cost.prompt_s(r.num_prompt_tokens - num_cached, num_cached, max_step) for r, num_cached in pairs]
    _check_slo("slo-ttft", setup.router.ttft_slo_s, ttfts_s, min_attainment)
    if not setup.is_prefill_only:
        _check_slo("slo-tpot", setup.router.tpot_slo_s, [_tpot_s(r, cost.decode_s) for r in requests], min_attainment)


def _tpot_s(request: SimRequest, decode_s: Callable[[int, int], float]) -> float:
    return decode_s(1, request.num_prompt_tokens) if request.num_output_tokens > 1 else 0.0


def _check_slo(name: str, slo_s: float, alone_s: Sequence[float], min_attainment: float) -> None:
    if not (math.isfinite(slo_s) and slo_s > 0):
        raise ValueError(f"{name} must be positive, not {slo_s}")
    share = sum(time_s <= slo_s for time_s in alone_s) / len(alone_s)
    if share < min_attainment:
        raise ValueError(
            f"{name} {slo_s:g} s cannot be met: {share:.0%} of the requests would meet it alone on an idle worker "
            f"(half need more than {median(alone_s):.3g} s), and {min_attainment:.0%} must"
        )
