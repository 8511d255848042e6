"""What a run gave: one record per request, samples of the load, and the numbers that sum them up. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from statistics import fmean, pstdev

from protos.types import Role
from router.statistics import RouterStatistics
from simulator.setup import Setup


class End(StrEnum):
    FINISHED = "finished"
    REFUSED = "refused"  # when it arrived
    FAILED = "failed"


@dataclass(slots=True)
class RequestRecord:
    """One request, as its client saw it. Filled in when it ends; nothing else of it is kept."""

    number: int  # its place in the trace
    at_s: float
    num_prompt_tokens: int
    num_ideal_cached_tokens: int  # what one infinite cache of all earlier prompts would have had
    first_token_at: float | None = None
    ended_at: float | None = None  # with the last token, where it finished
    end: End | None = None
    num_output_tokens: int = 0  # delivered
    num_cached_tokens: int = 0  # where it prefilled
    num_pulled_tokens: int = 0  # brought there for it
    pull_s: float = 0.0  # waiting for that, in vain or not
    num_predicted_cached_tokens: int = 0
    num_attempts: int = 0
    num_preemptions: int = 0
    num_kv_bytes: int = 0  # handed over
    transfer_s: float = 0.0
    transfer_exposed_s: float = 0.0
    prefill_worker: str = ""
    decode_worker: str = ""
    why: str = ""  # the reason of its route; of its failure, where it failed

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_at is None else self.first_token_at - self.at_s

    @property
    def tpot_s(self) -> float | None:
        """0 for a single token, None for one that did not finish."""
        if self.end is not End.FINISHED or self.first_token_at is None or self.ended_at is None:
            return None
        return (self.ended_at - self.first_token_at) / max(1, self.num_output_tokens - 1)

    @property
    def wait_s(self) -> float:
        """Until its first token or, without one, its end."""
        until = self.ended_at if self.first_token_at is None else self.first_token_at
        return math.inf if until is None else until - self.at_s

    def meets(self, ttft_slo_s: float, tpot_slo_s: float) -> bool:
        ttft_s, tpot_s = self.ttft_s, self.tpot_s
        return ttft_s is not None and tpot_s is not None and ttft_s <= ttft_slo_s and tpot_s <= tpot_slo_s


@dataclass(frozen=True, slots=True)
class LoadSample:
    """One interval that ended at `at_s`, by prefill worker in the order of worker_ids."""

    at_s: float
    worker_ids: tuple[str, ...]
    busy_shares: tuple[float, ...]
    num_pending_tokens: tuple[int, ...]  # sent there and not yet prefilled, by the router's count

    @property
    def cv(self) -> float | None:
        """Standard deviation over mean of the busy shares; None where nobody was busy."""
        mean = fmean(self.busy_shares) if self.busy_shares else 0.0
        return pstdev(self.busy_shares) / mean if mean > 0 else None


@dataclass(frozen=True, slots=True)
class ArrivalWindow:
    """What became of the requests that came in [start_s, start_s + width_s)."""

    start_s: float
    width_s: float
    num_requests: int
    attainment: float  # nan where none came, as ttft_attainment
    ttft_attainment: float
    num_good: int = 0  # in both SLOs


@dataclass(frozen=True, slots=True)
class WorkerUse:
    worker_id: str
    busy_share: float  # of the time it was up
    num_steps: int


@dataclass(frozen=True, slots=True)
class WorkerSpan:
    """A process that was a worker, from its start (before it has loaded the model) to its end or change of role."""

    worker_id: str
    role: Role
    start_s: float
    end_s: float

    def within_s(self, start_s: float, end_s: float) -> float:
        """How much of it lies in [start_s, end_s)."""
        return max(0.0, min(self.end_s, end_s) - max(self.start_s, start_s))


@dataclass(frozen=True, slots=True)
class PoolEvent:
    """What the autoscaler did."""

    at_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class TransferCounts:
    """Over all workers; num_lost by cause, at the end that counts it."""

    num_arrived: int = 0
    num_bytes: int = 0
    num_lost: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Summary:
    """Of the requests after the warm-up. Latencies are of those that got so far; goodput and attainment are of all."""

    num_requests: int
    num_finished: int
    num_refused: int
    num_failed: int
    offered_rate: float  # requests/s, over the time of arrivals
    goodput: float  # requests/s that met both SLOs, over the time of arrivals
    attainment: float  # share of requests that met both SLOs
    ttft_attainment: float
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    tpot_p99_s: float
    longest_wait_s: float
    hit_rate: float  # of prompt tokens; what was pulled is hit
    pulled_rate: float  # of prompt tokens
    ideal_hit_rate: float
    load_cv: float  # mean over the samples in the time of arrivals; nan where nobody was busy in any


@dataclass(frozen=True, slots=True)
class Result:
    setup: Setup
    records: tuple[RequestRecord, ...]  # in the order of arrival
    loads: tuple[LoadSample, ...]
    workers: tuple[WorkerUse, ...]
    transfers: TransferCounts
    router: RouterStatistics
    ended_at: float
    spans: tuple[WorkerSpan, ...] = ()
    events: tuple[PoolEvent, ...] = ()

    def worker_s(self, role: Role, start_s: float, end_s: float) -> float:
        """How long workers of this role were there, all together."""
        return sum(span.within_s(start_s, end_s) for span in self.spans if span.role is role)

    @property
    def measured(self) -> tuple[RequestRecord, ...]:
        return self.records[self.setup.num_warmup :]

    def summary(self) -> Summary:
        """ValueError where the warm-up leaves no request."""
        measured = self.measured
        if not measured:
            raise ValueError(f"num_warmup {self.setup.num_warmup} leaves none of {len(self.records)} requests")
        slos = self.setup.router.ttft_slo_s, self.setup.router.tpot_slo_s
        num_good = sum(record.meets(*slos) for record in measured)
        span_s = _span_s(measured)
        ttfts = sorted(ttft_s for record in measured if (ttft_s := record.ttft_s) is not None)
        tpots = sorted(tpot_s for record in measured if (tpot_s := record.tpot_s) is not None)
        served = [record for record in measured if record.first_token_at is not None]
        num_pulled = sum(record.num_pulled_tokens for record in served)
        num_served_tokens = sum(record.num_prompt_tokens for record in served)
        return Summary(
            num_requests=len(measured),
            num_finished=sum(record.end is End.FINISHED for record in measured),
            num_refused=sum(record.end is End.REFUSED for record in measured),
            num_failed=sum(record.end is End.FAILED for record in measured),
            offered_rate=len(measured) / span_s,
            goodput=num_good / span_s,
            attainment=num_good / len(measured),
            ttft_attainment=sum(ttft_s <= slos[0] for ttft_s in ttfts) / len(measured),
            ttft_p50_s=percentile(ttfts, 0.5),
            ttft_p90_s=percentile(ttfts, 0.9),
            ttft_p99_s=percentile(ttfts, 0.99),
            tpot_p50_s=percentile(tpots, 0.5),
            tpot_p99_s=percentile(tpots, 0.99),
            longest_wait_s=max((record.wait_s for record in measured if record.end is not None), default=0.0),
            hit_rate=(num_pulled + sum(record.num_cached_tokens for record in served)) / max(1, num_served_tokens),
            pulled_rate=num_pulled / max(1, num_served_tokens),
            ideal_hit_rate=sum(record.num_ideal_cached_tokens for record in measured)
            / sum(record.num_prompt_tokens for record in measured),
            load_cv=self._load_cv(measured[0].at_s, measured[-1].at_s),
        )

    def _load_cv(self, start_s: float, end_s: float) -> float:
        cvs = [cv for load in self.loads if start_s < load.at_s <= end_s and (cv := load.cv) is not None]
        return fmean(cvs) if cvs else math.nan

    def windows(self, width_s: float) -> tuple[ArrivalWindow, ...]:
        """Of all requests, those of the warm-up too, from the beginning to the last arrival."""
        if not width_s > 0:
            raise ValueError(f"width_s must be above 0, got {width_s}")
        num_windows = int(self.records[-1].at_s / width_s) + 1 if self.records else 0
        found: list[list[RequestRecord]] = [[] for _ in range(num_windows)]
        for record in self.records:
            found[int(record.at_s / width_s)].append(record)
        return tuple(self._window(index * width_s, width_s, records) for index, records in enumerate(found))

    def _window(self, start_s: float, width_s: float, records: Sequence[RequestRecord]) -> ArrivalWindow:
        if not records:
            return ArrivalWindow(start_s, width_s, 0, math.nan, math.nan)
        slos = self.setup.router.ttft_slo_s, self.setup.router.tpot_slo_s
        num_in_ttft = sum(record.ttft_s is not None and record.ttft_s <= slos[0] for record in records)
        num_good = sum(record.meets(*slos) for record in records)
        shares = num_good / len(records), num_in_ttft / len(records)
        return ArrivalWindow(start_s, width_s, len(records), *shares, num_good)


def percentile(ordered: Sequence[float], share: float) -> float:
    """Nearest rank; 0 of nothing."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


def _span_s(records: Sequence[RequestRecord]) -> float:
    """From the first arrival to one mean gap after the last: n requests at rate r span n / r."""
    gaps = [later.at_s - earlier.at_s for earlier, later in pairwise(records)]
    return sum(gaps) + fmean(gaps) if gaps and sum(gaps) > 0 else 1.0
