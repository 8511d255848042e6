"""One run, from a set-up and requests to a result. The door to the simulator for everything outside."""

from __future__ import annotations

from collections.abc import Iterable

from simulator.cluster import SimulatedCluster
from simulator.requests import SimRequest
from simulator.result import Result, TransferCounts
from simulator.setup import Setup

__all__ = ["Result", "Setup", "simulate"]


def simulate(setup: Setup, requests: Iterable[SimRequest], max_missed: int | None = None) -> Result:
    """The same set-up and requests give the same result. ValueError for requests that are not in order of time.

    max_missed: the run ends when more requests than that have missed their TTFT SLO, and the result is of those that
    had come by then. For a search that only asks whether they do."""
    cluster = SimulatedCluster(setup)
    cluster.run(requests, max_missed)
    if max_missed is None:
        _check_quiet(cluster)
    links, now = cluster.links, cluster.clock.now
    return Result(
        setup,
        tuple(cluster.records),
        tuple(cluster.load.samples),
        cluster.load.uses(now),
        TransferCounts(links.num_arrived, links.num_bytes, tuple(sorted(links.num_lost.items()))),
        cluster.router.statistics,
        now,
        cluster.load.spans(now),
        tuple(cluster.pools.events) if cluster.pools else (),
    )


def _check_quiet(cluster: SimulatedCluster) -> None:
    """A request or a block that is left over is a bug, of a shipping class or of ours."""
    assert all(record.end is not None for record in cluster.records), "a request has not ended"
    assert cluster.router.num_in_flight == 0 and cluster.num_open_transfers == 0
    for worker_id, ledger in cluster.ledgers().items():
        assert ledger.balanced and ledger.held == ledger.leased == ledger.host_leased == 0, (worker_id, ledger)
