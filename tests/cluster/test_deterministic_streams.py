"""Deterministic workers, of a model whose every token is nearly tied with another one: streams that move, whose worker
dies, or that run beside others are bit for bit what a bare engine computes of each alone."""

from __future__ import annotations

import asyncio
import os
import signal
from array import array
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest
import torch

from bench._near_ties import make_near_ties
from bench._one_process import OneProcess, one_process
from cluster.config import load_config
from engine.config import SchedulerConfig
from engine.determinism_check import find_fixed_shapes
from engine.deterministic_runner import DeterministicRunner
from engine.local_engine import LocalEngine
from engine.model_loader import load_model
from engine.paged_kv_cache import PagedKVCache
from engine.worker_core import WorkerCore
from protos import inference_pb2 as pb
from protos.types import GenerateRequest, SamplingParams
from tests.cluster.server import PATIENT, Server, eventually, request, serving
from tests.cluster.streams import generate
from tests.cluster.test_migrating_streams import move_about
from tests.tiny_models import save_tiny_model

NUM_STREAMS = 6
NUM_TOKENS = 250
BLOCK_SIZE = 16
PROMPTS = [[*range(40, 100 + 40 * number), number] for number in range(NUM_STREAMS)]
SIZES = {"block_size": BLOCK_SIZE, "hash_block_size": BLOCK_SIZE, "num_blocks": 400, "max_num_batched_tokens": 200}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_tiny_model(tmp_path_factory.mktemp("llama") / "model", "llama")
    make_near_ties(path)
    return path


@pytest.fixture(scope="module")
def alone(model: Path) -> list[list[int]]:
    """Of each prompt, from an engine that has nothing else to do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    loaded = load_model(model, packed=True)
    shapes = find_fixed_shapes(loaded)
    kv_cache = PagedKVCache(loaded.facts.kv_layout("float32", 16, 16, shapes.digest), 64)
    config = SchedulerConfig(max_model_len=1024, block_size=16, hash_block_size=16, enable_prefix_caching=False)
    core = WorkerCore(config, 64, bytes(32), loaded.facts.fingerprint)
    engine = LocalEngine(core, DeterministicRunner(loaded, kv_cache, shapes))
    params = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, seed=0, max_tokens=NUM_TOKENS)
    requests = [GenerateRequest(f"r{i}", "c", 1, array("i", p), len(p), params) for i, p in enumerate(PROMPTS)]
    outputs = [engine.generate([one])[one.request_id] for one in requests]
    torch.set_num_threads(before)
    assert max(max(tokens) for tokens in outputs) >= 150 > min(min(tokens) for tokens in outputs), "both of a pair win"
    return outputs


@pytest.fixture
async def cluster(model: Path) -> AsyncIterator[OneProcess]:
    tree = {
        "num_decode": 3,
        "engine": {"model": str(model), "deterministic": True, **SIZES},
        "lease": {"lease_s": 6.0},
        "transfer": {"chunk_nbytes": 1, "chunk_timeout_s": 5.0, "silence_timeout_s": 6.0},
    }
    async with one_process(load_config(overrides=tree)) as running:
        yield running


def greedy(number: int) -> pb.GenerateRequest:
    return request(PROMPTS[number], NUM_TOKENS, ignore_eos=True)


async def test_streams_that_move_at_random(cluster: OneProcess, alone: list[list[int]]) -> None:
    async with grpc.aio.insecure_channel(cluster.hand.address) as channel:
        streams = [asyncio.create_task(generate(channel, greedy(number))) for number in range(NUM_STREAMS)]
        await move_about(cluster, streams, seed=1)
        moved = [await stream for stream in streams]
    assert [one.token_ids for one in moved] == alone
    assert sum(one.placement.migrations for one in moved) >= NUM_STREAMS


@pytest.mark.ray
@pytest.mark.slow
async def test_streams_that_wander_and_whose_worker_is_killed(
    model: Path, alone: list[list[int]], tmp_path: Path
) -> None:
    settings = (*PATIENT, "engine.deterministic=true", *(f"engine.{name}={value}" for name, value in SIZES.items()))
    arguments = ("--model", str(model), "--prefill", "1", "--decode", "2")
    with serving(tmp_path, *arguments, settings=settings, program=("bench._wandering", "0.3")) as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            streams = [asyncio.create_task(generate(channel, greedy(number))) for number in range(NUM_STREAMS)]
            victim = await asyncio.to_thread(eventually, lambda: busy_decode_worker(server), 10.0)
            os.kill(server.worker_pid(victim), signal.SIGKILL)
            answers = await asyncio.gather(*streams)
    assert [answer.token_ids for answer in answers] == alone
    assert any(answer.placement.attempts > 1 for answer in answers), "nothing ran on the killed worker"


def busy_decode_worker(server: Server) -> str:
    loads = server.status().workers
    return next((load.worker_id for load in loads if load.role == "decode" and load.num_running), "")
