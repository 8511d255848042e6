"""What Prometheus is told of pulls, as the workers that pull report them. Part of what worker_metrics.py collects."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from protos.types import PullOutcome
from router.cluster_view import WorkerView


def pull_metrics(views: list[WorkerView]) -> Iterator[Metric]:
    """Of those that pull."""
    by_worker = ("worker", "role")
    pulls = CounterMetricFamily(
        "twinring_worker_pulls", "Prefixes that were asked of another worker.", labels=(*by_worker, "outcome")
    )
    tokens = CounterMetricFamily("twinring_worker_pulled_tokens", "Tokens whose KV came so.", labels=by_worker)
    token_s = GaugeMetricFamily("twinring_worker_pull_token_seconds", "Of a pull, for each token.", labels=by_worker)
    base_s = GaugeMetricFamily("twinring_worker_pull_base_seconds", "Of a pull, beside that.", labels=by_worker)
    for view in views:
        cost, stats, labels = view.stats.pull_cost, view.stats.pulls, (view.worker_id, view.ref.role.value)
        if cost is None:
            continue
        num_by_outcome = dict(stats.num_by_outcome)
        for outcome in PullOutcome:
            pulls.add_metric((*labels, outcome.value), num_by_outcome.get(outcome, 0))
        tokens.add_metric(labels, stats.num_tokens)
        token_s.add_metric(labels, cost.s_per_token)
        base_s.add_metric(labels, cost.base_s)
    yield from (pulls, tokens, token_s, base_s)
