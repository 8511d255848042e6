"""Whether the simulator shows what a live cluster does. (b) of a cluster whose steps are modelled, with real processes,
queues, messages and transfers around them: what is left is what the simulator leaves out. (c) of the demo model,
computed on this machine: its costs are fitted to its own steps first, and the machine is shared by everything."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from random import Random
from statistics import median

from bench._both_runs import Latencies, config_of, latencies_of, live, setup_of, started
from bench.harness import Figure
from bench.service import SETTINGS as PATIENT
from cluster.fit import fitted_from
from cluster.run_state import RunState
from protos.cost_model import HARDWARE, Hardware
from simulator.generator import Lengths, SessionKind, Workload, generate
from simulator.limits import reference_of
from simulator.requests import SimRequest
from simulator.run import simulate
from simulator.setup import Setup
from simulator.transforms import at_rate

DESCRIPTION = "latencies that the simulator shows over those of a live cluster: modelled steps, and real ones"

ROW = "70b-a100x4"  # slow steps: next to them, noise of this machine is small
NUM_BLOCKS = HARDWARE[ROW].num_kv_tokens // 64
MODELLED = (
    *PATIENT,
    *(f"engine.modelled={ROW}", f"engine.num_blocks={NUM_BLOCKS}", "engine.max_num_batched_tokens=1024"),
    *("num_prefill=2", "num_decode=2", "router.dispatch_tokens=2048", "router.refuses_early=false"),
)
REAL = (*PATIENT, "router.dispatch_tokens=1024", "router.refuses_early=false")
LOADS = (0.3, 0.5, 0.65, 0.8)  # of the rate at which perfectly balanced workers saturate
HEADLINE = 0.65
NUM_REQUESTS = 60
SEEDS = (0, 1, 2)  # of the requests
REAL_LOADS = (0.3, 0.5)
CALIBRATION_RATES = (3.0, 8.0)  # requests/s; the demo model's costs are not known before


def chats(prefix_tokens: Lengths, turn_tokens: Lengths, max_context_tokens: int) -> Workload:
    """Sessions of a few turns each, on half a dozen system prompts."""
    turns, output_tokens, pause_s = Lengths(4, 0.4, 8), Lengths(16, 0.5, 48), Lengths(3, 0.5, 8)
    kind = SessionKind("chat", 1, 6, 0.8, prefix_tokens, turns, turn_tokens, output_tokens, pause_s, max_context_tokens)
    return Workload((kind,), sessions_per_s=1.0, burst_factor=1.0, calm_s=10.0, burst_s=3.0, lead_in_s=15.0)


LONG_CHATS = chats(Lengths(1_000, 0.3, 2_000), Lengths(1_500, 0.5, 3_000), 16_000)
SHORT_CHATS = chats(Lengths(256, 0.3, 512), Lengths(256, 0.5, 512), 3_000)  # the demo model's context is 4,096


def run(quick: bool) -> list[Figure]:
    return [*modelled_steps(quick), *real_steps(quick)]


def modelled_steps(quick: bool) -> list[Figure]:
    """Ratios are medians over the seeds."""
    setup = setup_of(config_of(MODELLED), HARDWARE[ROW])
    figures: list[Figure] = []
    with started(MODELLED) as server:
        for load in (HEADLINE,) if quick else LOADS:
            runs = []
            for seed in SEEDS[:1] if quick else SEEDS:
                requests = requests_at(load, LONG_CHATS, seed, setup)
                runs.append(both(server.address, requests, setup, f"modelled {load} {seed}"))
            figures += ratios(f"load_{load:g}", runs, 0.15 if load == HEADLINE else None)
    return figures


def real_steps(quick: bool) -> list[Figure]:
    with started(REAL) as server:
        hardware = fitted(server)
        setup = setup_of(config_of(REAL), hardware)
        figures: list[Figure] = []
        for load in REAL_LOADS[-1:] if quick else REAL_LOADS:
            requests = requests_at(load, SHORT_CHATS, 0, setup)
            figures += ratios(f"real_{load:g}", [both(server.address, requests, setup, f"real {load}")], None)
    return figures


def fitted(server: RunState) -> Hardware:
    """Costs and memory from the workers' own metrics, once they have had work of all sorts."""
    for rate in CALIBRATION_RATES:
        requests = at_rate(generate(SHORT_CHATS, NUM_REQUESTS // 2, Random(1)), rate)
        asyncio.run(live(server.address, requests, f"calibration {rate}"))
    hardware, _ = fitted_from(f"http://{server.http_address}/metrics", None, None, None)
    return hardware


def requests_at(load: float, workload: Workload, seed: int, setup: Setup) -> tuple[SimRequest, ...]:
    """Equal for equal arguments."""
    requests = generate(workload, NUM_REQUESTS, Random(seed))
    return at_rate(requests, load * reference_of(requests, setup).rate)


def both(address: str, requests: Sequence[SimRequest], setup: Setup, draw: str) -> tuple[Latencies, Latencies]:
    """What the simulator shows, and what clients saw."""
    return latencies_of(simulate(setup, requests).records), asyncio.run(live(address, requests, draw))


def ratios(name: str, runs: Sequence[tuple[Latencies, Latencies]], tolerance: float | None) -> list[Figure]:
    """Simulated over live. tolerance: how far the ratio of the median TTFT may be from 1."""
    figures = []
    for key, value_of, share in (
        ("ttft_p50", Latencies.ttft_s, 0.5),
        ("ttft_p90", Latencies.ttft_s, 0.9),
        ("tpot_p50", Latencies.tpot_s, 0.5),
        ("tpot_p90", Latencies.tpot_s, 0.9),
    ):
        pairs = [(value_of(simulated, share), value_of(seen, share)) for simulated, seen in runs]
        note = ", ".join(f"{1e3 * simulated:.1f} / {1e3 * seen:.1f}" for simulated, seen in pairs) + " ms"
        ratio = median(simulated / seen for simulated, seen in pairs)
        figures.append(Figure(f"{name}_{key}", ratio, "sim/live", note=note))
    if tolerance is not None:
        off = max(abs(simulated.ttft_s(0.5) / seen.ttft_s(0.5) - 1) for simulated, seen in runs)
        figures.append(Figure(f"{name}_ttft_p50_off", off, "", tolerance, "lower", "the furthest of the runs"))
    return figures
