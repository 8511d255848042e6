"""By what a worker's model runs, and how many KV blocks it has room for beside the model: on a GPU both depend on what
is there."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

import torch

from engine.decode_graphs import CudaRecorder
from engine.device_memory import kv_nbytes_beside, memory_around
from engine.device_runner import DeviceRunner
from engine.model_loader import LoadedModel
from engine.model_runner import ModelRunner
from engine.paged_kv_cache import PagedKVCache, num_blocks_for
from engine.scheduler_output import ScheduledRequest, SchedulerOutput
from engine.worker_config import EngineConfig
from protos.types import SamplingParams

Runner = ModelRunner | DeviceRunner

# What takes the most memory to draw from: all logits are sorted.
_HEAVY = SamplingParams(temperature=1.0, top_p=0.9, top_k=0, seed=0, max_tokens=1)


def make_runner(
    loaded: LoadedModel,
    kv_cache: PagedKVCache,
    engine: EngineConfig,
    max_model_len: int,
    on_progress: Callable[[str], None],
) -> Runner:
    """Ready for its first step; ValueError where a GPU has no memory for the largest, or for recorded graphs."""
    runner = _runner_over(loaded, kv_cache, engine)
    device = kv_cache.tensor.device
    with _no_room_told(kv_cache.num_blocks):
        if device.type == "cuda":
            on_progress("trying the largest step")
            warm_up(runner, engine, max_model_len)
        if isinstance(runner, DeviceRunner) and engine.cuda_graphs:
            runner.record_graphs(engine.max_num_seqs, max_model_len, CudaRecorder(device), on_progress)
    return runner


def num_blocks_beside(loaded: LoadedModel, engine: EngineConfig, max_model_len: int) -> int:
    """ValueError where not one block has room."""
    if engine.fixed_num_blocks is not None:
        return engine.fixed_num_blocks
    layout = loaded.facts.kv_layout(loaded.dtype, engine.block_size, engine.hash_block_size)
    if engine.kv_nbytes is not None:
        return num_blocks_for(engine.kv_nbytes, layout)
    step = largest_step(engine, max_model_len)
    num_blocks = 1 + max(block_id for request in step.scheduled for block_id in request.block_table)
    runner = _runner_over(loaded, PagedKVCache(layout, num_blocks, loaded.device), engine)
    memory = memory_around(lambda: runner.execute(step), loaded.device)
    # The pool that the step wrote to is still there, and goes before the real one comes.
    nbytes = kv_nbytes_beside(memory, engine.gpu_memory_utilization, engine.gpu_reserved_bytes)
    return num_blocks_for(nbytes, layout, "what gpu_memory_utilization leaves")


def warm_up(runner: Runner, engine: EngineConfig, max_model_len: int) -> None:
    """Runs the steps that ask for the most: of prompts, of one prompt, of decodes. What compiles does so before a
    request waits for it. Leaves keys and values in blocks that are nobody's yet."""
    num_blocks = runner.kv_cache.num_blocks
    largest = largest_step(engine, max_model_len, num_blocks)
    runner.execute(largest)
    one_prompt = [min(max_model_len, engine.max_num_batched_tokens)]
    decodes = [1] * len(largest.scheduled)
    for lengths in (one_prompt, decodes):
        runner.execute(_drawing_step(lengths, engine.block_size, num_blocks))


@contextmanager
def _no_room_told(num_blocks: int) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"no GPU memory is left for the largest step and for graphs beside {num_blocks} KV blocks: lower "
            f"kv_cache_bytes, num_blocks or max_num_batched_tokens ({error})"
        ) from None


def use_layer_kernels(engine: EngineConfig) -> bool:
    return engine.fused_kernels and engine.is_on_gpu and find_spec("triton") is not None


def largest_step(engine: EngineConfig, max_model_len: int, num_blocks: int | None = None) -> SchedulerOutput:
    """As many tokens as a step may have, over as many prompts as may be in it, each of which draws. num_blocks: of the
    pool; where they are too few, prompts share them. None: a block for everything."""
    num_seqs = min(engine.max_num_seqs, engine.max_num_batched_tokens)
    each, more = divmod(min(engine.max_num_batched_tokens, num_seqs * max_model_len), num_seqs)
    return _drawing_step([each + 1] * more + [each] * (num_seqs - more), engine.block_size, num_blocks)


def _drawing_step(lengths: Sequence[int], block_size: int, num_blocks: int | None) -> SchedulerOutput:
    scheduled: list[ScheduledRequest] = []
    next_block = itertools.count() if num_blocks is None else itertools.cycle(range(num_blocks))
    for index, length in enumerate(lengths):
        scheduled.append(
            ScheduledRequest(
                request_id=str(index),
                token_ids=array("i", [0] * length),
                num_prompt_tokens=length,
                num_computed_tokens=0,
                num_scheduled_tokens=length,
                block_table=list(itertools.islice(next_block, -(-length // block_size))),
                sampling_params=_HEAVY,
                samples=True,
            )
        )
    return SchedulerOutput(0, tuple(scheduled), sum(lengths))


def _runner_over(loaded: LoadedModel, kv_cache: PagedKVCache, engine: EngineConfig) -> Runner:
    device = kv_cache.tensor.device
    if device.type != "cuda" or not engine.paged_kernels or find_spec("triton") is None:
        return ModelRunner(loaded, kv_cache)
    if device.index != torch.cuda.current_device():  # kernels are launched on the thread's current device
        raise ValueError(f"device must be cuda, the first that CUDA_VISIBLE_DEVICES shows, not {device}")
    return DeviceRunner(loaded, kv_cache)
