"""What becomes of goodput when more is asked than can be served. Requests arrive at random (Poisson), whether or not
earlier ones have ended; goodput counts those that met both SLOs."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field

import grpc
import grpc.aio

from bench.harness import Figure
from bench.service import serving
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as pb_grpc

DESCRIPTION = "goodput from light load to twice the sustainable rate, with early refusal and without"

TTFT_SLO_S = 1.0
TPOT_SLO_S = 0.05
PROMPT_LEN = 256  # random tokens, so that nothing is cached
NUM_NEW_TOKENS = 32
SHARES = (0.4, 0.7, 1.0, 1.3, 1.6)  # of the rate that a closed loop reaches
SUSTAINABLE_SHARE = 0.9  # of the requests in SLO
NUM_CLOSED_LOOP = 16
TIMEOUT_S = 30.0


@dataclass
class Load:
    """What one stretch of load came to."""

    rate: float  # requests per second aimed at
    duration_s: float
    num_in_slo: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)

    @property
    def goodput(self) -> float:
        return self.num_in_slo / self.duration_s

    @property
    def share_in_slo(self) -> float:
        return self.num_in_slo / max(1, self.outcomes.total())


def run(quick: bool) -> list[Figure]:
    duration_s = 4.0 if quick else 20.0
    figures: list[Figure] = []
    for name, refuses in (("", "true"), ("_without_refusal", "false")):
        settings = (f"router.ttft_slo_s={TTFT_SLO_S}", f"router.refuses_early={refuses}")
        with serving(settings) as address:
            figures += asyncio.run(_sweep(address, duration_s, name))
    return figures


async def _sweep(address: str, duration_s: float, name: str) -> list[Figure]:
    rng = random.Random(0)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.InferenceStub(channel)
        await _closed_loop(stub, rng, duration_s / 2)  # the workers measure their own speed meanwhile
        capacity = await _closed_loop(stub, rng, duration_s)
        loads = [await _open_loop(stub, rng, share * capacity, duration_s) for share in SHARES]
        in_slo = [load.rate for load in loads if load.share_in_slo >= SUSTAINABLE_SHARE]
        sustainable = max(in_slo, default=loads[0].rate)
        double = await _open_loop(stub, rng, 2 * sustainable, duration_s)
    peak = max(load.goodput for load in [*loads, double])
    note = ", ".join(f"{load.goodput:.1f} of {load.rate:.1f}" for load in [*loads, double])
    refused = double.outcomes["RESOURCE_EXHAUSTED"] / max(1, double.outcomes.total())
    return [
        Figure(f"goodput_ratio_at_2x{name}", double.goodput / peak, "", None if name else 0.9, note=note),
        Figure(f"peak_goodput{name}", peak, "requests/s"),
        Figure(f"sustainable_rate{name}", sustainable, "requests/s", note=f"{SUSTAINABLE_SHARE:.0%} in SLO"),
        Figure(f"refused_at_2x{name}", refused, "of the requests", better="lower"),
    ]


async def _closed_loop(stub: pb_grpc.InferenceStub, rng: random.Random, duration_s: float) -> float:
    """Requests per second that NUM_CLOSED_LOOP clients get through, each asking again when it has its answer."""
    end_at = time.monotonic() + duration_s
    num_done = 0

    async def client() -> None:
        nonlocal num_done
        while time.monotonic() < end_at:
            await _ask(stub, rng)
            num_done += 1

    await asyncio.gather(*(client() for _ in range(NUM_CLOSED_LOOP)))
    return num_done / duration_s


async def _open_loop(stub: pb_grpc.InferenceStub, rng: random.Random, rate: float, duration_s: float) -> Load:
    load = Load(rate, duration_s)
    end_at = time.monotonic() + duration_s

    async def one() -> None:
        outcome, in_slo = await _ask(stub, rng)
        load.outcomes[outcome] += 1
        load.num_in_slo += in_slo

    async with asyncio.TaskGroup() as group:
        next_at = time.monotonic()
        while (next_at := next_at + rng.expovariate(rate)) < end_at:
            await asyncio.sleep(max(0.0, next_at - time.monotonic()))
            group.create_task(one())
    return load


async def _ask(stub: pb_grpc.InferenceStub, rng: random.Random) -> tuple[str, bool]:
    """How the request ended, and whether the client saw both SLOs met."""
    params = pb.SamplingParams(max_tokens=NUM_NEW_TOKENS, temperature=0.0, ignore_eos=True)
    prompt = pb.TokenizedInput(input_ids=rng.choices(range(256), k=PROMPT_LEN))
    times: list[float] = [time.monotonic()]
    try:
        request = pb.GenerateRequest(tokenized=prompt, sampling_params=params, stream=True)
        async for _ in stub.Generate(request, timeout=TIMEOUT_S):
            times.append(time.monotonic())
    except grpc.aio.AioRpcError as error:
        return error.code().name, False
    ttft_s, tpot_s = times[1] - times[0], (times[-1] - times[1]) / (NUM_NEW_TOKENS - 1)
    return "OK", ttft_s <= TTFT_SLO_S and tpot_s <= TPOT_SLO_S
