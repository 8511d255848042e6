"""The live part of the relief benchmark: one hot decode worker beside three cool ones, in a running cluster whose steps
are modelled, so that five workers do not compete for the cores of a small machine. A call for many choices makes the
hot one: they all decode where the first one does."""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import asdict, dataclass, field

import grpc.aio

from bench._relief import A10, TPOT_SLO_S, TTFT_SLO_S, Measured, power_law
from bench.service import serving
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as pb_grpc
from protos.codec import unpack_token_ids

SETTINGS = (
    "num_decode=4",
    f"engine.modelled={json.dumps(asdict(A10))}",
    f"engine.num_blocks={A10.num_kv_tokens // 64}",
    "engine.max_num_batched_tokens=2048",
    "engine.max_num_seqs=256",
    "router.refuses_early=false",
    "ray.num_cpus_per_worker=0.1",
    "ray.start_timeout_s=180",
)
NUM_CHOICES, CHOICE_TOKENS = 16, 1400  # nearly twice what the one worker holds
CHOICES_EVERY_S = 25.0
RATE = 2.0  # requests/s beside them
MEAN_OUTPUT, MAX_OUTPUT = 200, 1500
PROMPT_LEN = 128
VOCAB_SIZE = 256
TIMEOUT_S = 180.0


@dataclass
class Stream:
    """One choice, as its client saw it."""

    sent_at: float
    times: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    complete: pb.GenerateComplete | None = None

    @property
    def ttft_s(self) -> float:
        return self.times[0] - self.sent_at

    @property
    def tpot_s(self) -> float:
        return (self.times[-1] - self.times[0]) / max(1, len(self.token_ids) - 1)

    @property
    def longest_gap_s(self) -> float:
        return max((later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)), default=0.0)

    def take(self, response: pb.GenerateResponse) -> None:
        part = response.complete if response.HasField("complete") else response.chunk
        assert part.first_index == len(self.token_ids), "no token is lost or comes twice"
        token_ids = unpack_token_ids(part.token_ids)
        if token_ids:
            self.times.append(time.monotonic())
            self.token_ids += token_ids
        if response.HasField("complete"):
            self.complete = response.complete


def live(relieves: bool, duration_s: float, seed: int = 0) -> Measured:
    with serving((*SETTINGS, f"router.relieves={str(relieves).lower()}")) as address:
        streams = asyncio.run(_load(address, duration_s, random.Random(seed)))
        return _measured(streams, duration_s)


def _measured(streams: list[Stream], duration_s: float) -> Measured:
    placements = [stream.complete.placement for stream in streams if stream.complete is not None]
    assert len(placements) == len(streams), "every request ends"
    return Measured(
        ttfts_s=tuple(sorted(stream.ttft_s for stream in streams)),
        tpots_s=tuple(sorted(stream.tpot_s for stream in streams)),
        num_good=sum(stream.ttft_s <= TTFT_SLO_S and stream.tpot_s <= TPOT_SLO_S for stream in streams),
        num_requests=len(streams),
        num_preemptions=sum(placement.preemptions for placement in placements),
        num_local=sum(placement.mode == pb.SERVING_MODE_LOCAL for placement in placements),
        num_migrations=sum(placement.migrations for placement in placements),
        duration_s=duration_s,
    )


async def _load(address: str, duration_s: float, rng: random.Random) -> list[Stream]:
    """Arrivals as drawn, whether or not earlier ones have ended."""
    calls = sorted(
        [(at_s, NUM_CHOICES, CHOICE_TOKENS) for at_s in _every(CHOICES_EVERY_S, duration_s)]
        + [(at_s, 1, min(MAX_OUTPUT, power_law(rng, MEAN_OUTPUT))) for at_s in _poisson(rng, duration_s)]
    )
    started_at = time.monotonic()
    async with grpc.aio.insecure_channel(address) as channel, asyncio.TaskGroup() as group:
        stub, tasks = pb_grpc.InferenceStub(channel), []
        for at_s, num_choices, num_tokens in calls:
            await asyncio.sleep(max(0.0, started_at + at_s - time.monotonic()))
            prompt = rng.choices(range(VOCAB_SIZE), k=PROMPT_LEN)
            tasks.append(group.create_task(_call(stub, prompt, num_choices, num_tokens)))
    return [stream for task in tasks for stream in task.result()]


def _every(interval_s: float, duration_s: float) -> list[float]:
    return [index * interval_s for index in range(int(duration_s / interval_s) + 1)]


def _poisson(rng: random.Random, duration_s: float) -> list[float]:
    at_s, found = 0.0, list[float]()
    while (at_s := at_s + rng.expovariate(RATE)) < duration_s:
        found.append(at_s)
    return found


async def _call(stub: pb_grpc.InferenceStub, prompt: list[int], num_choices: int, num_tokens: int) -> list[Stream]:
    """The modelled worker repeats the prompt: what comes is checked token by token."""
    params = pb.SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True, n=num_choices)
    request = pb.GenerateRequest(tokenized=pb.TokenizedInput(input_ids=prompt), sampling_params=params, stream=True)
    streams = [Stream(time.monotonic()) for _ in range(num_choices)]
    async for response in stub.Generate(request, timeout=TIMEOUT_S):
        is_last = response.HasField("complete")
        streams[response.complete.choice_index if is_last else response.chunk.choice_index].take(response)
    expected = (prompt * (num_tokens // PROMPT_LEN + 1))[:num_tokens]
    assert all(stream.token_ids == expected for stream in streams)
    return streams
