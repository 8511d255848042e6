"""Members that come and go in a loop under load: nobody's request fails, and no token differs."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import grpc.aio
import pytest

from tests.cluster.load import REQUESTS, Load, undisturbed
from tests.cluster.server import PATIENT, Server, assert_clean, eventually, serving
from tests.tiny_models import save_tiny_model

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# Small steps, so that whoever leaves leaves in the middle of something; in turns, so that who comes has work at once.
SETTINGS = (
    *PATIENT,
    *("engine.max_num_batched_tokens=64", "engine.num_blocks=400", "router.policy.name=round_robin"),
)
GUESTS = ("prefill-1", "decode-1")
NUM_ROUNDS = 3


def pids_of_guests(server: Server) -> dict[str, int]:
    """Of those that are up."""
    return {
        load.worker_id: load.pid for load in server.status().workers if load.state == "up" and load.worker_id in GUESTS
    }


def come_and_go(server: Server, load: Load) -> None:
    for _ in range(NUM_ROUNDS):
        former = pids_of_guests(server)
        assert set(former) == set(GUESTS)
        for pid in former.values():
            os.kill(pid, signal.SIGKILL)

        def are_back(former: dict[str, int] = former) -> bool:
            now = pids_of_guests(server)
            return set(now) == set(GUESTS) and not set(now.values()) & set(former.values())

        assert eventually(are_back, 120.0), server.status()
        num_answers = len(load.answers)
        # They have had work again before they leave.
        assert eventually(lambda n=num_answers: load.workers(n).issuperset(GUESTS), 30.0)  # type: ignore[misc]


async def test_members_come_and_go_and_nobody_notices(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "llama")
    with serving(tmp_path, "--model", str(model), "--prefill", "2", "--decode", "2", settings=SETTINGS) as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            expected = await undisturbed(channel, REQUESTS)
            load = Load()
            loading = asyncio.create_task(load.run(channel))
            await asyncio.to_thread(come_and_go, server, load)
            load.stopped.set()
            await loading
        assert all(answer.token_ids == expected[number] for number, answer in load.answers)
        assert any(answer.placement.attempts > 1 for _, answer in load.answers), "nobody was hit"
        assert_clean(server)
