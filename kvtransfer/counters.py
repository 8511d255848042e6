"""How a worker's transfers ended and what its transfer agent has refused, for metrics and tests."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from protos.types import TransferFailure, TransferStats


@dataclass(slots=True)
class TransferCounters:
    num_refused_hellos: int = 0
    num_stale_messages: int = 0  # of another life, attempt or peer than the transfer's
    num_unknown_transfers: int = 0
    num_bad_chunks: int = 0
    num_completed: int = 0  # received whole
    num_bytes: int = 0  # received
    num_failed: Counter[TransferFailure] = field(default_factory=Counter)

    def count_arrived(self, num_bytes: int) -> None:
        self.num_completed += 1
        self.num_bytes += num_bytes

    def count_failed(self, failure: TransferFailure) -> None:
        self.num_failed[failure] += 1

    def stats(self) -> TransferStats:
        return TransferStats(
            self.num_completed,
            self.num_bytes,
            tuple(sorted(self.num_failed.items())),
            num_refused_peers=self.num_refused_hellos,
        )
