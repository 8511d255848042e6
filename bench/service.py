"""What the service adds to the engine: a real cluster of one prefill and one decode worker, and the bare engine in this
process, on the same prompts in turns. The client, too, runs on this machine and counts against the service."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import statistics
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

import grpc.aio
import torch

from bench.harness import Figure, interleave
from cluster.config import DEMO_MODEL
from cluster.demo import wait_for
from engine.config import SchedulerConfig
from engine.events import Submitted
from engine.model_loader import load_model
from engine.model_runner import ModelRunner
from engine.paged_kv_cache import PagedKVCache
from engine.worker_config import EngineConfig
from engine.worker_core import WorkerCore
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as pb_grpc
from protos.types import GenerateRequest, SamplingParams, TokenOutput

DESCRIPTION = "latency that the service adds to the bare engine: first token and later tokens, 1 to 32 streams"

STREAMS = (1, 8, 32)
HEADLINE = 8  # streams that the keys without a number speak of
PROMPT_LEN = 192  # tokens, three blocks: random, so that nothing is cached
NUM_NEW_TOKENS = 64
VOCAB_SIZE = 256  # bytes; the demo model has special tokens above
TARGETS_MS = {"ms_per_token": 1.0, "ttft_ms": 10.0}
NUM_BLOCKS = 512
ENGINE = EngineConfig(model=DEMO_MODEL, num_threads=1, num_blocks=NUM_BLOCKS)
SETTINGS = (f"engine.num_blocks={NUM_BLOCKS}", "lease.lease_s=6.0", "transfer.silence_timeout_s=6.0")
TIMEOUT_S = 120.0

Prompts = list[list[int]]


@dataclass
class Stream:
    """When the tokens of one request came, since all were sent."""

    times_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    router_ttft_s: float = 0.0

    @property
    def ttft_s(self) -> float:
        return self.times_s[0]

    @property
    def s_per_token(self) -> float:
        assert self.num_tokens == NUM_NEW_TOKENS, self.num_tokens
        return (self.times_s[-1] - self.times_s[0]) / (self.num_tokens - 1)


def run(quick: bool) -> list[Figure]:
    torch.set_num_threads(ENGINE.num_threads)
    runs, rng = (1 if quick else 9), random.Random(0)
    bare = BareEngine()
    figures: list[Figure] = []
    with serving() as address, asyncio.Runner() as loop:
        client = Client(address, loop)
        for num_streams in STREAMS[:2] if quick else STREAMS:
            figures += measure(bare, client, num_streams, runs, rng)
        client.close()
    headline = [
        Figure(name.removesuffix(f"_{HEADLINE}"), f.value, f.unit, f.target, "lower", f"at {HEADLINE} streams")
        for f in figures
        if (name := f.key).startswith("added") and name.endswith(f"_{HEADLINE}")
    ]
    return headline + figures


def measure(bare: BareEngine, client: Client, num_streams: int, runs: int, rng: random.Random) -> list[Figure]:
    """p50 over the streams of a run; medians over runs; what is added is the median of the differences of each turn."""
    samples: dict[str, list[list[Stream]]] = {"bare": [], "service": []}

    def once(name: str) -> float:
        prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(PROMPT_LEN)] for _ in range(num_streams)]
        samples[name].append((bare if name == "bare" else client).generate(prompts))
        return 0.0

    interleave(1, {name: lambda name=name: once(name) for name in samples})  # type: ignore[misc]  # warm-up
    for kept in samples.values():
        kept.clear()
    interleave(runs, {name: lambda name=name: once(name) for name in samples})  # type: ignore[misc]
    p50s = {
        (name, metric): [1e3 * statistics.median(getattr(s, attribute) for s in streams) for streams in kept]
        for name, kept in samples.items()
        for metric, attribute in (("ms_per_token", "s_per_token"), ("ttft_ms", "ttft_s"))
    }
    figures = []
    for metric, target in TARGETS_MS.items():
        ours, theirs = p50s["service", metric], p50s["bare", metric]
        added = statistics.median(a - b for a, b in zip(ours, theirs, strict=True))
        figures.append(Figure(f"added_{metric}_p50_{num_streams}", added, "ms", target, "lower"))
        figures.append(Figure(f"service_{metric}_p50_{num_streams}", statistics.median(ours), "ms", better="lower"))
        figures.append(Figure(f"bare_{metric}_p50_{num_streams}", statistics.median(theirs), "ms", better="lower"))
    at_router = [1e3 * statistics.median(s.router_ttft_s for s in streams) for streams in samples["service"]]
    note = "from arrival at the router, without the client's side"
    key = f"router_ttft_ms_p50_{num_streams}"
    return [*figures, Figure(key, statistics.median(at_router), "ms", better="lower", note=note)]


# --- the two sides ------------------------------------------------------------------------------------------------


class BareEngine:
    """The engine that a worker runs, stepped in this process, with one core for prefill and decode alike."""

    def __init__(self) -> None:
        loaded = load_model(DEMO_MODEL)
        self._config = SchedulerConfig(
            max_model_len=loaded.facts.max_model_len,
            max_num_batched_tokens=ENGINE.max_num_batched_tokens,
            max_num_seqs=ENGINE.max_num_seqs,
        )
        layout = loaded.facts.kv_layout(loaded.dtype, self._config.block_size, self._config.hash_block_size)
        self._runner = ModelRunner(loaded, PagedKVCache(layout, NUM_BLOCKS))
        self._fingerprint = loaded.facts.fingerprint

    def generate(self, prompts: Prompts) -> list[Stream]:
        core = WorkerCore(self._config, NUM_BLOCKS, hash_key=bytes(32), model_fingerprint=self._fingerprint)
        streams = {str(index): Stream() for index in range(len(prompts))}
        started_at = time.monotonic()
        for request_id, prompt in zip(streams, prompts, strict=True):
            core.on(Submitted(bare_request(request_id, prompt)), started_at)
        while True:
            output, _ = core.schedule(time.monotonic())
            if output is None:
                return list(streams.values())
            result = self._runner.execute(output)
            now = time.monotonic()
            for effect in core.update_from_output(output, result, now):
                assert isinstance(effect, TokenOutput), effect
                streams[effect.request_id].num_tokens += len(effect.token_ids)
                streams[effect.request_id].times_s.append(now - started_at)


def bare_request(request_id: str, prompt: list[int]) -> GenerateRequest:
    return GenerateRequest(
        request_id=request_id,
        client_request_id=request_id,
        attempt=1,
        token_ids=array("i", prompt),
        num_prompt_tokens=len(prompt),
        sampling_params=SamplingParams(temperature=0.0, top_p=1.0, top_k=0, seed=0, max_tokens=NUM_NEW_TOKENS),
    )


class Client:
    """Streams over one channel, all started at once."""

    def __init__(self, address: str, loop: asyncio.Runner) -> None:
        self._loop = loop
        self._channel = loop.run(self._connect(address))

    def generate(self, prompts: Prompts) -> list[Stream]:
        return self._loop.run(self._generate_all(prompts))

    def close(self) -> None:
        self._loop.run(self._channel.close())

    async def _connect(self, address: str) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(address)

    async def _generate_all(self, prompts: Prompts) -> list[Stream]:
        started_at = time.monotonic()
        return list(await asyncio.gather(*(self._generate(prompt, started_at) for prompt in prompts)))

    async def _generate(self, prompt: list[int], started_at: float) -> Stream:
        params = pb.SamplingParams(max_tokens=NUM_NEW_TOKENS, temperature=0.0, ignore_eos=True)
        request = pb.GenerateRequest(tokenized=pb.TokenizedInput(input_ids=prompt), sampling_params=params, stream=True)
        stream = Stream()
        async for response in pb_grpc.InferenceStub(self._channel).Generate(request, timeout=TIMEOUT_S):
            stream.times_s.append(time.monotonic() - started_at)
            if response.HasField("complete"):
                assert response.complete.placement.mode == pb.SERVING_MODE_DISAGGREGATED, response.complete.placement
                stream.num_tokens = response.complete.completion_tokens
                stream.router_ttft_s = response.complete.placement.ttft_s
        return stream


@contextlib.contextmanager
def serving(settings: tuple[str, ...] = ()) -> Iterator[str]:
    """The address of a ready cluster, one prefill and one decode worker, with further settings."""
    options = [option for setting in (*SETTINGS, *settings) for option in ("--set", setting)]
    command = [sys.executable, "-m", "cluster.cli", "serve", "--listen", "127.0.0.1:0", "--http", "", *options]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        yield wait_for(server)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(TIMEOUT_S)
