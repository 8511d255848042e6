"""Seconds for one and for sixteen requests against transformers and vLLM: same weights, prompts, threads, in turns.

vLLM lives in an environment of its own (docs/peer_cpu.md); TWINRING_VLLM_PYTHON names its interpreter. Without it only
transformers is measured."""

from __future__ import annotations

import contextlib
import json
import os
import random
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.engine import Generate, load_plain, padded_generate, twinring_engine
from bench.harness import Figure, interleave, time_of
from engine.model_loader import load_model

DESCRIPTION = "seconds for 1 and 16 requests of 512 tokens in, 128 out, against transformers and vLLM on the CPU"

VLLM_PYTHON = "TWINRING_VLLM_PYTHON"
NUM_THREADS = 2
NUM_PROMPT_TOKENS, NUM_NEW_TOKENS = 512, 128
STREAMS = (1, 16)
VOCAB_SIZE = 5120
MAX_NUM_BATCHED_TOKENS = 2048

Seconds = Callable[[list[list[int]]], float]


def run(quick: bool) -> list[Figure]:
    torch.set_num_threads(NUM_THREADS)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        save_random_model(folder)
        ours = twinring_engine(load_model(folder, "bfloat16"), NUM_NEW_TOKENS, MAX_NUM_BATCHED_TOKENS)
        plain = padded_generate(load_plain(folder, torch.bfloat16), NUM_NEW_TOKENS)
        engines = {"twinring": _seconds_of(ours), "transformers": _seconds_of(plain)}
        if python := os.environ.get(VLLM_PYTHON):
            engines["vllm"] = stack.enter_context(vllm(python, folder, NUM_NEW_TOKENS))
        figures = []
        for num_streams in STREAMS:
            figures += measure(engines, num_streams, runs=1 if quick else 5)
    model = f"28 M bfloat16 Llama, {NUM_THREADS} threads"
    peer = "" if "vllm" in engines else f"; vLLM was not there: {VLLM_PYTHON} is not set"
    return [replace(figures[0], note=model + peer), *figures[1:]]


def measure(engines: dict[str, Seconds], num_streams: int, runs: int) -> list[Figure]:
    """Medians; ratios are medians of the ratios of each turn. Fresh prompts every time: no cache may answer."""
    rng = random.Random(num_streams)

    def timed(seconds_of: Seconds) -> Callable[[], float]:
        def once() -> float:
            return seconds_of(
                [[rng.randrange(VOCAB_SIZE) for _ in range(NUM_PROMPT_TOKENS)] for _ in range(num_streams)]
            )

        return once

    turns = {name: timed(seconds_of) for name, seconds_of in engines.items()}
    for warm_up in turns.values():
        warm_up()
    durations = interleave(runs, turns)
    figures = [
        Figure(f"{name}_s_{num_streams}", statistics.median(durations[name]), "s", None, "lower") for name in turns
    ]
    for peer in [name for name in turns if name != "twinring"]:
        ratio = statistics.median(
            theirs / ours for ours, theirs in zip(durations["twinring"], durations[peer], strict=True)
        )
        figures.append(Figure(f"ratio_to_{peer}_{num_streams}", ratio, "x", 1.0))
    return figures


def _seconds_of(generate: Generate) -> Seconds:
    return lambda prompts: time_of(lambda: generate(prompts))


def save_random_model(folder: str) -> None:
    """28 million parameters, and no end-of-sequence token: every request generates its full length."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)


@contextlib.contextmanager
def vllm(python: str, folder: str, num_new_tokens: int) -> Iterator[Seconds]:
    """A vLLM that keeps its weights from turn to turn; its seconds are its own, without our pipe."""
    settings = {
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": str(NUM_THREADS),
        "HF_HUB_OFFLINE": "1",
    }
    script = Path(__file__).with_name("_vllm_worker.py")
    command = [python, str(script), folder, str(num_new_tokens), str(MAX_NUM_BATCHED_TOKENS)]
    log = Path(folder, "vllm.log")
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=folder,
            env=os.environ | settings,
        ) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def reply() -> object:
            line = stdout.readline()
            if not line:
                raise RuntimeError(f"vLLM has ended: {log.read_text()[-2000:]}")
            return json.loads(line)

        def seconds_of(prompts: list[list[int]]) -> float:
            stdin.write(json.dumps(prompts) + "\n")
            stdin.flush()
            seconds = reply()
            assert isinstance(seconds, float)
            return seconds

        try:
            assert reply() == "ready"
            yield seconds_of
        finally:
            process.kill()
