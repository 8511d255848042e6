"""The same requests twice: sent to a live cluster, and given to the simulator under the same settings. What the
simulator shows can then be held against what clients saw."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

import grpc.aio

from bench.service import serving
from cluster.cli import parse_setting
from cluster.config import ServeConfig, load_config
from cluster.run_state import RunState, running_servers
from engine.model_facts import read_model_facts
from engine.worker import scheduler_config
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as pb_grpc
from protos.cost_model import Hardware
from simulator.requests import SimRequest
from simulator.result import RequestRecord, percentile
from simulator.setup import Setup

VOCAB_SIZE = 256  # bytes; the demo model has special tokens above
TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Latencies:
    """Of all requests, in seconds, in order."""

    ttfts_s: tuple[float, ...]
    tpots_s: tuple[float, ...]

    def ttft_s(self, share: float) -> float:
        return percentile(self.ttfts_s, share)

    def tpot_s(self, share: float) -> float:
        return percentile(self.tpots_s, share)


# --- the simulator ------------------------------------------------------------------------------------------------


def setup_of(config: ServeConfig, hardware: Hardware) -> Setup:
    """What the simulator must know of a cluster that serves with these settings on this hardware; messages and links
    are left as they are there. ValueError where its pools are made differently: the simulator's are not."""
    if config.prefill_engine or config.decode_engine:
        raise ValueError("prefill_engine and decode_engine must not be set: simulated workers are alike")
    engine = config.engine
    facts = read_model_facts(engine.model).as_run_by(engine)
    block_nbytes = facts.kv_layout(engine.dtype, engine.block_size, engine.hash_block_size).block_nbytes
    kv_nbytes_per_token = block_nbytes // engine.block_size
    return Setup(
        hardware=replace(hardware, kv_nbytes_per_token=kv_nbytes_per_token),
        num_prefill=config.num_prefill,
        num_decode=config.num_decode,
        router=config.router,
        scheduler=replace(scheduler_config(engine, facts.max_model_len), kv_nbytes_per_token=kv_nbytes_per_token),
        transfer=config.transfer,
        stats_interval_s=config.lease.heartbeat_interval_s,
    )


def latencies_of(records: Sequence[RequestRecord]) -> Latencies:
    """Of a simulation in which every request finished."""
    return _ordered([(record.ttft_s, record.tpot_s) for record in records])


# --- the cluster --------------------------------------------------------------------------------------------------


def config_of(settings: Sequence[str]) -> ServeConfig:
    """Of settings as `twinring serve --set` takes them."""
    return load_config(None, dict(parse_setting(setting) for setting in settings))


@contextlib.contextmanager
def started(settings: tuple[str, ...]) -> Iterator[RunState]:
    """A cluster of its own, ready."""
    with serving((*settings, "router.http_listen=127.0.0.1:0")) as address:
        yield next(state for state in running_servers() if state.address == address)


async def live(address: str, requests: Sequence[SimRequest], draw: str = "") -> Latencies:
    """Each is sent at its time, whatever has become of earlier ones; one that fails raises. Another `draw` has other
    tokens, so that nothing is cached of an earlier one."""
    messages = [message_of(request, draw) for request in requests]
    async with grpc.aio.insecure_channel(address) as channel:
        await channel.channel_ready()
        stub, started_at = pb_grpc.InferenceStub(channel), time.monotonic()
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(_ask(stub, message, started_at + request.at_s))
                for message, request in zip(messages, requests, strict=True)
            ]
    return _ordered([task.result() for task in tasks])


def message_of(request: SimRequest, draw: str) -> pb.GenerateRequest:
    """Its tokens are not the simulator's, but drawn for each block: two prompts are equal as far as they are there."""
    token_ids: list[int] = []
    for hash_id in request.hash_ids:
        token_ids += Random(f"{draw} {hash_id}").choices(range(VOCAB_SIZE), k=request.block_tokens)
    del token_ids[request.num_prompt_tokens :]
    params = pb.SamplingParams(max_tokens=request.num_output_tokens, temperature=0.0, ignore_eos=True)
    return pb.GenerateRequest(tokenized=pb.TokenizedInput(input_ids=token_ids), sampling_params=params, stream=True)


async def _ask(stub: pb_grpc.InferenceStub, message: pb.GenerateRequest, due_at: float) -> tuple[float, float]:
    """TTFT, from when it was due, and TPOT."""
    await asyncio.sleep(due_at - time.monotonic())
    times: list[float] = []
    async for response in stub.Generate(message, timeout=TIMEOUT_S):
        part = response.chunk if response.HasField("chunk") else response.complete
        if part.token_ids:
            times.append(time.monotonic())
        if response.HasField("complete"):
            assert response.complete.completion_tokens == message.sampling_params.max_tokens, response.complete
    num_gaps = max(1, message.sampling_params.max_tokens - 1)
    return times[0] - due_at, (times[-1] - times[0]) / num_gaps


def _ordered(pairs: Sequence[tuple[float | None, float | None]]) -> Latencies:
    """TTFT and TPOT of each."""
    ttfts_s = sorted(ttft_s for ttft_s, _ in pairs if ttft_s is not None)
    tpots_s = sorted(tpot_s for _, tpot_s in pairs if tpot_s is not None)
    assert len(ttfts_s) == len(tpots_s) == len(pairs), "a request did not finish"
    return Latencies(tuple(ttfts_s), tuple(tpots_s))
