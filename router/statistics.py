"""What a router counts since it began, for metrics and status. Decides nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class RouterStatistics:
    num_finished: int = 0  # with a last Deliver
    num_failed: int = 0
    num_cancelled: int = 0
    num_failovers: int = 0  # attempts after the first
    num_rebalanced: int = 0  # moves of queued requests to another worker
    num_migrations: int = 0  # of running decodes to another worker
    num_failed_migrations: int = 0  # that stayed where they were
    num_stale_reports: int = 0  # from older attempts, other incarnations or workers, or for finished requests
