"""What is counted, over a real Router whose workers are played by hand, and that the docs name all of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.cost_model import PullCost
from protos.step_moments import TERMS, StepKind, StepMoments
from protos.types import (
    FinishReason,
    LinkStats,
    PullOutcome,
    PullStats,
    ServingMode,
    TransferFailure,
    TransferStats,
    WorkerAccount,
)
from router.driver import Driver
from router.events import Arrived, Fail, RefusedFor, Send, WorkerDown, WorkerUp
from router.metrics import RouterMetrics
from router.published_view import KnownWorker
from router.router import Router
from router.status import ClusterStatus
from router.worker_channel import WorkerChannel
from tests.router.values import CONFIG, Transfers, arrived, output, peer, reported, stats

ROOT = Path(__file__).resolve().parent.parent.parent
PROMPT = list(range(9))
P0 = {"worker": "p-0", "role": "prefill"}
MOMENTS = (StepMoments(StepKind.DECODE, tuple(0.5 + i for i in range(len(TERMS)))),)


class Recorder(WorkerChannel):
    """A channel that keeps what it is given."""

    def __init__(self) -> None:
        self.sent: list[Send] = []

    def send(self, send: Send) -> None:
        self.sent.append(send)


class Cluster:
    """A driver with its metrics, and a clock that the test sets."""

    def __init__(self, *worker_ids: str) -> None:
        self.now = 0.0
        self.router = Router(CONFIG, Transfers())
        self.status = ClusterStatus(CONFIG, self.router.view)
        self.metrics = RouterMetrics(CONFIG, self.router, self.status)
        self.driver = Driver(self.router, CONFIG, self.metrics, lambda: self.now)
        for worker_id in worker_ids:
            self.join(worker_id)

    def join(self, worker_id: str) -> None:
        self.driver.channels[worker_id] = Recorder()
        self.driver.feed(WorkerUp(peer(worker_id)))
        self.status.note(KnownWorker(peer(worker_id), 1, is_up=True))
        self.driver.feed(reported(worker_id, stats=stats(step_moments=MOMENTS, pull_cost=PullCost(2e-6, 0.01))))

    def report(self, at: float, worker_id: str, *outputs: object, **fields: object) -> None:
        self.now = at
        self.driver.feed(reported(worker_id, *outputs, **fields))  # type: ignore[arg-type]

    def value(self, name: str, **labels: str) -> float:
        """0 where there is no such series."""
        return self.metrics.registry.get_sample_value(f"twinring_{name}", labels) or 0.0

    def total(self, name: str) -> float:
        """Of all labels."""
        families = self.metrics.registry.collect()
        return sum(s.value for family in families for s in family.samples if s.name == f"twinring_{name}")


def serve_disaggregated(cluster: Cluster, request_id: str = "r1") -> None:
    cluster.now = 10.0
    calls = cluster.driver.open_calls([arrived(request_id, PROMPT, max_tokens=4)])
    cached = WorkerAccount(num_cached_tokens=4, num_pulled_tokens=2, num_preemptions=1)
    cluster.report(10.5, "p-0", output(request_id, 0, 7, account=cached))
    cluster.report(11.0, "d-0", output(request_id, 1, 8, 9))
    account = WorkerAccount(
        num_kv_bytes=4096,
        transfer_s=0.5,
        transfer_exposed_s=0.125,
        num_held_tokens=4,
        mode=ServingMode.DISAGGREGATED,
    )
    cluster.report(11.25, "d-0", output(request_id, 3, 10, finish=FinishReason.LENGTH, account=account))
    cluster.driver.close_calls(calls)


def test_a_disaggregated_request_is_told_whole() -> None:
    cluster = Cluster("p-0", "d-0")
    serve_disaggregated(cluster)
    assert cluster.value("requests_total", outcome="length") == cluster.total("requests_total") == 1
    mode = {"mode": "disaggregated"}
    assert cluster.value("request_ttft_seconds_sum", **mode) == 0.5
    assert cluster.value("request_ttft_seconds_bucket", le="0.5", **mode) == 1
    assert cluster.value("request_ttft_seconds_bucket", le="0.25", **mode) == 0
    assert cluster.value("request_tpot_seconds_sum", **mode) == 0.75 / 3
    assert cluster.value("request_e2e_seconds_sum", **mode) == 1.25
    assert cluster.value("request_itl_seconds_sum", **mode) == 0.5 / 2 + 0.25
    assert cluster.value("request_itl_seconds_count", **mode) == 2, "two tokens at once count once"
    assert cluster.total("request_ttft_seconds_count") == cluster.total("request_e2e_seconds_count") == 1
    assert cluster.value("prompt_tokens_total") == 9
    assert cluster.value("output_tokens_total") == 4
    assert cluster.value("cached_tokens_total") == 4
    assert cluster.value("pulled_tokens_total") == 2
    assert cluster.value("predicted_cached_tokens_total") == cluster.value("predicted_pulled_tokens_total") == 0
    assert cluster.value("held_tokens_total") == 4
    assert cluster.value("kv_transfer_bytes_total") == 4096
    assert cluster.value("kv_transfer_seconds_total") == 0.5
    assert cluster.value("kv_transfer_exposed_seconds_total") == 0.125
    assert cluster.value("preemptions_total") == 1
    assert cluster.value("recomputes_total") == cluster.value("failovers_total") == 0
    assert cluster.value("ttft_slo_misses_total") == 0
    assert cluster.value("tpot_slo_misses_total") == 1, "0.25 s a token, 0.1 s are allowed"
    assert cluster.value("route_seconds_count") == 1


def test_what_the_router_expects_in_a_cache_is_counted() -> None:
    cluster = Cluster("p-0", "d-0")
    serve_disaggregated(cluster)
    serve_disaggregated(cluster, "r2")
    assert cluster.value("predicted_cached_tokens_total") == 8, "two whole blocks of the second prompt"


def test_a_late_first_token_misses_the_slo() -> None:
    cluster = Cluster("p-0")
    calls = cluster.driver.open_calls([arrived("r1", PROMPT, max_tokens=1)])
    cluster.report(CONFIG.ttft_slo_s + 0.1, "p-0", output("r1", 0, 7, finish=FinishReason.LENGTH))
    cluster.driver.close_calls(calls)
    assert cluster.value("ttft_slo_misses_total") == 1
    assert cluster.value("ttft_slo_seconds") == CONFIG.ttft_slo_s
    assert cluster.value("tpot_slo_seconds") == CONFIG.tpot_slo_s
    assert cluster.total("request_tpot_seconds_count") == 0, "one token has no time per further token"


def test_one_worker_for_both_is_local() -> None:
    cluster = Cluster("p-0")
    calls = cluster.driver.open_calls([arrived("r1", PROMPT)])
    assert cluster.value("requests_in_flight") == 1
    cluster.report(1.0, "p-0", output("r1", 0, 7))
    cluster.report(1.5, "p-0", output("r1", 1, 8, finish=FinishReason.STOP))
    cluster.driver.close_calls(calls)
    assert cluster.value("request_itl_seconds_sum", mode="local") == 0.5
    assert cluster.value("request_ttft_seconds_count", mode="local") == 1
    assert cluster.value("requests_total", outcome="stop") == 1
    assert cluster.value("requests_in_flight") == 0


def test_recomputes_and_failovers() -> None:
    cluster = Cluster("p-0", "d-0", "d-1")
    calls = cluster.driver.open_calls([arrived("r1", PROMPT, max_tokens=3)])
    cluster.report(1.0, "p-0", output("r1", 0, 7))
    lost = next(name for name in ("d-0", "d-1") if cluster.driver.channels[name].sent)  # type: ignore[attr-defined]
    cluster.driver.feed(WorkerDown(lost, "1", "killed"))
    cluster.status.note_down(peer(lost))
    other = "d-1" if lost == "d-0" else "d-0"
    account = WorkerAccount(mode=ServingMode.RECOMPUTED, mode_reason="checksum mismatch")
    cluster.report(2.0, "p-0", output("r1", 1, 8, attempt=2))
    cluster.report(3.0, other, output("r1", 2, 9, attempt=2, finish=FinishReason.LENGTH, account=account))
    cluster.driver.close_calls(calls)
    assert cluster.value("failovers_total") == 1
    assert cluster.value("recomputes_total") == 1
    assert cluster.value("request_e2e_seconds_count", mode="recomputed") == 1
    assert cluster.value("workers", role="decode", state="up") == 1
    assert cluster.value("workers", role="decode", state="down") == 1
    assert cluster.value("worker_up", worker=lost, role="decode") == 0
    assert cluster.metrics.registry.get_sample_value("twinring_worker_running_requests", {"worker": lost}) is None


def test_refusals_and_cancellations() -> None:
    cluster = Cluster("p-0")
    first = cluster.driver.open_calls([arrived("r1", PROMPT, client_id="mine")])
    second = cluster.driver.open_calls([arrived("r2", PROMPT, client_id="mine")])
    cluster.driver.close_calls(second)
    cluster.driver.close_calls(first)
    cluster.metrics.refused(RefusedFor.NOT_READY)
    assert cluster.value("requests_refused_total", reason="duplicate_id") == 1
    assert cluster.value("requests_refused_total", reason="not_ready") == 1
    assert cluster.value("requests_total", outcome="refused") == cluster.total("requests_refused_total") == 2
    assert cluster.value("requests_total", outcome="cancelled") == 1


def test_a_failure_is_named_by_its_status() -> None:
    cluster = Cluster("p-0")
    calls = cluster.driver.open_calls([arrived("r1", PROMPT)])
    cluster.report(1.0, "p-0", output("r1", 0, finish=FinishReason.ERROR, error="broken"))
    cluster.driver.close_calls(calls)
    assert cluster.value("requests_total", outcome="internal") == cluster.total("requests_total") == 1


def test_workers_are_told_as_they_report() -> None:
    cluster = Cluster("p-0", "d-0")
    cluster.status.set_expected(1, 2)
    links = (LinkStats("d-0", "shared_memory", 1 << 20, 0.5, 2, 1), LinkStats("d-1", "", num_failures=3))
    transfers = TransferStats(5, 1000, ((TransferFailure.CORRUPT, 2),), 4096, links, num_refused_peers=6)
    report = stats(
        num_running=3,
        num_waiting=4,
        num_blocks=60,
        num_free_blocks=10,
        num_cached_blocks=20,
        num_held_blocks=25,
        num_leased_blocks=4,
        ledger_balanced=False,
        num_pending_prefill_tokens=77,
        prefill_s_per_token=0.25,
        warm_links=("d-0",),
        num_steps=9,
        transfers=transfers,
        num_host_blocks=300,
        num_cached_host_blocks=120,
        num_host_loaded_tokens=640,
        pull_cost=PullCost(0.5, 0.25),
        pulls=PullStats(((PullOutcome.DONE, 7), (PullOutcome.LATE, 2)), 512),
    )
    cluster.report(1.0, "p-0", stats=report)
    told = {name: cluster.value(f"worker_{name}", **P0) for name in (
        "up", "running_requests", "waiting_requests", "pending_prefill_tokens", "prefill_token_seconds", "warm_links",
        "ledger_imbalance", "steps_total", "kv_transfers_completed_total", "kv_transfer_bytes_total", "kv_block_bytes",
    )}  # fmt: skip
    assert list(told.values()) == [1, 3, 4, 77, 0.25, 1, 1, 9, 5, 1000, 4096], told
    blocks = {state: cluster.value("worker_kv_blocks", state=state, **P0) for state in ("free", "cached", "held")}
    assert blocks == {"free": 10, "cached": 20, "held": 25}
    host = [cluster.value(f"worker_{name}", **P0) for name in ("host_blocks", "cached_host_blocks")]
    assert host == [300, 120] and cluster.value("worker_host_loaded_tokens_total", **P0) == 640
    assert cluster.value("worker_kv_blocks", state="leased", **P0) == 4
    assert cluster.value("worker_kv_transfer_failures_total", reason="corrupt", **P0) == 2
    assert cluster.total("worker_kv_transfer_failures_total") == 2
    assert cluster.value("worker_refused_peers_total", **P0) == 6
    pulls = [cluster.value("worker_pulls_total", outcome=each.value, **P0) for each in PullOutcome]
    assert pulls == [7, 0, 0, 2] and cluster.value("worker_pulled_tokens_total", **P0) == 512
    assert [cluster.value(f"worker_pull_{name}_seconds", **P0) for name in ("token", "base")] == [0.5, 0.25]
    link = {"source": "p-0", "destination": "d-0", "transport": "shared_memory"}
    names = ("bytes_total", "busy_seconds_total", "queued_chunks", "failures_total")
    assert [cluster.value(f"link_{name}", **link) for name in names] == [1 << 20, 0.5, 2, 1]
    assert cluster.value("link_failures_total", source="p-0", destination="d-1", transport="") == 3
    assert cluster.value("worker_ledger_imbalance", worker="d-0", role="decode") == 0
    assert cluster.value("workers", role="prefill", state="up") == 1
    assert cluster.value("workers_expected", role="decode") == 2


def test_what_steps_cost_is_told_of_all_workers_together_and_never_falls() -> None:
    cluster = Cluster("p-0", "d-0")
    told = [cluster.value("step_moments_total", kind="decode", term=term) for term in TERMS]
    assert told == [2 * value for value in MOMENTS[0].sums]
    cluster.driver.feed(WorkerDown("d-0", peer("d-0").incarnation, "lost"))
    assert [cluster.value("step_moments_total", kind="decode", term=term) for term in TERMS] == told


CALLS = st.lists(
    st.tuples(st.sampled_from(["open", "token", "finish", "fail", "close", "refuse"]), st.integers(0, 3)), max_size=40
)


@given(CALLS)
def test_every_request_has_one_outcome(script: list[tuple[str, int]]) -> None:
    """Whatever happens in whatever order, and nothing is remembered of a request whose caller has gone."""
    cluster = Cluster("p-0")
    open_calls: dict[int, tuple[str, list[object]]] = {}
    num_opened = num_refused = 0
    for action, slot in script:
        cluster.now += 0.25
        request_id = open_calls[slot][0] if slot in open_calls else ""
        if action == "open" and slot not in open_calls:
            num_opened += 1
            arrival: Arrived = arrived(f"r{num_opened}", PROMPT)
            open_calls[slot] = (f"r{num_opened}", list(cluster.driver.open_calls([arrival])))
        elif action in ("token", "finish"):
            finish = FinishReason.STOP if action == "finish" else None
            cluster.driver.feed(reported("p-0", output(request_id, 0, 7, finish=finish)))
        elif action == "fail":
            cluster.metrics.failed(Fail(request_id, "INTERNAL", "broken"))
        elif action == "refuse":
            num_refused += 1
            cluster.metrics.refused(RefusedFor.INVALID)
        elif action == "close" and slot in open_calls:
            cluster.driver.close_calls(open_calls.pop(slot)[1])  # type: ignore[arg-type]
    for _, calls in open_calls.values():
        cluster.driver.close_calls(calls)  # type: ignore[arg-type]
    assert cluster.total("requests_total") == num_opened + num_refused
    assert cluster.metrics._open == {}


def test_two_routers_in_one_process_do_not_meet() -> None:
    one, other = Cluster("p-0", "d-0"), Cluster("p-0", "d-0")
    serve_disaggregated(one)
    assert other.total("requests_total") == 0


# --- the docs, the dashboard and the rules name what is there ---------------------------------------------------------


def documented() -> dict[str, tuple[str, frozenset[str]]]:
    """Type and labels by name, from the tables of docs/metrics.md."""
    text = (ROOT / "docs/metrics.md").read_text()
    rows = re.findall(r"^\| `(twinring_\w+)` \| (\w+) \| ([^|]*)\|", text, re.MULTILINE)
    assert len(rows) == len({name for name, _, _ in rows})
    return {name: (kind, frozenset(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


def exposed(cluster: Cluster) -> dict[str, tuple[str, frozenset[str]]]:
    found = {}
    for family in cluster.metrics.registry.collect():
        if family.name.startswith("twinring_"):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            labels = {label for sample in family.samples for label in sample.labels} - {"le"}
            found[name] = (family.type, frozenset(labels))
    return found


def test_the_docs_name_every_metric() -> None:
    cluster = Cluster("p-0", "d-0")
    serve_disaggregated(cluster)
    transfers = TransferStats(links=(LinkStats("d-0", "gloo"),))
    cluster.report(9.0, "p-0", stats=stats(transfers=transfers))
    assert documented() == exposed(cluster)


def test_the_docs_name_every_reason() -> None:
    text = (ROOT / "docs/metrics.md").read_text()
    names = [*RefusedFor, *TransferFailure, *PullOutcome, *ServingMode, *FinishReason]
    assert not [name for name in names if f"`{name}`" not in text and name is not FinishReason.ERROR]


@pytest.mark.parametrize(
    "path", ["helm/dashboards/twinring.json", "helm/alerts/twinring.yaml", "tests/alerts_test.yaml"]
)
def test_queries_name_metrics_that_exist(path: str) -> None:
    known = set(documented())
    known |= {f"{name}{part}" for name in documented() for part in ("_bucket", "_count", "_sum")}
    used = set(re.findall(r"\btwinring_\w+", (ROOT / path).read_text()))
    assert len(used) > 5
    assert used <= known


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (apt: prometheus)")
def test_promtool_finds_nothing_to_mend() -> None:
    cluster = Cluster("p-0", "d-0")
    serve_disaggregated(cluster)
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=cluster.metrics.exposition(), capture_output=True, timeout=30
    )
    assert checked.returncode == 0, checked.stderr.decode() + checked.stdout.decode()


def test_the_exposition_has_help_and_no_creation_times() -> None:
    cluster = Cluster("p-0", "d-0")
    text = cluster.metrics.exposition().decode()
    assert "_created" not in text
    for name in documented():
        assert re.search(rf"^# HELP {name} \S", text, re.MULTILINE), name
