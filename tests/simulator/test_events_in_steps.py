"""Events are answered while a step is under way."""

from __future__ import annotations

from dataclasses import replace

from engine.config import PullConfig
from router.policies.config import PolicyConfig
from simulator.run import simulate
from tests.simulator.values import BLOCK, COST, HARDWARE, request, setup

LONG = 200  # blocks
STEP_S = COST.step_s([(LONG * BLOCK, 0)], 0, 0)


def test_a_pull_does_not_wait_for_the_steps_of_the_worker_that_serves_it() -> None:
    """The only holder of a prefix is in the middle of a long step when a request for it comes, to the other worker."""
    chosen = setup(
        num_prefill=2,
        num_decode=0,
        hardware=replace(HARDWARE, num_kv_tokens=10 * LONG * BLOCK),
        max_num_batched_tokens=LONG * BLOCK,
        pulls=PullConfig(s_per_token=1e-6),
        policy=PolicyConfig("min_ttft"),
        cost=COST,
        link_nbytes_per_s=1e9,
    )
    first = [request(10.0 + 1e-6 * i, tuple(range(1000 * i, 1000 * i + 50))) for i in range(2)]
    busy = request(50.0, tuple(range(10_000, 10_000 + LONG)))
    again = request(50.0 + STEP_S / 10, (*first[0].hash_ids, 7, 8))
    holder, other, long, pulling = simulate(chosen, [*first, busy, again]).records
    assert holder.prefill_worker == long.prefill_worker != pulling.prefill_worker == other.prefill_worker
    assert pulling.num_pulled_tokens == 50 * BLOCK
    assert 0 < pulling.pull_s < STEP_S / 10
    assert pulling.first_token_at is not None and long.first_token_at is not None
    assert pulling.first_token_at < long.first_token_at
