"""Whole runs: every request ends once, nothing is left over, times are the cost model's arithmetic, and workers may
come and go."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.block_pool import BlockPool
from engine.config import PullConfig
from kvtransfer.source_transfer import SourceTransfer
from protos.types import Role
from router.policies.config import PolicyConfig
from router.router import Router
from simulator.requests import SimRequest
from simulator.result import End
from simulator.run import simulate
from simulator.setup import Change, ChangeKind, Setup
from tests.simulator.values import BLOCK, COST, HARDWARE, request, setup, workloads

MESSAGE_S = 0.0005
PREFILL_ONLY = {"num_decode": 0}
COLOCATED = {"num_decode": 0, "mode": "colocated"}
SPLIT = {"num_decode": 2}
SHAPES = st.sampled_from([PREFILL_ONLY, COLOCATED, SPLIT])
CAREFULLY = settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])


def conserved(chosen: Setup, requests: list[SimRequest]) -> None:
    """simulate() itself looks for requests, transfers and blocks that are left over."""
    result = simulate(chosen, requests)
    assert [record.number for record in result.records] == list(range(len(requests)))
    for record, asked in zip(result.records, requests, strict=True):
        assert record.end is End.FINISHED, record.why
        assert record.num_output_tokens == (1 if chosen.is_prefill_only else asked.num_output_tokens)
        if record.num_attempts == 1 and not chosen.router.dispatch_tokens:
            # Ideal in the order of arrival; a second attempt may hit what the first one computed, and a queue may let
            # a later request go first.
            assert record.num_cached_tokens + record.num_pulled_tokens <= record.num_ideal_cached_tokens
        assert record.ttft_s is not None and record.ttft_s > 2 * MESSAGE_S
    assert result.router.num_finished == len(requests)


@CAREFULLY
@given(workloads(), SHAPES, st.integers(30, 60))
def test_every_request_ends_once_and_nothing_is_left(
    requests: list[SimRequest], shape: dict[str, Any], num_blocks: int
) -> None:
    """Memory is short: requests are preempted, handoffs refused, prefixes evicted."""
    conserved(setup(**shape, hardware=replace(HARDWARE, num_kv_tokens=num_blocks * BLOCK)), requests)


@CAREFULLY
@given(workloads(), st.sampled_from([PREFILL_ONLY, SPLIT]))
def test_pulls_conserve_too(requests: list[SimRequest], shape: dict[str, Any]) -> None:
    conserved(setup(**shape, num_prefill=3, pulls=PullConfig(s_per_token=1e-6)), requests)


@CAREFULLY
@given(workloads(), SHAPES, st.sampled_from(["first_come", "cached_first", "shortest_remaining", "moore_hodgson"]))
def test_queues_of_the_router_conserve_too(requests: list[SimRequest], shape: dict[str, Any], order: str) -> None:
    conserved(setup(**shape, dispatch_tokens=128, queue_order=order, rebalances=True, cost=COST), requests)


changes = st.lists(
    st.tuples(
        st.sampled_from(["prefill-0", "decode-0"]), st.sampled_from(["leave", "fail", "drain"]), st.floats(0.01, 2)
    ),
    max_size=2,
    unique_by=lambda change: change[0],
)


@CAREFULLY
@given(workloads(), SHAPES, changes, st.booleans())
def test_workers_come_and_go(
    requests: list[SimRequest], shape: dict[str, Any], planned: list[tuple[str, str, float]], comes_back: bool
) -> None:
    """A request may fail only by running out of attempts, and what survives has clean ledgers."""
    script: list[Change] = []
    for worker_id, kind, at_s in planned:
        if worker_id.startswith("decode") and not shape.get("num_decode"):
            continue
        script.append(Change(at_s, ChangeKind(kind), worker_id))
        if comes_back and kind != "drain":  # that one goes when it is ready to
            role = Role.PREFILL if worker_id.startswith("prefill") else Role.DECODE
            script.append(Change(at_s + 0.2, ChangeKind.JOIN, worker_id, role))
    conserved(setup(**shape, num_prefill=3, changes=tuple(script), max_attempts=10), requests)


@CAREFULLY
@given(workloads(), SHAPES, st.floats(0.01, 2), st.sampled_from(["prefill-0", "decode-0"]))
def test_a_worker_that_drains_costs_no_request_an_attempt(
    requests: list[SimRequest], shape: dict[str, Any], at_s: float, worker_id: str
) -> None:
    if worker_id.startswith("decode") and not shape.get("num_decode"):
        return
    drain = Change(at_s, ChangeKind.DRAIN, worker_id)
    chosen = setup(**shape, num_prefill=3, changes=(drain,))
    conserved(chosen, requests)
    assert all(record.num_attempts == 1 for record in simulate(chosen, requests).records)


def test_running_decodes_move_out_of_a_worker_that_drains() -> None:
    requests = [request(0.01 * number, (number, number + 100), num_output_tokens=2000) for number in range(6)]
    drain = Change(0.5, ChangeKind.DRAIN, "decode-0")
    roomy = replace(HARDWARE, num_kv_tokens=2000 * BLOCK)
    result = simulate(setup(hardware=roomy, num_prefill=1, num_decode=2, changes=(drain,)), requests)
    assert all(record.end is End.FINISHED and record.num_attempts == 1 for record in result.records)
    assert result.router.num_migrations >= 3


# --- arithmetic ---------------------------------------------------------------------------------------------------


def test_a_lone_request_takes_what_the_cost_model_says_and_two_messages() -> None:
    [record] = simulate(setup(num_prefill=1, num_decode=0), [request(1.0, tuple(range(10)))]).records
    steps = [COST.prefill_s([(64, 0)]), COST.prefill_s([(64, 64)]), COST.prefill_s([(32, 128)])]
    assert record.ttft_s == pytest.approx(sum(steps) + 2 * MESSAGE_S)
    assert sum(steps) == COST.prompt_s(160, 0, 64)


def test_a_lone_colocated_request_decodes_at_the_models_pace() -> None:
    chosen = setup(num_prefill=1, num_decode=0, mode="colocated")
    [record] = simulate(chosen, [request(0.0, (1, 2), num_output_tokens=50)]).records
    decode_s = sum(COST.decode_s(1, 33 + i) for i in range(49))
    assert record.tpot_s == pytest.approx(decode_s / 49)


def test_a_lone_handoff_waits_for_its_transfer_between_the_first_two_tokens() -> None:
    """The transfer is opened with the prefill, so that only what comes after its last block is exposed: chunk, ready,
    bytes, and the latency of the link; commit goes beside the chunk."""
    [record] = simulate(setup(), [request(0.0, (1, 2), num_output_tokens=3)]).records
    num_bytes = 2 * BLOCK * HARDWARE.kv_nbytes_per_token
    assert record.num_kv_bytes == num_bytes
    exposed_s = 3 * MESSAGE_S + num_bytes / 1e8
    decode_s = COST.decode_s(1, 33) + COST.decode_s(1, 34)
    assert record.tpot_s == pytest.approx((exposed_s + decode_s) / 2)
    assert record.ttft_s == pytest.approx(COST.prefill_s([(32, 0)]) + 2 * MESSAGE_S)


def test_a_prompt_seen_before_costs_its_last_block_only() -> None:
    requests = [request(0.0, tuple(range(4))), request(1.0, tuple(range(4)))]
    _, second = simulate(setup(num_prefill=1, num_decode=0), requests).records
    assert second.num_cached_tokens == second.num_ideal_cached_tokens == 3 * BLOCK
    assert second.ttft_s == pytest.approx(COST.prefill_s([(BLOCK, 3 * BLOCK)]) + 2 * MESSAGE_S)


def test_a_prefix_is_pulled_from_its_home_where_that_is_cheaper() -> None:
    """The policy takes turns, so the second request comes to a worker that has nothing; its speed is measured by then,
    and the third finds what the second has pulled."""
    prefix = tuple(range(6))
    first = [request(0.0, (*prefix, 7)), request(0.1, (50, 51, 52))]
    requests = [*first, request(1.0, (*prefix, 8)), request(1.5, (60,)), request(2.0, (*prefix, 9))]
    round_robin = {"policy": PolicyConfig(name="round_robin"), "key_depth_blocks": 1}
    for pulls in (None, PullConfig(s_per_token=1e-6)):
        chosen = setup(num_prefill=3, num_decode=0, pulls=pulls, **round_robin)
        records = simulate(chosen, requests).records
        num_pulled = sum(record.num_pulled_tokens for record in records)
        assert (num_pulled > 0) is (pulls is not None), [(r.prefill_worker, r.num_pulled_tokens) for r in records]


def test_summary_counts_what_meets_both_slos() -> None:
    requests = [request(float(i), (i,), num_output_tokens=2) for i in range(4)]
    chosen = setup(num_prefill=1, num_decode=0, mode="colocated", num_warmup=1)
    summary = simulate(chosen, requests).summary()
    assert (summary.num_requests, summary.attainment) == (3, 1.0)
    assert summary.goodput == summary.offered_rate == pytest.approx(1.0)
    strict = replace(chosen, router=replace(chosen.router, tpot_slo_s=0.001))
    summary = simulate(strict, requests).summary()
    assert (summary.attainment, summary.goodput, summary.ttft_attainment) == (0.0, 0.0, 1.0)


# --- workers ------------------------------------------------------------------------------------------------------


def test_requests_of_a_worker_that_fails_end_elsewhere_after_the_lease() -> None:
    requests = [request(0.01 * i, tuple(range(100 * i, 100 * i + 8)), num_output_tokens=30) for i in range(20)]
    chosen = setup(num_decode=0, mode="colocated", changes=(Change(0.5, ChangeKind.FAIL, "prefill-0"),))
    result = simulate(chosen, requests)
    moved = [record for record in result.records if record.num_attempts == 2]
    assert moved and all(record.end is End.FINISHED for record in result.records)
    for record in moved:
        assert record.prefill_worker == "prefill-1"
        assert record.ended_at is not None and record.ended_at > 0.5 + chosen.router.lease_s
    assert result.router.num_failovers == len(moved)


def test_a_worker_that_joins_takes_load() -> None:
    requests = [request(0.01 * i, (1000 + 2 * i, 1001 + 2 * i)) for i in range(200)]
    joins = (Change(1.0, ChangeKind.JOIN, "prefill-9"),)
    result = simulate(setup(num_decode=0, changes=joins), requests)
    assert any(record.prefill_worker == "prefill-9" and record.at_s > 1.0 for record in result.records)
    assert not any(record.prefill_worker == "prefill-9" and record.at_s < 1.0 for record in result.records)


def test_changes_that_cannot_be_are_refused() -> None:
    for kind, worker_id, words in (("join", "prefill-0", "is up"), ("fail", "prefill-7", "is not up")):
        chosen = setup(changes=(Change(0.5, ChangeKind(kind), worker_id),))
        with pytest.raises(ValueError, match=f"worker {worker_id} {words}"):
            simulate(chosen, [request(1.0, (1,))])


def test_requests_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="request 1 comes at"):
        simulate(setup(), [request(1.0, (1,)), request(0.5, (1,))])


def test_settings_that_cannot_work_are_refused() -> None:
    for field, value in (("num_prefill", 0), ("link_nbytes_per_s", 0.0), ("message_s", -1.0), ("num_warmup", -1)):
        with pytest.raises(ValueError, match=f"{field} must .* got {value}"):
            setup(**{field: value})
    with pytest.raises(ValueError, match="num_decode must be 0 in colocated mode, got 1"):
        setup(mode="colocated")
    with pytest.raises(ValueError, match="block_size must be the same"):
        replace(setup(), router=setup(block_size=2 * BLOCK, hash_block_size=2 * BLOCK).router)


# --- one run is one run -------------------------------------------------------------------------------------------

MIXED = [request(0.02 * i, (i % 7, 100 + i % 3, 1000 + i), num_output_tokens=1 + i % 30) for i in range(120)]
SHORT = setup(num_prefill=3, num_decode=2, hardware=replace(HARDWARE, num_kv_tokens=30 * BLOCK))


def test_the_same_set_up_gives_the_same_run() -> None:
    first, second = simulate(SHORT, MIXED), simulate(SHORT, MIXED)
    assert first.records == second.records
    assert (first.loads, first.workers, first.transfers) == (second.loads, second.workers, second.transfers)


def test_another_ring_seed_gives_another_run() -> None:
    other = replace(SHORT, router=replace(SHORT.router, ring_seed=1))
    assert simulate(SHORT, MIXED).records != simulate(other, MIXED).records


# --- it is the shipping code that runs: a fault there shows here ---------------------------------------------------


def test_a_pool_that_never_finds_a_prefix_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = simulate(SHORT, MIXED).summary()
    monkeypatch.setattr(BlockPool, "find", lambda self, block_hash: None)
    assert simulate(SHORT, MIXED).summary().hit_rate == 0.0 < sound.hit_rate


def test_a_pool_that_forgets_to_release_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    def release_but_one(self: BlockPool, block_ids: list[int]) -> None:
        sound(self, block_ids[1:])

    sound = BlockPool.release
    monkeypatch.setattr(BlockPool, "release", release_but_one)
    with pytest.raises(AssertionError):
        simulate(SHORT, MIXED[:3])


def test_a_router_that_loses_a_report_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Router, "_refused", lambda self, view, refusal, now: [])
    tight = replace(SHORT, hardware=replace(HARDWARE, num_kv_tokens=12 * BLOCK), num_decode=1)
    with pytest.raises(AssertionError, match="has not ended"):
        simulate(tight, [request(0.0, tuple(range(9)), num_output_tokens=40), request(0.0, tuple(range(9)), 40)])


def test_a_source_that_never_commits_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadlines of the machines end it, and the decode workers compute the prompts again."""
    monkeypatch.setattr(SourceTransfer, "_tell_commit", lambda self: [])
    result = simulate(SHORT, MIXED[:3])
    assert dict(result.transfers.num_lost)["timeout"] > 0
    assert all(record.num_kv_bytes == 0 for record in result.records)
