"""Relief under the virtual clock: the shipping policy in front of the shipping workers, with memory that runs short."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from protos.types import Role
from router.relief import ReliefConfig
from simulator.requests import SimRequest
from simulator.result import End, Result
from simulator.run import simulate
from simulator.setup import Change, ChangeKind
from tests.simulator.test_cluster import CAREFULLY
from tests.simulator.values import BLOCK, HARDWARE, request, setup, workloads

JOINS = tuple(Change(0.2, ChangeKind.JOIN, f"decode-{number}", Role.DECODE) for number in (1, 2, 3))
RELIEF = ReliefConfig(low_freeness=40.0, high_freeness=100.0, min_remaining_tokens=8)


def hot_and_cool(relieves: bool) -> Result:
    """Six requests of 6 blocks each, that come to need 12, are on the one worker of 60 when three more join."""
    requests = [request(0.01 * i, tuple(range(10 * i, 10 * i + 6)), num_output_tokens=96) for i in range(6)]
    return simulate(setup(changes=JOINS, relieves=relieves, relief=RELIEF, tick_s=0.1), requests)


def test_requests_move_before_memory_runs_out() -> None:
    alone, relieved = hot_and_cool(False), hot_and_cool(True)
    assert sum(record.num_preemptions for record in alone.records) > 0
    assert sum(record.num_preemptions for record in relieved.records) == 0
    assert 1 <= relieved.router.num_migrations <= 3 and relieved.router.num_failed_migrations == 0
    assert relieved.summary().tpot_p99_s < alone.summary().tpot_p99_s
    assert {record.decode_worker for record in alone.records} == {"decode-0"}
    assert len({record.decode_worker for record in relieved.records}) > 1


@CAREFULLY
@given(
    workloads(),
    st.integers(30, 60),
    st.sampled_from((20.0, 60.0, 300.0)),
    st.sampled_from(({"num_decode": 3}, {"num_decode": 1, "changes": JOINS}, {"num_decode": 0, "mode": "colocated"})),
)
def test_every_request_ends_once_and_nothing_is_left(
    requests: list[SimRequest], num_blocks: int, low: float, shape: dict[str, object]
) -> None:
    """Which simulate() checks of blocks and transfers."""
    relief = ReliefConfig(low_freeness=low, high_freeness=low + 1, min_remaining_tokens=1, cooldown_s=0.2)
    hardware = replace(HARDWARE, num_kv_tokens=num_blocks * BLOCK)
    result = simulate(setup(**shape, hardware=hardware, relieves=True, relief=relief, tick_s=0.05), requests)
    assert all(record.end is End.FINISHED for record in result.records)
    assert [record.num_output_tokens for record in result.records] == [one.num_output_tokens for one in requests]
