"""A live cluster whose steps are modelled, with real Ray, gRPC, queues and transfers around them, against the simulator
on the same requests: what the simulator shows of latency holds for the one that serves."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from bench._both_runs import Latencies, config_of, latencies_of, live, setup_of
from bench.identity import LOADS, LONG_CHATS, MODELLED, ROW, requests_at
from protos.cost_model import HARDWARE
from simulator.requests import SimRequest
from simulator.run import simulate
from simulator.setup import Setup
from tests.cluster.server import serving

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TOLERANCE = 0.15
NUM_ATTEMPTS = 3  # a run in which this machine stalled says nothing; what is wrong is wrong every time


def test_the_simulator_shows_the_latencies_of_a_live_cluster(tmp_path: Path) -> None:
    setup = setup_of(config_of(MODELLED), HARDWARE[ROW])
    requests = requests_at(LOADS[-1], LONG_CHATS, 0, setup)
    simulated = latencies_of(simulate(setup, requests).records)
    assert_queues(setup, requests, simulated)
    runs: list[Latencies] = []
    with serving(tmp_path, settings=MODELLED) as server:
        while len(runs) < NUM_ATTEMPTS and not any(agree(simulated, seen) for seen in runs):
            runs.append(asyncio.run(live(server.address, requests, f"attempt {len(runs)}")))
    figures = [shown(simulated), *map(shown, runs)]
    print("simulated, then live:", *figures, sep="\n")
    assert agree(simulated, runs[-1]), figures


def agree(simulated: Latencies, seen: Latencies) -> bool:
    return abs(simulated.ttft_s(0.5) / seen.ttft_s(0.5) - 1) <= TOLERANCE


def assert_queues(setup: Setup, requests: Sequence[SimRequest], simulated: Latencies) -> None:
    """Or the cost model alone would tell the latencies."""
    many = latencies_of(simulate(replace(setup, num_prefill=8, num_decode=8), requests).records)
    assert many.ttft_s(0.5) < (1 - 2 * TOLERANCE) * simulated.ttft_s(0.5), shown(many)


def shown(of: Latencies) -> str:
    return ", ".join(
        f"{name} p{100 * share:.0f} {1e3 * value(share):.1f} ms"
        for name, value in (("TTFT", of.ttft_s), ("TPOT", of.tpot_s))
        for share in (0.5, 0.9)
    )
