"""A live cluster writes down what its router is fed; the same events make a fresh Router choose the same, so that what
the simulator shows of the Router holds for the one that serves."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from router.policies.base import PlacementView
from router.policies.home_pair import HomePair
from router.policies.peak_room import PeakRoom
from router.policy import Candidate, Choice
from simulator.replay import replay
from tests.cluster.server import PATIENT, request, serving
from tests.cluster.streams import generate_all
from tests.tiny_models import save_tiny_model

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SETTINGS = (
    *PATIENT,
    "engine.block_size=16",
    "engine.hash_block_size=16",
    "engine.num_blocks=128",
    "router.policy.name=home_pair",
    "router.decode_policy=peak_room",
    "router.queue_order=shortest_remaining",
    "router.dispatch_tokens=64",
    "router.rebalances=true",
)
NUM_REQUESTS = 20
NUM_PREFIXES = 4


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 2 prefill and 2 decode workers; requests come together, and their prompts begin alike."""
    folder, random = tmp_path_factory.mktemp("replay"), Random(0)
    model, path = save_tiny_model(folder / "model", "llama"), folder / "events.jsonl"
    prefixes = [random.choices(range(256), k=40) for _ in range(NUM_PREFIXES)]
    prompts = [prefixes[i % NUM_PREFIXES] + random.choices(range(256), k=i + 1) for i in range(NUM_REQUESTS)]
    workers = ("--set", "num_prefill=2", "--set", "num_decode=2")
    with serving(
        folder, "--model", str(model), *workers, settings=(*SETTINGS, f"router.record_events={path}")
    ) as server:
        requests = [request(prompt, 6, ignore_eos=True) for prompt in prompts]
        answers = asyncio.run(generate_all(server.address, requests))
    assert {answer.placement.prefill_worker for answer in answers} == {"prefill-0", "prefill-1"}
    return path


def lines_of(path: Path) -> Iterator[str]:
    with path.open() as file:
        yield from file


def test_the_core_chooses_as_it_did_live(recording: Path) -> None:
    found = replay(lines_of(recording))
    assert found.difference is None
    assert found.num_choices >= 2 * NUM_REQUESTS, "each has a worker to prefill and one to decode"


def test_faults_in_shipping_classes_show(recording: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def always_the_last(policy: HomePair, view: PlacementView) -> Choice:
        return Choice(view.worker_ids()[-1], "a fault")

    def least_room(policy: PeakRoom, num_tokens: int, candidates: list[Candidate]) -> Choice:
        return Choice(candidates[-1].worker_id, "a fault")

    for shipping, method, faulty in ((HomePair, "place", always_the_last), (PeakRoom, "choose", least_room)):
        with monkeypatch.context() as patched:
            patched.setattr(shipping, method, faulty)
            assert replay(lines_of(recording)).difference is not None, shipping
