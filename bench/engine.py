"""Tokens per second of one worker's engine against transformers: same weights, same prompts, one thread each."""

from __future__ import annotations

import random
import statistics
import tempfile
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from bench.harness import Figure, interleave, time_of
from engine.config import SchedulerConfig
from engine.local_engine import LocalEngine
from engine.model_loader import LoadedModel, load_model
from engine.model_runner import ModelRunner
from engine.paged_kv_cache import PagedKVCache
from engine.worker_core import WorkerCore
from protos.types import GenerateRequest, SamplingParams

DESCRIPTION = "engine throughput (scheduler included) against transformers' generate and generate_batch"

NUM_NEW_TOKENS = 48
SHORTEST_PROMPT, LONGEST_PROMPT = 24, 200  # tokens
STREAMS = (1, 8, 32)
NUM_BLOCKS = 256
MAX_NUM_BATCHED_TOKENS = 512  # of a step, here and in continuous batching
VOCAB_SIZE = 4096

Generate = Callable[[list[list[int]]], object]


def run(quick: bool) -> list[Figure]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(folder)
        loaded = load_model(folder)
        engines: dict[str, Generate] = {
            "twinring": twinring_engine(loaded),
            "padded": padded_generate(load_plain(folder)),
            "continuous": continuous_generate(load_plain(folder)),
        }
        figures = []
        for num_streams in STREAMS:
            figures += measure(engines, make_prompts(num_streams), runs=2 if quick else 5)
    millions = sum(weight.numel() for weight in loaded.model.parameters()) / 1e6
    model = f"random Llama of {millions:.1f} M parameters, float32, 1 thread"
    return [replace(figures[0], note=model), *figures[1:]]


def measure(engines: dict[str, Generate], prompts: list[list[int]], runs: int) -> list[Figure]:
    """Medians over runs, which the engines take in turns; ratios are medians of the ratios of each turn."""
    for generate in engines.values():
        generate(prompts)  # warm-up
    durations = interleave(runs, {name: _timed(generate, prompts) for name, generate in engines.items()})
    n = len(prompts)
    rates = {name: [n * NUM_NEW_TOKENS / d for d in values] for name, values in durations.items()}
    figures = [Figure(f"{name}_at_{n}", statistics.median(rates[name]), "tok/s") for name in engines]
    for peer, key, target in (
        ("padded", "ratio_to_transformers", 1.3 if n == 32 else None),
        ("continuous", "ratio_to_continuous_batching", None),
    ):
        ratio = statistics.median(ours / theirs for ours, theirs in zip(rates["twinring"], rates[peer], strict=True))
        figures.append(Figure(f"{key}_at_{n}", ratio, "x", target))
    return figures


def _timed(generate: Generate, prompts: list[list[int]]) -> Callable[[], float]:
    return lambda: time_of(lambda: generate(prompts))


def save_random_model(folder: str) -> None:
    """Without an end-of-sequence token: every engine generates exactly NUM_NEW_TOKENS for every prompt."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def make_prompts(num_streams: int) -> list[list[int]]:
    """Random prompts whose lengths are spread evenly over the range; a single one takes its middle."""
    rng = random.Random(num_streams)
    span = LONGEST_PROMPT - SHORTEST_PROMPT
    lengths = [SHORTEST_PROMPT + span * (2 * i + 1) // (2 * num_streams) for i in range(num_streams)]
    return [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]


# --- the engines --------------------------------------------------------------------------------------------------


def twinring_engine(
    loaded: LoadedModel, num_new_tokens: int = NUM_NEW_TOKENS, max_num_batched_tokens: int = MAX_NUM_BATCHED_TOKENS
) -> Generate:
    config = SchedulerConfig(
        max_model_len=loaded.facts.max_model_len,
        max_num_batched_tokens=max_num_batched_tokens,
        enable_prefix_caching=False,
    )
    layout = loaded.facts.kv_layout(loaded.dtype, config.block_size, config.hash_block_size)
    runner = ModelRunner(loaded, PagedKVCache(layout, NUM_BLOCKS))

    def generate(prompts: list[list[int]]) -> object:
        core = WorkerCore(config, NUM_BLOCKS, hash_key=bytes(32), model_fingerprint=loaded.facts.fingerprint)
        requests = [make_request(str(index), prompt, num_new_tokens) for index, prompt in enumerate(prompts)]
        outputs = LocalEngine(core, runner).generate(requests)
        assert all(len(tokens) == num_new_tokens for tokens in outputs.values())
        return outputs

    return generate


def make_request(request_id: str, prompt: list[int], num_new_tokens: int) -> GenerateRequest:
    return GenerateRequest(
        request_id=request_id,
        client_request_id=request_id,
        attempt=1,
        token_ids=array("i", prompt),
        num_prompt_tokens=len(prompt),
        sampling_params=SamplingParams(temperature=0.0, top_p=1.0, top_k=0, seed=0, max_tokens=num_new_tokens),
    )


def load_plain(folder: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    plain: PreTrainedModel = model.eval()
    return plain


def padded_generate(model: Any, num_new_tokens: int = NUM_NEW_TOKENS) -> Generate:
    """All prompts as one batch, padded on the left to the longest."""

    def generate(prompts: list[list[int]]) -> object:
        width = max(map(len, prompts))
        input_ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.inference_mode():
            tokens = model.generate(
                input_ids, attention_mask=mask, do_sample=False, max_new_tokens=num_new_tokens, pad_token_id=0
            )
        assert tokens.shape[1] == width + num_new_tokens
        return tokens

    return generate


def continuous_generate(model: Any) -> Generate:
    make_settings: Any = GenerationConfig  # untyped
    settings = make_settings(max_new_tokens=NUM_NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    sizes = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=MAX_NUM_BATCHED_TOKENS)

    def generate(prompts: list[list[int]]) -> object:
        outputs = model.generate_batch(prompts, generation_config=settings, continuous_batching_config=sizes)
        assert all(len(each.generated_tokens) == NUM_NEW_TOKENS for each in outputs.values())
        return outputs

    return generate
