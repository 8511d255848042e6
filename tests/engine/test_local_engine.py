"""Scheduler and model together: whatever the scheduler does to a request, its tokens are those of transformers."""

from __future__ import annotations

import random
from array import array
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.config import SchedulerConfig
from engine.events import Submitted
from engine.local_engine import LocalEngine
from engine.model_loader import LoadedModel, load_model
from engine.model_runner import ModelRunner
from engine.paged_kv_cache import PagedKVCache
from engine.worker_core import WorkerCore
from protos.types import GenerateRequest, SamplingParams, TokenOutput
from tests.tiny_models import greedy_reference, save_tiny_model

BLOCK_SIZE = 8
NUM_NEW_TOKENS = 16
GREEDY = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, seed=0, max_tokens=NUM_NEW_TOKENS)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("qwen3"), "qwen3", seed=5)


@pytest.fixture(scope="module")
def loaded(path: Path) -> LoadedModel:
    return load_model(path)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """The last two share the first 32 tokens of the longest."""
    rng = random.Random(2)
    prompts = [[rng.randrange(256) for _ in range(length)] for length in (3, 17, 30, 41)]
    return [*prompts, [*prompts[3][:32], 1, 2, 3], prompts[3][:32]]


@pytest.fixture(scope="module")
def expected(path: Path, prompts: list[list[int]]) -> list[list[int]]:
    return greedy_reference(path, prompts, NUM_NEW_TOKENS)


def make_engine(loaded: LoadedModel, num_blocks: int, budget: int = 16) -> tuple[LocalEngine, WorkerCore]:
    config = SchedulerConfig(
        max_model_len=256,
        max_num_batched_tokens=budget,
        max_num_seqs=8,
        block_size=BLOCK_SIZE,
        hash_block_size=BLOCK_SIZE,
    )
    cache = PagedKVCache(loaded.facts.kv_layout("float32", BLOCK_SIZE, BLOCK_SIZE), num_blocks)
    cache.tensor.fill_(torch.nan)
    core = WorkerCore(config, num_blocks, hash_key=bytes(32), model_fingerprint=loaded.facts.fingerprint)
    return LocalEngine(core, ModelRunner(loaded, cache)), core


def requests_of(prompts: list[list[int]]) -> list[GenerateRequest]:
    return [
        GenerateRequest(f"r{i}", f"c{i}", 1, array("i", prompt), len(prompt), GREEDY)
        for i, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize(("num_blocks", "budget"), [(64, 16), (64, 512), (12, 16)])
def test_tokens_equal_generate(
    loaded: LoadedModel, prompts: list[list[int]], expected: list[list[int]], num_blocks: int, budget: int
) -> None:
    """12 blocks hold two requests at a time: the others wait, or are preempted and computed again."""
    engine, core = make_engine(loaded, num_blocks, budget)
    outputs = engine.generate(requests_of(prompts))
    assert list(outputs.values()) == expected
    ledger = core.ledger()
    assert ledger.balanced
    assert ledger.held == ledger.leased == 0


def test_cached_prefixes_give_the_same_tokens(
    loaded: LoadedModel, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    engine, core = make_engine(loaded, num_blocks=64)
    engine.generate(requests_of(prompts))
    num_steps = core.stats().num_steps
    assert list(engine.generate(requests_of(prompts)).values()) == expected
    assert core.stats().num_steps - num_steps < num_steps, "the second time, prefixes come from the cache"


def test_a_request_that_cannot_fit_is_refused(loaded: LoadedModel) -> None:
    engine, _ = make_engine(loaded, num_blocks=64)
    with pytest.raises(ValueError, match="r0"):
        engine.generate(requests_of([[1] * 300]))


PENALISED = SamplingParams(
    temperature=1.1,
    top_p=0.95,
    top_k=0,
    seed=3,
    max_tokens=60,
    min_p=0.01,
    repetition_penalty=1.4,
    presence_penalty=0.5,
    frequency_penalty=0.5,
    logit_bias=((7, 4.0),),
    num_logprobs=2,
)


def run_penalised(loaded: LoadedModel, num_blocks: int) -> tuple[dict[str, list[int]], dict[str, list[float]], int]:
    """Tokens and log probabilities by request, and how often one was preempted."""
    engine, core = make_engine(loaded, num_blocks, budget=64)
    token_ids: dict[str, list[int]] = {}
    logprobs: dict[str, list[float]] = {}
    num_preemptions = 0
    for index in range(3):
        prompt = array("i", range(index, index + 17))
        core.on(Submitted(GenerateRequest(f"r{index}", "", 1, prompt, 17, replace(PENALISED, seed=index))), 0.0)
    while (output := core.schedule(0.0)[0]) is not None:
        num_preemptions += len(output.preempted_request_ids)
        for effect in core.update_from_output(output, engine._runner.execute(output), 0.0):
            assert isinstance(effect, TokenOutput)
            assert len(effect.logprobs) == len(effect.token_ids)
            token_ids.setdefault(effect.request_id, []).extend(effect.token_ids)
            logprobs.setdefault(effect.request_id, []).extend(each.logprob for each in effect.logprobs)
    return token_ids, logprobs, num_preemptions


def test_penalties_and_logprobs_survive_preemption(loaded: LoadedModel) -> None:
    tokens, logprobs, num_preemptions = run_penalised(loaded, num_blocks=64)
    assert num_preemptions == 0
    assert [len(each) for each in tokens.values()] == [60] * 3
    tight_tokens, tight_logprobs, num_preemptions = run_penalised(loaded, num_blocks=180 // BLOCK_SIZE)
    assert num_preemptions > 0
    assert tight_tokens == tokens
    for request_id, expected_logprobs in logprobs.items():
        assert tight_logprobs[request_id] == pytest.approx(expected_logprobs, abs=1e-4)
