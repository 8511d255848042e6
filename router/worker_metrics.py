"""What Prometheus is told about workers and the router's own state, read at the moment of a scrape: nothing here costs
a request anything. docs/metrics.md names every metric. Decides which series exist: a worker that is gone has none."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from protos.step_moments import TERMS, AllStepMoments
from protos.types import Role, TransferFailure, WorkerStats
from router.cluster_view import WorkerView
from router.config import RouterConfig
from router.link_metrics import link_metrics
from router.pull_metrics import pull_metrics
from router.router import Router
from router.status import ClusterStatus

BY_WORKER = ("worker", "role")

Reader = Callable[[WorkerStats], float]

GAUGES: tuple[tuple[str, str, Reader], ...] = (
    ("running_requests", "Requests in the running batch.", lambda stats: stats.num_running),
    ("waiting_requests", "Requests on the worker and not in its batch.", lambda stats: stats.num_waiting),
    (
        "pending_prefill_tokens",
        "Prompt tokens the worker has still to compute.",
        lambda stats: stats.num_pending_prefill_tokens,
    ),
    (
        "prefill_token_seconds",
        "What one prompt token costs, as the worker measures it.",
        lambda stats: stats.prefill_s_per_token,
    ),
    ("warm_links", "Peers that KV can be sent to at once.", lambda stats: len(stats.warm_links)),
    (
        "kv_block_bytes",
        "KV of one block, as it travels.",
        lambda stats: stats.transfers.block_nbytes,
    ),
    ("host_blocks", "KV blocks of host memory.", lambda stats: stats.num_host_blocks),
    (
        "cached_host_blocks",
        "KV blocks of host memory that hold part of a prefix.",
        lambda stats: stats.num_cached_host_blocks,
    ),
    (
        "ledger_imbalance",
        "1 where KV blocks are unaccounted for, a leak; else 0.",
        lambda stats: not stats.ledger_balanced,
    ),
)

COUNTERS: tuple[tuple[str, str, Reader], ...] = (
    ("steps", "Engine steps.", lambda stats: stats.num_steps),
    (
        "host_loaded_tokens",
        "Tokens whose KV came back from host memory.",
        lambda stats: stats.num_host_loaded_tokens,
    ),
    ("kv_transfers_completed", "KV transfers this worker received whole.", lambda stats: stats.transfers.num_completed),
    ("kv_transfer_bytes", "KV this worker received.", lambda stats: stats.transfers.num_bytes),
    (
        "refused_peers",
        "Streams of who is no member, or does not know the cluster's secret.",
        lambda stats: stats.transfers.num_refused_peers,
    ),
)

BLOCK_STATES: tuple[tuple[str, Reader], ...] = (
    ("free", lambda stats: stats.num_free_blocks),
    ("cached", lambda stats: stats.num_cached_blocks),
    ("held", lambda stats: stats.num_held_blocks),
    ("leased", lambda stats: stats.num_leased_blocks),
)


class ClusterCollector(Collector):
    def __init__(self, config: RouterConfig, router: Router, status: ClusterStatus) -> None:
        self._config = config
        self._router = router
        self._status = status
        self._moments = AllStepMoments()

    def collect(self) -> Iterator[Metric]:
        yield from self._of_router()
        yield from self._of_pools()
        views = list(self._router.view.workers.values())
        for name, text, read in GAUGES:
            gauge = GaugeMetricFamily(f"twinring_worker_{name}", text, labels=BY_WORKER)
            for view in views:
                gauge.add_metric(_labels(view), read(view.stats))
            yield gauge
        for name, text, read in COUNTERS:
            counter = CounterMetricFamily(f"twinring_worker_{name}", text, labels=BY_WORKER)
            for view in views:
                counter.add_metric(_labels(view), read(view.stats))
            yield counter
        yield from _queued(views)
        yield from pull_metrics(views)
        yield _blocks(views)
        yield _failures(views)
        yield from link_metrics(views)
        yield self._step_moments(views)

    def _of_router(self) -> Iterator[Metric]:
        statistics = self._router.statistics
        text = "Requests taken and not yet ended."
        yield GaugeMetricFamily("twinring_requests_in_flight", text, self._router.num_in_flight)
        yield GaugeMetricFamily("twinring_ttft_slo_seconds", "The setting ttft_slo_s.", self._config.ttft_slo_s)
        yield GaugeMetricFamily("twinring_tpot_slo_seconds", "The setting tpot_slo_s.", self._config.tpot_slo_s)
        yield GaugeMetricFamily("twinring_kv_block_tokens", "The setting block_size.", self._config.block_size)
        yield CounterMetricFamily("twinring_failovers", "Attempts after the first.", statistics.num_failovers)
        text = "Queued requests moved to another worker."
        yield CounterMetricFamily("twinring_rebalanced", text, statistics.num_rebalanced)
        text = "Moves of running decodes to another worker."
        yield CounterMetricFamily("twinring_migrations", text, statistics.num_migrations)
        text = "Moves of running decodes that failed: they stayed where they were."
        yield CounterMetricFamily("twinring_failed_migrations", text, statistics.num_failed_migrations)
        text = "Reports for an attempt, a worker's life or a request that is over."
        yield CounterMetricFamily("twinring_stale_reports", text, statistics.num_stale_reports)

    def _of_pools(self) -> Iterator[Metric]:
        workers = GaugeMetricFamily(
            "twinring_workers", "Known workers, by whether they serve.", labels=("role", "state")
        )
        expected = GaugeMetricFamily("twinring_workers_expected", "Workers there should be.", labels=("role",))
        known = list(self._status.known.values())
        for role in Role:
            for state, is_up in (("up", True), ("down", False)):
                num_workers = sum(worker.ref.role is role and worker.is_up is is_up for worker in known)
                workers.add_metric((role.value, state), num_workers)
            expected.add_metric((role.value,), self._status.num_expected[role])
        yield workers
        yield expected
        up = GaugeMetricFamily("twinring_worker_up", "1 where the worker serves, 0 where it is lost.", labels=BY_WORKER)
        for worker in known:
            up.add_metric((worker.ref.worker_id, worker.ref.role.value), worker.is_up)
        yield up

    def _step_moments(self, views: list[WorkerView]) -> Metric:
        """Of all workers together: series for each of them would cost a scrape more than all others do."""
        text = "Sums over the workers' engine steps that their costs are fitted from, by kind of step."
        moments = CounterMetricFamily("twinring_step_moments", text, labels=("kind", "term"))
        reported = {(view.worker_id, view.ref.incarnation): view.stats.step_moments for view in views}
        for each in self._moments.of_all(reported):
            for term, value in zip(TERMS, each.sums, strict=True):
                moments.add_metric((each.kind.value, term), value)
        return moments


def _queued(views: list[WorkerView]) -> Iterator[Metric]:
    text = "Requests placed on the worker that the router still keeps."
    requests = GaugeMetricFamily("twinring_worker_queued_requests", text, labels=BY_WORKER)
    tokens = GaugeMetricFamily("twinring_worker_queued_tokens", "What these have to compute.", labels=BY_WORKER)
    for view in views:
        requests.add_metric(_labels(view), len(view.queue))
        tokens.add_metric(_labels(view), view.queue.num_tokens)
    yield from (requests, tokens)


def _blocks(views: list[WorkerView]) -> Metric:
    text = "KV blocks: free, cached (free to take, content kept), held by requests, leased to a transfer."
    blocks = GaugeMetricFamily("twinring_worker_kv_blocks", text, labels=(*BY_WORKER, "state"))
    for view in views:
        for state, read in BLOCK_STATES:
            blocks.add_metric((*_labels(view), state), read(view.stats))
    return blocks


def _failures(views: list[WorkerView]) -> Metric:
    text = "KV transfers that ended otherwise, at the end that noticed, by reason."
    failures = CounterMetricFamily("twinring_worker_kv_transfer_failures", text, labels=(*BY_WORKER, "reason"))
    for view in views:
        failed = dict(view.stats.transfers.num_failed)
        for reason in TransferFailure:
            failures.add_metric((*_labels(view), reason.value), failed.get(reason, 0))
    return failures


def _labels(view: WorkerView) -> tuple[str, str]:
    return view.worker_id, view.ref.role.value
