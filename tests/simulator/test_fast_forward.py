"""Several tokens in one step change nothing but the time it takes to simulate them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.config import PullConfig
from protos.types import Role
from router.relief import ReliefConfig
from simulator.cluster import SimulatedCluster
from simulator.requests import SimRequest
from simulator.result import Result
from simulator.run import simulate
from simulator.setup import Change, ChangeKind
from tests.simulator.values import BLOCK, HARDWARE, request, setup, workloads

COLOCATED = {"num_decode": 0, "mode": "colocated"}
PULLS = PullConfig(s_per_token=1e-6, deadline_s=0.02)
RELIEF = ReliefConfig(low_freeness=200.0, high_freeness=300.0, min_remaining_tokens=1, cooldown_s=0.1)
RELIEVES = {"relieves": True, "relief": RELIEF, "tick_s": 0.0625}
JOINS = tuple(Change(0.05, ChangeKind.JOIN, name, Role.DECODE) for name in ("decode-1", "decode-2"))
SHAPES = st.sampled_from(
    [
        *({"num_decode": 1}, {"num_decode": 2}, COLOCATED, {**COLOCATED, "pulls": PULLS}),
        *({"num_decode": 1, "changes": JOINS, **RELIEVES}, {**COLOCATED, **RELIEVES}),
    ]
)


def outcome(result: Result) -> tuple[object, ...]:
    return result.records, result.loads, result.transfers, result.router, result.workers


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(workloads(), SHAPES, st.integers(30, 60), st.booleans())
def test_results_are_equal_to_the_last_bit(
    requests: list[SimRequest], shape: dict[str, Any], num_blocks: int, loses_a_worker: bool
) -> None:
    lost = (Change(0.3, ChangeKind.FAIL, "prefill-0"),) if loses_a_worker else ()
    hardware = replace(HARDWARE, num_kv_tokens=num_blocks * BLOCK)
    chosen = setup(**{**shape, "hardware": hardware, "changes": (*shape.get("changes", ()), *lost)})
    assert outcome(simulate(chosen, requests)) == outcome(simulate(replace(chosen, fast_forwards=False), requests))


def test_a_look_at_decode_workers_sees_every_token_that_has_come() -> None:
    """Whether one still pays to move turns on a token, and looks come in mid-step."""
    requests = [request(0.0, tuple(range(10 * i, 10 * i + 10)), num_output_tokens=80) for i in range(3)]
    num_migrations = set()
    for num_tokens in range(55, 75):
        relief = replace(RELIEF, min_remaining_tokens=num_tokens)
        chosen = setup(num_decode=1, changes=JOINS, relieves=True, relief=relief, tick_s=0.1, hardware=HARDWARE)
        found = simulate(chosen, requests)
        assert outcome(found) == outcome(simulate(replace(chosen, fast_forwards=False), requests))
        num_migrations.add(found.router.num_migrations)
    assert len(num_migrations) > 1


def test_it_saves_steps() -> None:
    """A lone request in blocks of 16: its 99 decodes end at a block's end or at its own."""
    cluster = SimulatedCluster(setup(num_prefill=1, num_decode=0, mode="colocated", stats_interval_s=100.0))
    cluster.run([request(0.0, (1,), num_output_tokens=100)])
    [host] = cluster._hosts.values()
    assert host.engine.num_steps == 100
    assert host.core.stats().num_steps == 8
