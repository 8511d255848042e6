"""What `engine.deterministic` costs and what it gives. Costs: prefill and decode of one worker's engine, with it and
without, beside transformers' generate. Gives: of streams whose tokens are nearly tied, how many become others when they
run beside others, in chunks of other lengths."""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial

import torch
from transformers.utils import logging as transformers_logging

from bench._near_ties import make_near_ties
from bench.engine import Generate, load_plain, make_request, padded_generate, save_random_model
from bench.harness import Figure, core_time_of, interleave
from engine.config import SchedulerConfig
from engine.determinism_check import find_fixed_shapes
from engine.deterministic_runner import DeterministicRunner
from engine.fixed_shapes import FixedShapes
from engine.local_engine import LocalEngine
from engine.model_loader import LoadedModel, load_model
from engine.model_runner import ModelRunner
from engine.paged_kv_cache import PagedKVCache
from engine.worker_core import WorkerCore

DESCRIPTION = "engine.deterministic: what it costs, and how many streams it keeps from becoming others in company"

BATCHES = (1, 4, 16)
CONTEXTS, QUICK_CONTEXTS = (256, 1024), (256,)
NUM_NEW_TOKENS = 32
NUM_BLOCKS = 320
VOCAB_SIZE = 4096
NUM_STREAMS, QUICK_NUM_STREAMS = 96, 16
NUM_TOGETHER = 16  # streams at a time
NUM_STREAM_TOKENS = 96
BUDGETS = (512, 96)  # tokens of a step: chunks of prompts end elsewhere


def run(quick: bool) -> list[Figure]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(folder)
        make_near_ties(folder)
        plain, packed = load_model(folder), load_model(folder, packed=True)
        shapes = find_fixed_shapes(packed)  # and once more, timed: what it compiles is kept
        check_s = core_time_of(lambda: find_fixed_shapes(packed))
        figures = [Figure("check_s", check_s, "s", note=f"rows by {shapes.rows}, queries by {shapes.queries}")]
        engines = {"deterministic": Engine(packed, shapes), "plain": Engine(plain)}
        for context in QUICK_CONTEXTS if quick else CONTEXTS:
            for batch in BATCHES:
                figures += speeds(engines, load_plain(folder), context, batch, runs=2 if quick else 5)
        figures += differing(engines, QUICK_NUM_STREAMS if quick else NUM_STREAMS)
    return figures


class Engine:
    """Scheduler, model and paged KV cache of one worker; deterministic where shapes are given."""

    def __init__(self, loaded: LoadedModel, shapes: FixedShapes | None = None) -> None:
        self._loaded = loaded
        layout = loaded.facts.kv_layout(loaded.dtype, 64, 64, shapes.digest if shapes else "")
        kv_cache = PagedKVCache(layout, NUM_BLOCKS)
        self._runner = DeterministicRunner(loaded, kv_cache, shapes) if shapes else ModelRunner(loaded, kv_cache)

    def generate(self, prompts: Sequence[list[int]], num_new_tokens: int, budget: int = BUDGETS[0]) -> list[list[int]]:
        """New tokens of each prompt, all run beside each other."""
        config = SchedulerConfig(
            max_model_len=self._loaded.facts.max_model_len, max_num_batched_tokens=budget, enable_prefix_caching=False
        )
        core = WorkerCore(config, NUM_BLOCKS, bytes(32), self._loaded.facts.fingerprint)
        requests = [make_request(str(index), prompt, num_new_tokens) for index, prompt in enumerate(prompts)]
        outputs = LocalEngine(core, self._runner).generate(requests)
        return [outputs[request.request_id] for request in requests]


# --- costs ------------------------------------------------------------------------------------------------------------


def speeds(engines: dict[str, Engine], model: object, context: int, batch: int, runs: int) -> list[Figure]:
    """Prefill: of prompts of `context` tokens, up to the first new one; decode: of what comes after."""
    prompts = [prompt_of(context, seed) for seed in range(batch)]
    calls: dict[str, Callable[[], float]] = {}
    for num_new_tokens in (1, 1 + NUM_NEW_TOKENS):
        for name, engine in engines.items():
            calls[f"{name} {num_new_tokens}"] = _timed(partial(engine.generate, num_new_tokens=num_new_tokens), prompts)
        calls[f"generate {num_new_tokens}"] = _timed(padded_generate(model, num_new_tokens), prompts)
    for call in calls.values():
        call()  # warm-up
    durations = interleave(runs, calls)
    firsts = {name: durations[f"{name} 1"] for name in (*engines, "generate")}
    wholes = {name: durations[f"{name} {1 + NUM_NEW_TOKENS}"] for name in firsts}
    rests = {name: [whole - first for whole, first in zip(wholes[name], firsts[name], strict=True)] for name in firsts}
    return [
        _figure(f"prefill_{context}_at_{batch}", firsts, context * batch),
        _figure(f"decode_{context}_at_{batch}", rests, NUM_NEW_TOKENS * batch),
    ]


def _timed(generate: Generate, prompts: list[list[int]]) -> Callable[[], float]:
    return lambda: core_time_of(lambda: generate(prompts))


def _figure(key: str, durations: dict[str, list[float]], num_tokens: int) -> Figure:
    """How fast a deterministic engine is, of a plain one; medians over the runs."""
    rates = {name: num_tokens / statistics.median(values) for name, values in durations.items()}
    note = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
    return Figure(key, rates["deterministic"] / rates["plain"], "x", note=f"tok/s: {note}")


# --- streams that become others ---------------------------------------------------------------------------------------


def differing(engines: dict[str, Engine], num_streams: int) -> list[Figure]:
    """Each stream alone; then beside others, in company and in chunks that differ."""
    prompts = [prompt_of(20 + 7 * (seed % 40), seed) for seed in range(num_streams)]
    figures = []
    for name, engine in engines.items():
        alone = [engine.generate([prompt], NUM_STREAM_TOKENS)[0] for prompt in prompts]
        differs = [False] * num_streams
        for seed, budget in enumerate(BUDGETS):
            order = random.Random(seed).sample(range(num_streams), num_streams)
            for start in range(0, num_streams, NUM_TOGETHER):
                company = order[start : start + NUM_TOGETHER]
                found = engine.generate([prompts[i] for i in company], NUM_STREAM_TOKENS, budget)
                for index, tokens in zip(company, found, strict=True):
                    differs[index] |= tokens != alone[index]
        target = 0.0 if name == "deterministic" else None
        figures.append(Figure(f"differing_streams_{name}", sum(differs), f"of {num_streams}", target, "lower"))
    return figures


def prompt_of(num_tokens: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCAB_SIZE) for _ in range(num_tokens)]
