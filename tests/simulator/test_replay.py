"""What a Router was fed, written down and read again, makes a fresh one choose the same; one with a fault does not."""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.types import (
    FinishReason,
    GenerateRequest,
    HandoffRefused,
    Logprobs,
    PeerRef,
    Role,
    SamplingParams,
    ServingMode,
    TokenOutput,
    TransferFailure,
    TransferStats,
    WorkerAccount,
    WorkerReport,
    WorkerStats,
)
from router.config import DecodePolicyName, RouterConfig
from router.event_codec import decode_config, decode_event, encode_config, encode_event
from router.events import Arrived, ClientCancelled, Effect, Event, Reported, Tick, WorkerDown, WorkerUp
from router.policies.base import PlacementView
from router.policies.config import PolicyConfig, PolicyName
from router.policies.home_pair import HomePair
from router.policy import Choice
from router.queue_order import QueueOrderName
from router.recording import EventRecorder
from simulator.cluster import SimulatedCluster
from simulator.replay import replay
from simulator.requests import SimRequest
from simulator.setup import Change, ChangeKind, Setup
from tests.simulator.values import BLOCK, request, setup, workloads

CHANGES = (Change(0.05, ChangeKind.FAIL, "prefill-1"), Change(0.1, ChangeKind.JOIN, "prefill-2", Role.PREFILL))
HOME_PAIR = setup(num_prefill=3, num_decode=2, policy=PolicyConfig("home_pair"))
REQUESTS = [request(0.01 * number, (number % 4, 10 + number), num_output_tokens=5) for number in range(30)]


def recording_of(chosen: Setup, requests: Sequence[SimRequest], path: Path) -> list[str]:
    """By the shipping recorder, of a Router among simulated workers."""
    cluster = SimulatedCluster(chosen)
    recorder, feed = EventRecorder(str(path), chosen.router), cluster.router.on

    def on(event: Event, now: float) -> list[Effect]:
        effects = feed(event, now)
        recorder.record(event, now, effects)
        return effects

    cluster.router.on = on  # type: ignore[method-assign]
    cluster.run(requests)
    recorder.close()
    return path.read_text().splitlines()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recording") / "events.jsonl"


@given(
    requests=workloads(),
    policy=st.sampled_from(get_args(PolicyName)),
    decode_policy=st.sampled_from(get_args(DecodePolicyName)),
    max_local_prefill_tokens=st.sampled_from((0, 32)),
    queue_order=st.sampled_from(get_args(QueueOrderName)),
    dispatch_tokens=st.sampled_from((0, 128)),
    rebalances=st.booleans(),
    changes=st.sampled_from(((), CHANGES)),
)
@settings(max_examples=30)
def test_a_fresh_router_chooses_the_same(
    path: Path, requests: list[SimRequest], policy: PolicyName, **router: object
) -> None:
    chosen = setup(num_decode=2, policy=PolicyConfig(policy), **router)
    found = replay(recording_of(chosen, requests, path))
    assert found.difference is None
    assert found.num_events > len(requests)
    assert found.num_choices >= len(requests)


def test_a_router_with_a_fault_chooses_otherwise(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = recording_of(HOME_PAIR, REQUESTS, path)
    assert replay(lines).difference is None

    def always_the_last(policy: HomePair, view: PlacementView) -> Choice:
        return Choice(view.worker_ids()[-1], "a fault")

    monkeypatch.setattr(HomePair, "place", always_the_last)
    found = replay(lines)
    assert found.difference is not None
    assert json.loads(lines[found.difference.line - 1])["event"]["kind"] == "Arrived"
    assert found.difference.recorded[-1][0] != found.difference.replayed[-1][0] == "prefill-2"


def test_other_settings_choose_otherwise(path: Path) -> None:
    lines = recording_of(HOME_PAIR, REQUESTS, path)
    header = {"config": encode_config(replace(HOME_PAIR.router, ring_seed=1))}
    assert replay([json.dumps(header), *lines[1:]]).difference is not None


def test_the_two_ends_of_a_transfer_must_match(path: Path) -> None:
    """Their random ids differ from run to run; which of them go together may not."""
    lines = recording_of(HOME_PAIR, REQUESTS[:1], path)
    number, line = next((i, json.loads(text)) for i, text in enumerate(lines) if '"transfer_id"' in text)
    (_, [[_, submit]], *_), *_ = line["choices"]
    submit["handoff_from"]["transfer_id"] = "ff" * 16
    found = replay([*lines[:number], json.dumps(line), *lines[number + 1 :]])
    assert found.difference is not None
    assert found.difference.line == number + 1


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "the recording is empty"),
        (["{}"], "line 1 holds no router settings: KeyError"),
        (['{"config":{"block_size":0}}'], "line 1 holds no router settings: ValueError: block_size must be at least 1"),
        (['{"config":{}}', '{"now":1.0,"event":{"kind":"Ti'], "line 2 is no recorded event"),
        (
            ['{"config":{}}', '{"now":1.0,"event":{"kind":"Late"},"choices":[]}'],
            "line 2 is no recorded event: KeyError",
        ),
    ],
)
def test_what_is_no_recording_is_named(lines: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replay(lines)


def test_a_recording_is_for_its_owner_and_ends_quietly(path: Path, tmp_path: Path) -> None:
    recording_of(HOME_PAIR, REQUESTS[:1], tmp_path / "new")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o600
    full = EventRecorder("/dev/full", HOME_PAIR.router)
    for _ in range(1000):
        full.record(WorkerDown("p-0", "1", "x" * 100), 0.0, [])
    full.close()
    assert full._file is None


EVERYTHING = GenerateRequest(
    request_id="r",
    client_request_id="c",
    attempt=0,
    token_ids=array("i", [1, 2, 2**31 - 1]),
    num_prompt_tokens=2,
    sampling_params=SamplingParams(0.7, 0.9, 5, 2**63, 8, (1, 2), logit_bias=((3, -1.5),), num_logprobs=0),
    cache_salt=b"\x00salt",
    deadline_s=0.1 + 0.2,
    home_worker_ids=("p-0",),
)
REPORT = WorkerReport(
    heartbeat=3,
    outputs=(
        TokenOutput("r", 1, 0, (1, 2), FinishReason.STOP, WorkerAccount(mode=ServingMode.LOCAL, pull_s=1e-9)),
        TokenOutput("r", 1, 2, (3,), logprobs=(Logprobs(-0.1, (3, 4), (-0.1, -2.0)),)),
    ),
    refusals=(HandoffRefused("r", 1, "no room"),),
    stats=WorkerStats(warm_links=("d-0",), transfers=TransferStats(1, 2, ((TransferFailure.TIMEOUT, 3),))),
)


@pytest.mark.parametrize(
    "event",
    [
        Arrived(EVERYTHING, (b"\x01" * 16, b"\x02" * 16), ("p-0", "d-0"), 0.25),
        ClientCancelled("r"),
        WorkerUp(PeerRef("p-0", "1", "host:1", Role.PREFILL)),
        WorkerDown("p-0", "1", "gone"),
        Reported("p-0", "1", REPORT),
        Reported("p-0", "1", WorkerReport()),
        Tick(),
    ],
)
def test_events_survive_the_file(event: Event) -> None:
    assert decode_event(json.loads(json.dumps(encode_event(event)))) == event


def test_settings_survive_the_file_without_who_may_call() -> None:
    config = RouterConfig(
        policy=PolicyConfig("home_pair", num_sampled=3), cost=HOME_PAIR.hardware.cost, block_size=BLOCK * 4
    )
    found = decode_config(json.loads(json.dumps(encode_config(config))))
    assert found == replace(config, listen="", http_listen="")
