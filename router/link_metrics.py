"""What Prometheus is told about the links that KV travels over, as their sources report them. Part of what
worker_metrics.py collects."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from protos.types import LinkStats
from router.cluster_view import WorkerView

BY_LINK = ("source", "destination", "transport")

COUNTERS: tuple[tuple[str, str, Callable[[LinkStats], float]], ...] = (
    ("bytes", "KV sent over the link.", lambda link: link.num_bytes),
    ("busy_seconds", "Time with at least one chunk on its way.", lambda link: link.busy_s),
    ("failures", "Times that the link was lost or could not be made.", lambda link: link.num_failures),
)


def link_metrics(views: list[WorkerView]) -> Iterator[Metric]:
    links = [(view.worker_id, link) for view in views for link in view.stats.transfers.links]
    for name, text, read in COUNTERS:
        counter = CounterMetricFamily(f"twinring_link_{name}", text, labels=BY_LINK)
        for source, link in links:
            counter.add_metric((source, link.worker_id, link.transport), read(link))
        yield counter
    queued = GaugeMetricFamily("twinring_link_queued_chunks", "Chunks that wait for the link.", labels=BY_LINK)
    for source, link in links:
        queued.add_metric((source, link.worker_id, link.transport), link.num_queued)
    yield queued
