"""What Prometheus is told about requests: latencies by mode, tokens, outcomes, refusals. docs/metrics.md names every
metric. Decides what is counted where; knows nothing of HTTP, and of workers only what worker_metrics.py collects.

Everything here runs on the router's event loop, the exposition too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prometheus_client import CONTENT_TYPE_LATEST as CONTENT_TYPE
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from protos.types import ServingMode
from router.account import RequestAccount
from router.config import RouterConfig
from router.events import Deliver, Fail, RefusedFor
from router.router import Router
from router.status import ClusterStatus
from router.worker_metrics import ClusterCollector

__all__ = ["CONTENT_TYPE", "RouterMetrics"]

FIRST_TOKEN_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.1, 0.2, 0.5, 1.0, 2.5)
REQUEST_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
ROUTE_BUCKETS_S = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 1e-2, 1e-1)

NO_MODE = "none"


@dataclass(slots=True)
class _Open:
    """One choice of a call, from its arrival until its caller has gone."""

    num_prompt_tokens: int
    last_token_at: float | None = None
    has_ended: bool = False


class RouterMetrics:
    """Invariant: a request is remembered from `opened` to `closed`, and counted under exactly one outcome."""

    def __init__(self, config: RouterConfig, router: Router, status: ClusterStatus) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # one more series for every series, and nobody reads them
        self.registry = CollectorRegistry()
        self._config = config
        self._open: dict[str, _Open] = {}
        self._make_latencies()
        self._make_counters()
        self.registry.register(ClusterCollector(config, router, status))
        ProcessCollector(registry=self.registry)

    def exposition(self) -> bytes:
        """The body of a scrape; its type is CONTENT_TYPE."""
        return generate_latest(self.registry)

    # --- what the driver tells ------------------------------------------------------------------------------------

    def opened(self, request_id: str, num_prompt_tokens: int) -> None:
        self._open[request_id] = _Open(num_prompt_tokens)

    def routed(self, route_s: float) -> None:
        """The Router has taken that long over one arrival."""
        self._route.observe(route_s)

    def delivered(self, deliver: Deliver, now: float) -> None:
        """On the path of every token: some microseconds at most."""
        known = self._open.get(deliver.request_id)
        if known is None:
            return
        num_tokens = len(deliver.token_ids)
        if num_tokens:
            self._output_tokens.inc(num_tokens)
            if known.last_token_at is not None:
                itl = self._itl_of_two if len(deliver.workers) == 2 else self._itl_of_one
                itl.observe((now - known.last_token_at) / num_tokens)
            known.last_token_at = now
        if deliver.finish_reason is not None and deliver.account is not None:
            self._end(known, deliver.finish_reason.value)
            self._note_account(known, deliver.account)

    def failed(self, fail: Fail) -> None:
        known = self._open.get(fail.request_id)
        if known is None or known.has_ended:
            return
        if fail.refused_for is None:
            self._end(known, fail.code.lower())
        else:
            known.has_ended = True
            self.refused(fail.refused_for)

    def closed(self, request_id: str) -> None:
        """Its caller has had the last word, or has gone before it."""
        known = self._open.pop(request_id, None)
        if known is not None:
            self._end(known, "cancelled")

    def refused(self, reason: RefusedFor) -> None:
        """For a request that was never opened; those that were come through `failed`."""
        self._outcomes.labels("refused").inc()
        self._refusals.labels(reason.value).inc()

    # --- counting -------------------------------------------------------------------------------------------------

    def _end(self, known: _Open, outcome: str) -> None:
        if not known.has_ended:
            known.has_ended = True
            self._outcomes.labels(outcome).inc()

    def _note_account(self, known: _Open, account: RequestAccount) -> None:
        mode = NO_MODE if account.mode is None else account.mode.value
        if known.last_token_at is not None:
            self._ttft.labels(mode).observe(account.ttft_s)
            self._ttft_misses.inc(account.ttft_s > self._config.ttft_slo_s)
        if account.tpot_s > 0:
            self._tpot.labels(mode).observe(account.tpot_s)
            self._tpot_misses.inc(account.tpot_s > self._config.tpot_slo_s)
        self._e2e.labels(mode).observe(account.e2e_s)
        self._prompt_tokens.inc(known.num_prompt_tokens)
        self._predicted_tokens.inc(account.num_predicted_cached_tokens)
        self._cached_tokens.inc(account.num_cached_tokens)
        self._predicted_pulled_tokens.inc(account.num_predicted_pulled_tokens)
        self._pulled_tokens.inc(account.num_pulled_tokens)
        self._held_tokens.inc(account.num_held_tokens)
        self._kv_bytes.inc(account.num_kv_bytes)
        self._transfer_s.inc(account.transfer_s)
        self._exposed_s.inc(account.transfer_exposed_s)
        self._preemptions.inc(account.num_preemptions)
        if account.mode is ServingMode.RECOMPUTED:
            self._recomputes.inc()

    # --- the metrics ----------------------------------------------------------------------------------------------

    def _make_latencies(self) -> None:
        by_mode: tuple[Literal["mode"]] = ("mode",)
        self._ttft = self._histogram(
            "request_ttft", "From arrival to the first token, by how it was served.", FIRST_TOKEN_BUCKETS_S, by_mode
        )
        self._tpot = self._histogram(
            "request_tpot", "(last token - first token) / (output tokens - 1).", TOKEN_BUCKETS_S, by_mode
        )
        self._e2e = self._histogram("request_e2e", "From arrival to the last word.", REQUEST_BUCKETS_S, by_mode)
        itl = self._histogram(
            "request_itl",
            "Between two tokens, by planned mode; k tokens that come at once count once, as their gap / k.",
            TOKEN_BUCKETS_S,
            by_mode,
        )
        self._itl_of_two, self._itl_of_one = itl.labels("disaggregated"), itl.labels("local")
        self._route = self._histogram("route", "The router's own work to place one arrival.", ROUTE_BUCKETS_S)

    def _make_counters(self) -> None:
        self._outcomes = self._counter("requests", "Requests (choices of a call) by what ended them.", ("outcome",))
        self._refusals = self._counter("requests_refused", "Requests that were not taken, by reason.", ("reason",))
        self._ttft_misses = self._counter("ttft_slo_misses", "Requests whose TTFT exceeded ttft_slo_s.")
        self._tpot_misses = self._counter("tpot_slo_misses", "Requests whose TPOT exceeded tpot_slo_s.")
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of finished requests.")
        self._output_tokens = self._counter("output_tokens", "Tokens delivered to callers.")
        self._predicted_tokens = self._counter(
            "predicted_cached_tokens", "Prompt tokens the router expected in the prefill worker's cache."
        )
        self._cached_tokens = self._counter("cached_tokens", "Prompt tokens found in the prefill worker's cache.")
        self._predicted_pulled_tokens = self._counter(
            "predicted_pulled_tokens", "Prompt tokens the router expected the prefill worker to pull."
        )
        self._pulled_tokens = self._counter("pulled_tokens", "Prompt tokens it pulled from another worker.")
        self._held_tokens = self._counter("held_tokens", "Prompt tokens the decode worker held, so they did not move.")
        self._kv_bytes = self._counter("kv_transfer_bytes", "KV moved for finished requests.")
        self._transfer_s = self._counter("kv_transfer_seconds", "Time in which that KV moved.")
        self._exposed_s = self._counter(
            "kv_transfer_exposed_seconds", "The part of it after prefill's end: what overlap did not hide."
        )
        self._preemptions = self._counter("preemptions", "Running requests put back for want of KV blocks.")
        self._recomputes = self._counter("recomputes", "Requests whose KV was lost and computed again.")
        for reason in RefusedFor:
            self._refusals.labels(reason.value)  # from 0 on, so that the first one is a rise

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()) -> Histogram:
        return Histogram(f"twinring_{name}_seconds", text, labels, buckets=buckets, registry=self.registry)

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"twinring_{name}_total", text, labels, registry=self.registry)
