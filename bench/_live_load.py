"""Load on a running cluster and what its client saw: first tokens, hits, requests within their SLOs. Starts no cluster
and compares nothing."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
import grpc.aio

from bench._conversations import Conversations, Session, Shape
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as pb_grpc
from protos.codec import unpack_token_ids

TIMEOUT_S = 20.0  # of a request
NUM_CLOSED_LOOP = 12  # clients


@dataclass(frozen=True, slots=True)
class Kind:
    """What is asked, and what counts as in time."""

    shape: Shape
    num_new_tokens: int
    ttft_slo_s: float
    tpot_slo_s: float


@dataclass
class Load:
    """What one stretch of load came to, as the client saw it."""

    kind: Kind
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
    def in_slo(self) -> float:
        return self.num_in_slo / max(1, self.outcomes.total())

    @property
    def hit_rate(self) -> float:
        return self.num_cached_tokens / max(1, self.num_prompt_tokens)

    @property
    def pulled(self) -> float:
        return self.num_pulled_tokens / max(1, self.num_prompt_tokens)

    def ttft_ms(self, percent: int) -> float:
        return 1e3 * statistics.quantiles(self.ttfts_s, n=100)[percent - 1]

    def note(self, complete: pb.GenerateComplete, times: list[float]) -> None:
        ttft_s, tpot_s = times[1] - times[0], (times[-1] - times[1]) / (self.kind.num_new_tokens - 1)
        self.outcomes["OK"] += 1
        self.ttfts_s.append(ttft_s)
        self.num_in_slo += ttft_s <= self.kind.ttft_slo_s and tpot_s <= self.kind.tpot_slo_s
        self.num_prompt_tokens += complete.prompt_tokens
        self.num_cached_tokens += complete.cached_tokens
        self.num_pulled_tokens += complete.placement.pulled_tokens


async def closed_loop(address: str, kind: Kind, duration_s: float, seed: int) -> Load:
    """NUM_CLOSED_LOOP clients, each of which asks again when it has its answer."""
    talk, load, end_at = Conversations(kind.shape, random.Random(seed)), Load(kind, duration_s), _now() + duration_s

    async def client(stub: pb_grpc.InferenceStub) -> None:
        while _now() < end_at:
            await _turn(stub, talk, talk.next_turn(), load)

    async with _stub(address) as stub:
        await asyncio.gather(*(client(stub) for _ in range(NUM_CLOSED_LOOP)))
    return load


async def open_loop(address: str, kind: Kind, rate: float, duration_s: float, seed: int) -> Load:
    """Poisson arrivals, whatever becomes of those before; equal for equal arguments. Ends with the last answer."""
    arrivals, talk = random.Random(seed), Conversations(kind.shape, random.Random(seed + 1))
    load, end_at = Load(kind, duration_s), _now() + duration_s
    async with _stub(address) as stub, asyncio.TaskGroup() as group:
        next_at = _now()
        while (next_at := next_at + arrivals.expovariate(rate)) < end_at:
            await asyncio.sleep(max(0.0, next_at - _now()))
            group.create_task(_turn(stub, talk, talk.next_turn(), load))
    return load


@asynccontextmanager
async def _stub(address: str) -> AsyncIterator[pb_grpc.InferenceStub]:
    async with grpc.aio.insecure_channel(address) as channel:
        yield pb_grpc.InferenceStub(channel)


async def _turn(stub: pb_grpc.InferenceStub, talk: Conversations, session: Session, load: Load) -> None:
    params = pb.SamplingParams(max_tokens=load.kind.num_new_tokens, temperature=0.0, ignore_eos=True)
    prompt = pb.TokenizedInput(input_ids=session.tokens)
    times, token_ids = [_now()], list[int]()
    complete: pb.GenerateComplete | None = None
    try:
        request = pb.GenerateRequest(tokenized=prompt, sampling_params=params, stream=True)
        async for response in stub.Generate(request, timeout=TIMEOUT_S):
            times.append(_now())
            is_last = response.HasField("complete")
            token_ids += unpack_token_ids(response.complete.token_ids if is_last else response.chunk.token_ids)
            complete = response.complete if is_last else None
    except grpc.aio.AioRpcError as error:
        load.outcomes[error.code().name] += 1
    finally:
        talk.answered(session, token_ids)
    if complete is not None:
        load.note(complete, times)


def _now() -> float:
    return time.monotonic()
