"""Running decodes that move between workers under the virtual clock: every request ends, nothing is left over, and the
pause between two tokens does not grow with the context."""

from __future__ import annotations

from itertools import pairwise
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.events import MigrationWanted
from simulator.cluster import SimulatedCluster
from simulator.requests import SimRequest
from simulator.setup import Change, ChangeKind
from tests.simulator.test_cluster import CAREFULLY
from tests.simulator.values import request, setup, workloads


class Migrating(SimulatedCluster):
    """Wants some request to go somewhere, now and then; notes when tokens come."""

    def __init__(self, seed: int, interval_s: float, **changes: Any) -> None:
        super().__init__(setup(**{"num_decode": 3, **changes}))
        self.token_times: dict[str, list[float]] = {}
        self._rng = Random(seed)
        self.clock.after(interval_s, self._repeat, interval_s, self._move_one)

    def _move_one(self) -> None:
        if self._open:
            to = f"decode-{self._rng.randrange(3)}"
            self._feed(MigrationWanted(self._rng.choice(sorted(self._open)), to, "by chance"))

    def _deliver(self, deliver: Any) -> None:
        self.token_times.setdefault(deliver.request_id, []).extend([self.clock.now] * len(deliver.token_ids))
        super()._deliver(deliver)

    def check(self, requests: list[SimRequest]) -> None:
        """As simulate() does: nothing is left."""
        for record, asked in zip(self.records, requests, strict=True):
            assert record.num_output_tokens == asked.num_output_tokens
        assert self.router.num_in_flight == self.num_open_transfers == 0
        for ledger in self.ledgers().values():
            assert ledger.balanced
            assert ledger.held == ledger.leased == 0


@CAREFULLY
@given(workloads(max_requests=12), st.integers(0, 9), st.sampled_from([0.004, 0.02, 0.1]), st.booleans())
def test_requests_that_migrate_end_once_and_nothing_is_left(
    requests: list[SimRequest], seed: int, interval_s: float, loses_one: bool
) -> None:
    changes = (Change(0.15, ChangeKind.FAIL, "decode-1"),) if loses_one else ()
    cluster = Migrating(seed, interval_s, changes=changes)
    cluster.run(requests)
    cluster.check(requests)


@pytest.mark.parametrize("num_blocks", [4, 40])
def test_the_pause_does_not_grow_with_the_context(num_blocks: int) -> None:
    """Its length is that of a step or so, while to copy the longer one takes many."""
    cluster = Migrating(0, 0.1, link_nbytes_per_s=4e6, num_prefill=1, message_s=1e-4, fast_forwards=False)
    cluster.run([request(0.0, tuple(range(num_blocks)), num_output_tokens=300)])
    assert cluster.router.statistics.num_migrations > 2
    assert cluster.router.statistics.num_failed_migrations == 0
    times = cluster.token_times["0"][1:]
    gaps = sorted(after - before for before, after in pairwise(times))
    assert gaps[-1] < gaps[len(gaps) // 2] + 0.012, "more than the last block, there and committed"
