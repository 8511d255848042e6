"""Is the engine right on the card: greedy tokens against transformers, launched and replayed steps against each other,
and whether the KV that is said to have room does."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from bench._gpu_card import GIB, Card
from bench._gpu_kernels import noted_compilations
from bench._gpu_models import GREEDY, SMALL, golden_pair
from engine.config import SchedulerConfig
from engine.decode_graphs import Recorder
from engine.device_runner import DeviceRunner
from engine.local_engine import LocalEngine
from engine.model_loader import LoadedModel
from engine.model_runner import ModelRunner
from engine.paged_kv_cache import PagedKVCache
from engine.runners import Runner, largest_step, make_runner, num_blocks_beside, warm_up
from engine.worker_config import EngineConfig
from engine.worker_core import WorkerCore
from protos.types import GenerateRequest, SamplingParams

BLOCK_SIZE, NUM_BLOCKS, NUM_NEW_TOKENS = 64, 64, 24
MAX_MODEL_LEN, CHUNK = 1024, 96
LENGTHS = (1, 5, 63, 64, 65, 200, 500)
# Of the best logit over the second, where logits are 4 wide: with less, another order of sums may choose otherwise.
MIN_MARGINS = {"float32": 0.01, "bfloat16": 0.5, "float16": 0.2}


def prompts(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(SMALL.vocab_size) for _ in range(length)] for length in lengths]


@dataclass(frozen=True, slots=True)
class Runners:
    """Of one model: in plain PyTorch, by kernels launched one by one, by kernels and graphs."""

    torch: Runner
    launched: Runner
    replayed: Runner


def runners_of(loaded: LoadedModel, make_recorder: Callable[[], Recorder]) -> Runners:
    def cache() -> PagedKVCache:
        made = PagedKVCache(loaded.facts.kv_layout(loaded.dtype, BLOCK_SIZE, BLOCK_SIZE), NUM_BLOCKS, loaded.device)
        made.tensor.fill_(torch.nan)
        return made

    replayed = DeviceRunner(loaded, cache())
    replayed.record_graphs(len(LENGTHS), MAX_MODEL_LEN, make_recorder(), lambda progress: None)
    return Runners(ModelRunner(loaded, cache()), DeviceRunner(loaded, cache()), replayed)


def generated(
    runner: Runner, given: Sequence[Sequence[int]], params: Sequence[SamplingParams], num_new: int
) -> list[list[int]]:
    """By the real scheduler, in chunks of up to CHUNK tokens."""
    config = SchedulerConfig(max_model_len=MAX_MODEL_LEN, max_num_batched_tokens=CHUNK, enable_prefix_caching=False)
    core = WorkerCore(config, NUM_BLOCKS, hash_key=bytes(32), model_fingerprint="random")
    requests = [
        GenerateRequest(
            request_id=str(index),
            client_request_id=str(index),
            attempt=1,
            token_ids=array("i", prompt),
            num_prompt_tokens=len(prompt),
            sampling_params=replace(each, max_tokens=num_new),
        )
        for index, (prompt, each) in enumerate(zip(given, params, strict=True))
    ]
    outputs = LocalEngine(core, runner).generate(requests)
    return [outputs[request.request_id] for request in requests]


def wrong_tokens(
    reference: PreTrainedModel, given: Sequence[list[int]], outputs: Sequence[list[int]], min_margin: float
) -> int:
    """Of the tokens that lead by min_margin in float32, given those before them: how many were not chosen."""
    num_wrong = num_judged = 0
    for prompt, output in zip(given, outputs, strict=True):
        with torch.inference_mode():
            logits = reference(input_ids=torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
        best = logits.topk(2, dim=-1)
        leads = best.values[:, 0] - best.values[:, 1] >= min_margin
        num_judged += int(leads.sum())
        num_wrong += int((leads & (best.indices[:, 0] != torch.tensor(output))).sum())
    assert num_judged > sum(map(len, outputs)) // 2, f"only {num_judged} tokens lead by a margin"
    return num_wrong


def golden_errors(
    card: Card, dtype: str, make_recorder: Callable[[], Recorder], num_new: int, layer_kernels: bool = False
) -> tuple[dict[str, int], list[str]]:
    """Wrong tokens of each way to run a step, and the kernels that compiled although a warm-up was before."""
    loaded, reference = golden_pair(card, dtype, layer_kernels)
    runners, given = runners_of(loaded, make_recorder), prompts()
    engine = EngineConfig(model="random", dtype=dtype, max_num_seqs=len(given), max_num_batched_tokens=CHUNK)
    warm_up(runners.launched, engine, MAX_MODEL_LEN)
    wrong = {}
    with noted_compilations() as late:
        for name in ("torch", "launched", "replayed"):
            outputs = generated(getattr(runners, name), given, [GREEDY] * len(given), num_new)
            wrong[name] = wrong_tokens(reference, given, outputs, MIN_MARGINS[dtype])
    return wrong, late


def replay_differences(card: Card, make_recorder: Callable[[], Recorder], num_new: int) -> int:
    """Requests whose tokens differ between launched and replayed steps in float32, some greedy, some drawn."""
    loaded, _ = golden_pair(card, "float32")
    runners, given = runners_of(loaded, make_recorder), prompts()
    different = 0
    for kind in (GREEDY, replace(GREEDY, temperature=0.7), replace(GREEDY, temperature=0.7, top_p=0.9)):
        params = [replace(kind, seed=index) if index % 2 else GREEDY for index in range(len(given))]
        launched, replayed = (
            generated(runner, given, params, num_new) for runner in (runners.launched, runners.replayed)
        )
        different += sum(ours != theirs for ours, theirs in zip(launched, replayed, strict=True))
    return different


def memory_left(card: Card, loaded: LoadedModel, utilization: float) -> dict[str, float]:
    """GiB: of KV that is said to have room, and free on the card once it is there and the largest step has run."""
    engine = EngineConfig(
        model="random",
        dtype=loaded.dtype,
        device=str(card.device),
        max_num_batched_tokens=8192,
        max_num_seqs=64,
        gpu_memory_utilization=utilization,
    )
    max_model_len = loaded.facts.max_model_len
    layout = loaded.facts.kv_layout(loaded.dtype, engine.block_size, engine.hash_block_size)
    num_blocks = num_blocks_beside(loaded, engine, max_model_len)
    cache = PagedKVCache(layout, num_blocks, card.device)
    runner = make_runner(loaded, cache, engine, max_model_len, lambda progress: None)
    runner.execute(largest_step(engine, max_model_len))
    return {
        "kv": num_blocks * layout.block_nbytes / GIB,
        "free": card.free_nbytes() / GIB,
    }
