"""Decode workers that hold a prefix: only the difference moves, and little prefill needs no handoff at all."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.config import PullConfig
from router.config import DecodePolicyName
from router.policies.config import PolicyConfig
from simulator.requests import SimRequest
from simulator.result import End, RequestRecord
from simulator.run import simulate
from tests.simulator.values import BLOCK, HARDWARE, request, setup, workloads

BLOCK_NBYTES = BLOCK * HARDWARE.kv_nbytes_per_token
TURN = tuple(range(10))
REQUESTS = [
    request(0.0, TURN, num_output_tokens=5),
    request(1.0, (100, 101), num_output_tokens=400),  # leaves the first worker less room than the other
    request(1.5, (*TURN, 10, 11), num_output_tokens=5),
]


def next_turn(**router: object) -> RequestRecord:
    records = simulate(setup(num_decode=2, **router), REQUESTS).records
    assert [record.decode_worker for record in records[:2]] == ["decode-0", "decode-0"]
    return records[2]


@pytest.mark.parametrize(
    ("policy", "worker_id", "num_blocks"), [("most_free_blocks", "decode-1", 12), ("held_room", "decode-0", 2)]
)
def test_only_the_difference_moves(policy: DecodePolicyName, worker_id: str, num_blocks: int) -> None:
    record = next_turn(decode_policy=policy)
    assert (record.decode_worker, record.num_kv_bytes) == (worker_id, num_blocks * BLOCK_NBYTES)


@pytest.mark.parametrize("max_tokens", [2 * BLOCK, 2 * BLOCK - 1])
def test_the_difference_is_computed_where_the_rest_is(max_tokens: int) -> None:
    record = next_turn(decode_policy="held_room", max_local_prefill_tokens=max_tokens)
    is_local = max_tokens == 2 * BLOCK
    assert record.decode_worker == "decode-0"
    assert record.prefill_worker == ("decode-0" if is_local else "prefill-0")
    assert (record.num_kv_bytes == 0) == is_local
    assert record.num_cached_tokens == len(TURN) * BLOCK


@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(workloads(), st.integers(30, 60), st.sampled_from((0, BLOCK, 100)), st.sampled_from((0, 128)), st.booleans())
def test_every_request_ends_once_and_nothing_is_left(
    requests: list[SimRequest], num_blocks: int, max_tokens: int, dispatch_tokens: int, pulls: bool
) -> None:
    """Memory is short: guesses at what is held are wrong, handoffs refused, requests preempted."""
    hardware = replace(HARDWARE, num_kv_tokens=num_blocks * BLOCK)
    levers = {"decode_policy": "held_room", "max_local_prefill_tokens": max_tokens, "dispatch_tokens": dispatch_tokens}
    if pulls:
        levers |= {
            "policy": PolicyConfig("home_pair"),
            "pulls": PullConfig(s_per_token=1e-6, max_returns=2),
            "returns": True,
        }
    result = simulate(setup(num_decode=2, hardware=hardware, **levers), requests)
    assert all(record.end is End.FINISHED for record in result.records)
    assert [record.num_output_tokens for record in result.records] == [one.num_output_tokens for one in requests]
