"""What a worker's transfer agent has refused, for metrics and tests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class TransferCounters:
    num_refused_hellos: int = 0
    num_stale_messages: int = 0  # of another life, attempt or peer than the transfer's
    num_unknown_transfers: int = 0
    num_bad_chunks: int = 0
