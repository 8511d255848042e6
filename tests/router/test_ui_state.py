from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.events import WorkerDown, WorkerUp
from router.published_view import KnownWorker
from router.recent_requests import FLOW_BUCKET_S, FLOW_WINDOW_S, MAX_RECENT, RecentRequests
from router.ui_state import MAX_SHOWN_FLOWS, MAX_SHOWN_REQUESTS
from tests.router.busy_cluster import DOWN, NOW, BusyCluster, account, ended
from tests.router.values import peer


def told(cluster: BusyCluster, now: float = NOW, known_rings: str = "") -> dict[str, Any]:
    """As the page gets it."""
    state: dict[str, Any] = json.loads(json.dumps(cluster.state(now, known_rings)))
    return state


@pytest.fixture(scope="module")
def large() -> BusyCluster:
    return BusyCluster(50, 50)


def test_every_worker_is_told_and_one_that_is_down_has_no_load(large: BusyCluster) -> None:
    workers = {worker["id"]: worker for worker in told(large)["workers"]}
    assert workers.keys() == {*large.prefill, *large.decode}
    for worker_id, worker in workers.items():
        assert worker["role"] == worker_id.partition("-")[0]
        assert worker["is_up"] == ("blocks" in worker) == (worker_id not in DOWN)
        if worker["is_up"]:
            blocks = worker["blocks"]
            assert blocks["free"] + blocks["cached"] + blocks["held"] + blocks["leased"] == blocks["total"]


def test_a_worker_that_drains_is_up_and_says_so() -> None:
    cluster = BusyCluster(2, 2)
    known = cluster.status.known["prefill-0"]
    cluster.status.note(replace(known, is_draining=True))
    workers = {worker["id"]: worker for worker in told(cluster)["workers"]}
    assert [workers[name]["is_draining"] for name in ("prefill-0", "prefill-1")] == [True, False]
    assert workers["prefill-0"]["is_up"]


def test_the_cluster_says_what_it_waits_for() -> None:
    cluster = BusyCluster(2, 2)
    assert told(cluster)["cluster"]["is_ready"]
    cluster.status.set_expected(2, 3)
    assert not told(cluster)["cluster"]["is_ready"]
    assert told(cluster)["cluster"]["message"] == "4 of 5 workers loaded"


def test_ring_points_are_told_once_for_each_membership(large: BusyCluster) -> None:
    first = told(large)["rings"]
    assert told(large, known_rings=first["version"])["rings"] == {"version": first["version"]}
    other = BusyCluster(2, 1)
    before = told(other)["rings"]
    other.router.on(WorkerDown("prefill-1", "1", "gone"), 0.0)
    other.status.note_down(peer("prefill-1"))
    after = told(other, known_rings=before["version"])["rings"]
    assert (before["worker_ids"], after["worker_ids"]) == (["prefill-0", "prefill-1"], ["prefill-0"])
    assert [ring["shares"] for ring in after["rings"]] == [[1.0], [1.0]]
    assert all(len(ring["points"][0]) == 64 for ring in after["rings"])


def test_no_worker_has_empty_rings() -> None:
    cluster = BusyCluster(1, 1)
    cluster.router.on(WorkerDown("prefill-0", "1", "gone"), 0.0)
    assert [ring["shares"] for ring in told(cluster)["rings"]["rings"]] == [[], []]


def test_shares_are_those_of_the_keys(large: BusyCluster) -> None:
    small = BusyCluster(3, 1)
    rings = told(small)["rings"]
    pair = small.router.view.rings
    keys = [number.to_bytes(8, "little") for number in range(4000)]
    for ring, shown in zip(pair.rings, rings["rings"], strict=True):
        owners = [next(ring.walk(key)) for key in keys]
        for worker_id, share in zip(rings["worker_ids"], shown["shares"], strict=True):
            assert owners.count(worker_id) / len(keys) == pytest.approx(share, abs=0.03)
    for shown in told(large)["rings"]["rings"]:
        assert sum(shown["shares"]) == pytest.approx(1.0)


def test_a_state_of_100_workers_is_small_enough_for_each_second(large: BusyCluster) -> None:
    whole = large.state()
    without_points = large.state(known_rings=whole["rings"]["version"])  # type: ignore[index]
    assert len(json.dumps(without_points)) < 80_000
    assert len(json.dumps(whole)) < 200_000


def test_requests_without_a_worker_or_a_token_count_for_no_latency() -> None:
    cluster = BusyCluster(1, 1)
    cluster.recent = RecentRequests()
    cluster.recent.note(ended("refused", outcome="RESOURCE_EXHAUSTED"))
    cluster.recent.note(ended("ran", ran=account("prefill-0", "decode-0", ttft_s=0.25, tpot_s=0.0125)))
    state = told(cluster)
    assert state["latencies"] == [[0.25, 0.0125]]
    refused, ran = state["requests"]
    assert refused["outcome"] == "RESOURCE_EXHAUSTED" and "prefill_worker" not in refused
    assert (ran["prefill_worker"], ran["decode_worker"], ran["mode"]) == ("prefill-0", "decode-0", "disaggregated")


def test_what_is_kept_and_told_is_bounded() -> None:
    cluster = BusyCluster(20, 20)
    for number in range(3 * MAX_RECENT):
        prefill, decode = cluster.prefill[number % 20], cluster.decode[number // 20 % 20]
        cluster.recent.note(ended(f"request-{number}", ran=account(prefill, decode)))
    state = told(cluster)
    assert [request["id"] for request in state["requests"]] == [
        f"request-{number}" for number in range(3 * MAX_RECENT - MAX_SHOWN_REQUESTS, 3 * MAX_RECENT)
    ]
    assert len(state["latencies"]) == MAX_RECENT
    assert len(state["flows"]) == MAX_SHOWN_FLOWS
    assert state["moved"]["num_handed_over"] >= 3 * MAX_RECENT  # all of them, shown or not


def test_what_was_decoded_where_it_was_prefilled_is_not_handed_over() -> None:
    cluster = BusyCluster(1, 1)
    cluster.recent = RecentRequests()
    for decode in ("decode-0", "decode-0", "prefill-0"):
        cluster.recent.note(ended("ran", ran=account("prefill-0", decode, num_kv_bytes=100)))
    assert told(cluster)["moved"] == {"num_handed_over": 2, "num_local": 1, "num_kv_bytes": 200}


ends = st.tuples(st.floats(0, 300), st.sampled_from("ab"), st.sampled_from("xy"), st.integers(0, 10**9))


@given(st.lists(ends, max_size=60), st.floats(0, 100))
def test_flows_are_those_of_the_last_minute(many: list[tuple[float, str, str, int]], later_s: float) -> None:
    many.sort()
    recent = RecentRequests()
    for at, prefill, decode, num_kv_bytes in many:
        recent.note(ended("request", at, account(prefill, decode, num_kv_bytes=num_kv_bytes)))
    now = (many[-1][0] if many else 0.0) + later_s
    flows = {(flow.prefill_worker, flow.decode_worker): flow for flow in recent.flows(now)}
    for pair in ((prefill, decode) for prefill in "ab" for decode in "xy"):
        of_pair = [one for one in many if one[1:3] == pair]
        surely = [one for one in of_pair if one[0] >= now - FLOW_WINDOW_S]
        at_most = [one for one in of_pair if one[0] >= now - FLOW_WINDOW_S - FLOW_BUCKET_S]
        flow = flows.get(pair)
        assert len(surely) <= (flow.num_requests if flow else 0) <= len(at_most)
        assert sum(one[3] for one in surely) <= (flow.num_kv_bytes if flow else 0) <= sum(one[3] for one in at_most)
    assert [flow.num_requests for flow in flows.values()] == sorted(
        (flow.num_requests for flow in flows.values()), reverse=True
    )


def test_a_clock_that_is_set_back_loses_no_flow() -> None:
    recent = RecentRequests()
    for at in (NOW, NOW - 20.0, NOW + 1.0):
        recent.note(ended("request", at, account("a", "x")))
    assert [flow.num_requests for flow in recent.flows(NOW + 1.0)] == [3]


def test_a_worker_that_comes_back_is_told_as_up() -> None:
    cluster = BusyCluster(4, 1)
    cluster.router.on(WorkerUp(peer("prefill-3", "2")), 0.0)
    cluster.status.note(KnownWorker(peer("prefill-3", "2"), 1, is_up=True))
    worker = next(worker for worker in told(cluster)["workers"] if worker["id"] == "prefill-3")
    assert worker["is_up"] and worker["incarnation"] == "2"
