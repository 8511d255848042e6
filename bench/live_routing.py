"""Placement in a running cluster: what conversations with shared and skewed prefixes find in the caches, and what that
does to their first tokens. The simulator's figures (docs/routing.md) are of larger workers and exact clocks; these are
of the real thing on a small machine, where router, workers and client share the cores."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field

import grpc
import grpc.aio

from bench._conversations import Conversations, Session
from bench.harness import Figure
from bench.service import serving
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as pb_grpc
from protos.codec import unpack_token_ids

DESCRIPTION = "hits, first tokens and goodput of a live cluster by policy; pulls, returns, host memory on and off"

TTFT_SLO_S = 0.5
TPOT_SLO_S = 0.1
NUM_NEW_TOKENS = 40
TIMEOUT_S = 30.0
LOAD = 0.9  # of what a closed loop gets through under round robin
NUM_CLOSED_LOOP = 12
SEED = 7
SETTINGS = (
    "num_prefill=3",
    "num_decode=1",
    "engine.num_blocks=400",
    "router.refuses_early=false",
    "ray.start_timeout_s=180",
)
NOTHING_MOVES = ("engine.pulls=null",)
NO_PULLS, NO_RETURNS = ("router.pull_s_per_token=0",), ("engine.pulls.max_returns=0",)
# Too small for what is asked for again, with and without host memory behind it.
SMALL_DEVICE, HOST_MEMORY = ("engine.num_blocks=160",), ("engine.host_cache_bytes=67108864",)
BASELINE = "round_robin"
VARIANTS: dict[str, tuple[str, ...]] = {
    BASELINE: ("router.policy.name=round_robin", *NOTHING_MOVES),
    "dual_map": ("router.policy.name=dual_map", *NOTHING_MOVES),
    "home_pair": NOTHING_MOVES,
    "home_pair_returns": NO_PULLS,
    "home_pair_pulls": NO_RETURNS,
    "home_pair_pulls_returns": (),  # the default
    "small_device": SMALL_DEVICE,
    "small_device_host_memory": (*SMALL_DEVICE, *HOST_MEMORY),
}


@dataclass
class Load:
    """What one stretch of load came to, as the client saw it."""

    duration_s: float
    num_in_slo: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_pulled_tokens: int = 0  # of these
    ttfts_s: list[float] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)

    @property
    def goodput(self) -> float:
        return self.num_in_slo / self.duration_s

    @property
    def hit_rate(self) -> float:
        return self.num_cached_tokens / max(1, self.num_prompt_tokens)

    def ttft_ms(self, percent: int) -> float:
        return 1e3 * statistics.quantiles(self.ttfts_s, n=100)[percent - 1]


def run(quick: bool) -> list[Figure]:
    """Every variant has a cluster of its own, with nothing in its caches, and the same arrivals."""
    duration_s = 6.0 if quick else 30.0
    with serving((*SETTINGS, *VARIANTS[BASELINE])) as address:
        rate = LOAD * asyncio.run(_capacity(address, duration_s / 2))
    loads: dict[str, Load] = {}
    for name, settings in VARIANTS.items():
        with serving((*SETTINGS, *settings)) as address:
            loads[name] = asyncio.run(_measured(address, rate, duration_s))
    figures = [Figure("rate", rate, "requests/s", note=f"{LOAD:g} of a closed loop's, {BASELINE}")]
    for name, load in loads.items():
        figures += _figures(name, load, loads[BASELINE])
    return figures


def _figures(name: str, load: Load, baseline: Load) -> list[Figure]:
    ended = ", ".join(f"{outcome} {num}" for outcome, num in sorted(load.outcomes.items()))
    pulled = load.num_pulled_tokens / max(1, load.num_prompt_tokens)
    figures = [
        Figure(f"hit_rate_{name}", load.hit_rate, "of prompt tokens", note=f"{pulled:.1%} pulled; {ended}"),
        Figure(f"ttft_ms_p50_{name}", load.ttft_ms(50), "ms", better="lower"),
        Figure(f"ttft_ms_p99_{name}", load.ttft_ms(99), "ms", better="lower"),
        Figure(f"goodput_{name}", load.goodput, "requests/s"),
    ]
    if load is not baseline:
        note = (
            f"TTFT p50 {load.ttft_ms(50) / baseline.ttft_ms(50):.2f}, p99 {load.ttft_ms(99) / baseline.ttft_ms(99):.2f}"
        )
        figures.append(Figure(f"goodput_ratio_{name}", load.goodput / max(1e-9, baseline.goodput), "", note=note))
    return figures


async def _capacity(address: str, duration_s: float) -> float:
    """Requests per second that NUM_CLOSED_LOOP clients get through, each asking again when it has its answer."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.InferenceStub(channel)
        await _closed_loop(stub, duration_s / 2, SEED)
        return (await _closed_loop(stub, duration_s, SEED + 1)).outcomes["OK"] / duration_s


async def _measured(address: str, rate: float, duration_s: float) -> Load:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.InferenceStub(channel)
        await _closed_loop(stub, duration_s / 6, SEED)  # workers measure their speed; none of it is asked again
        return await _open_loop(stub, rate, duration_s)


async def _closed_loop(stub: pb_grpc.InferenceStub, duration_s: float, seed: int) -> Load:
    talk, load, end_at = Conversations(random.Random(seed)), Load(duration_s), time.monotonic() + duration_s

    async def client() -> None:
        while time.monotonic() < end_at:
            await _turn(stub, talk, talk.next_turn(), load)

    await asyncio.gather(*(client() for _ in range(NUM_CLOSED_LOOP)))
    return load


async def _open_loop(stub: pb_grpc.InferenceStub, rate: float, duration_s: float) -> Load:
    arrivals, talk, load = random.Random(SEED), Conversations(random.Random(SEED + 2)), Load(duration_s)
    end_at = time.monotonic() + duration_s
    async with asyncio.TaskGroup() as group:
        next_at = time.monotonic()
        while (next_at := next_at + arrivals.expovariate(rate)) < end_at:
            await asyncio.sleep(max(0.0, next_at - time.monotonic()))
            group.create_task(_turn(stub, talk, talk.next_turn(), load))
    return load


async def _turn(stub: pb_grpc.InferenceStub, talk: Conversations, session: Session, load: Load) -> None:
    params = pb.SamplingParams(max_tokens=NUM_NEW_TOKENS, temperature=0.0, ignore_eos=True)
    prompt = pb.TokenizedInput(input_ids=session.tokens)
    times, token_ids = [time.monotonic()], list[int]()
    complete: pb.GenerateComplete | None = None
    try:
        request = pb.GenerateRequest(tokenized=prompt, sampling_params=params, stream=True)
        async for response in stub.Generate(request, timeout=TIMEOUT_S):
            times.append(time.monotonic())
            is_last = response.HasField("complete")
            token_ids += unpack_token_ids(response.complete.token_ids if is_last else response.chunk.token_ids)
            complete = response.complete if is_last else None
    except grpc.aio.AioRpcError as error:
        load.outcomes[error.code().name] += 1
    finally:
        talk.answered(session, token_ids)
    if complete is not None:
        _note(load, complete, times)


def _note(load: Load, complete: pb.GenerateComplete, times: list[float]) -> None:
    ttft_s, tpot_s = times[1] - times[0], (times[-1] - times[1]) / (NUM_NEW_TOKENS - 1)
    load.outcomes["OK"] += 1
    load.ttfts_s.append(ttft_s)
    load.num_in_slo += ttft_s <= TTFT_SLO_S and tpot_s <= TPOT_SLO_S
    load.num_prompt_tokens += complete.prompt_tokens
    load.num_cached_tokens += complete.cached_tokens
    load.num_pulled_tokens += complete.placement.pulled_tokens
