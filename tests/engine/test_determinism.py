"""A deterministic worker's promise: the same bits for a request, keys, values and log probabilities included, whatever
runs beside it, wherever its chunks end, and whether its KV was computed, found, or computed again."""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.config import SchedulerConfig
from engine.determinism_check import find_fixed_shapes
from engine.deterministic_runner import DeterministicRunner
from engine.fixed_shapes import FixedShapes
from engine.local_engine import LocalEngine
from engine.model_loader import LoadedModel, load_model
from engine.model_runner import ModelRunner
from engine.paged_kv_cache import PagedKVCache
from engine.scheduler_output import ScheduledRequest, SchedulerOutput
from engine.worker_core import WorkerCore
from protos.types import GenerateRequest, Logprobs, SamplingParams
from tests.tiny_models import greedy_reference, save_tiny_model

BLOCK_SIZE = 8
NUM_BLOCKS = 400
NUM_NEW_TOKENS = 5
WINDOW = 9
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "phi")
WINDOWED = ("mistral", "gemma2")
DRAWN = SamplingParams(
    temperature=0.8, top_p=0.9, top_k=0, seed=7, max_tokens=NUM_NEW_TOKENS, frequency_penalty=0.3, num_logprobs=20
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def save(folder: Path, family: str) -> Path:
    path = folder / family
    if not path.exists():
        save_tiny_model(path, family, seed=3, sliding_window=WINDOW if family in WINDOWED else None)
    return path


@cache
def loaded_with_shapes(folder: Path, family: str, dtype: str = "float32") -> tuple[LoadedModel, FixedShapes]:
    loaded = load_model(save(folder, family), dtype, packed=True)
    return loaded, find_fixed_shapes(loaded)


def runner_of(loaded: LoadedModel, shapes: FixedShapes | None) -> ModelRunner | DeterministicRunner:
    """Over a pool full of NaN: whatever is read before it was written ruins the output."""
    numerics = "" if shapes is None else shapes.digest
    kv_cache = PagedKVCache(loaded.facts.kv_layout(loaded.dtype, BLOCK_SIZE, BLOCK_SIZE, numerics), NUM_BLOCKS)
    kv_cache.tensor.fill_(torch.nan)
    return ModelRunner(loaded, kv_cache) if shapes is None else DeterministicRunner(loaded, kv_cache, shapes)


# --- a worker whose scheduler is chance -------------------------------------------------------------------------------


@dataclass
class Life:
    """One request, as a scheduler would keep it."""

    request_id: str
    token_ids: array[int]
    num_prompt_tokens: int
    block_table: list[int]
    num_computed_tokens: int = 0
    logprobs: list[Logprobs] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return len(self.logprobs) == NUM_NEW_TOKENS

    def chunk(self, limit: int) -> ScheduledRequest:
        num_tokens = min(limit, len(self.token_ids) - self.num_computed_tokens)
        return ScheduledRequest(
            self.request_id,
            self.token_ids,
            self.num_prompt_tokens,
            self.num_computed_tokens,
            num_tokens,
            self.block_table,
            DRAWN,
            samples=self.num_computed_tokens + num_tokens == len(self.token_ids),
        )


class Chance:
    """Runs requests beside each other in chunks of any length, stops some and computes them again, lets others begin
    with blocks that somebody else has filled."""

    def __init__(self, runner: ModelRunner | DeterministicRunner, rng: random.Random) -> None:
        self._runner = runner
        self._rng = rng
        self._free = rng.sample(range(NUM_BLOCKS), NUM_BLOCKS)
        self.lives: list[Life] = []

    def add(self, prompt: list[int]) -> Life:
        life = Life(f"r{len(self.lives)}", array("i", prompt), len(prompt), self._blocks(len(prompt)))
        self.lives.append(life)
        return life

    def run(self) -> None:
        while running := [life for life in self.lives if not life.is_done]:
            for life in running:
                self._interfere(life)
            self.step(self._rng.sample(running, self._rng.randint(1, len(running))))

    def step(self, lives: list[Life], limit: int | None = None) -> None:
        chunks = tuple(life.chunk(limit or self._rng.choice((1, 3, 40, 150, 1000))) for life in lives)
        result = self._runner.execute(SchedulerOutput(0, chunks, 0))
        for life, chunk in zip(lives, chunks, strict=True):
            life.num_computed_tokens += chunk.num_scheduled_tokens
            life.token_ids.extend(result.sampled.get(life.request_id, ()))
            life.logprobs.extend(result.logprobs.get(life.request_id, ()))

    def kv_of(self, life: Life) -> torch.Tensor:
        """[num_layers, 2, num_computed_tokens, num_kv_heads, head_dim]"""
        blocks = self._runner.kv_cache.tensor[life.block_table]
        return blocks.movedim(0, 2).flatten(2, 3)[:, :, : life.num_computed_tokens]

    def _interfere(self, life: Life) -> None:
        """Preempt it, and perhaps let it go on behind a prefix that another one has computed."""
        if self._rng.random() > 0.15:
            return
        life.block_table, life.num_computed_tokens = self._blocks(life.num_prompt_tokens), 0
        for other in self.lives:
            shared = min(other.num_computed_tokens, len(life.token_ids) - 1) // BLOCK_SIZE
            if shared and other.token_ids[: shared * BLOCK_SIZE] == life.token_ids[: shared * BLOCK_SIZE]:
                life.block_table[:shared] = other.block_table[:shared]
                life.num_computed_tokens = shared * BLOCK_SIZE
                return

    def _blocks(self, num_prompt_tokens: int) -> list[int]:
        num_blocks = -(-(num_prompt_tokens + NUM_NEW_TOKENS) // BLOCK_SIZE)
        taken, self._free = self._free[:num_blocks], self._free[num_blocks:]
        if len(taken) < num_blocks:
            self._free = [block for block in range(NUM_BLOCKS) if not any(block in x.block_table for x in self.lives)]
            return self._blocks(num_prompt_tokens)
        return taken


def prompt_of(seed: int, num_tokens: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(num_tokens)]


@dataclass(frozen=True)
class Outcome:
    token_ids: list[int]
    logprobs: list[Logprobs]
    kv: torch.Tensor

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Outcome)
        same = (self.token_ids, self.logprobs) == (other.token_ids, other.logprobs)
        return same and torch.equal(self.kv.view(torch.uint8), other.kv.view(torch.uint8))


def outcome_of(chance: Chance, life: Life) -> Outcome:
    return Outcome(list(life.token_ids), life.logprobs, chance.kv_of(life).contiguous())


def alone(runner: ModelRunner | DeterministicRunner, prompt: list[int]) -> Outcome:
    """The prompt in one chunk, then token by token."""
    chance = Chance(runner, random.Random(0))
    life = chance.add(prompt)
    while not life.is_done:
        chance.step([life], limit=1000)
    return outcome_of(chance, life)


def in_company(runner: ModelRunner | DeterministicRunner, prompt: list[int], rng: random.Random) -> Outcome:
    chance = Chance(runner, rng)
    life = chance.add(prompt)
    for _ in range(rng.randint(0, 7)):
        own = prompt_of(rng.randrange(1000), rng.choice((1, 2, 9, 60, 200)))
        chance.add(prompt[: rng.randint(0, len(prompt))] + own)
    chance.run()
    return outcome_of(chance, life)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rng=st.randoms(use_true_random=True), num_tokens=st.sampled_from((1, 7, 33, 130, 251, 300)))
def test_a_request_gets_the_same_bits_in_any_company(
    folder: Path, family: str, rng: random.Random, num_tokens: int
) -> None:
    loaded, shapes = loaded_with_shapes(folder, family)
    prompt = prompt_of(num_tokens, num_tokens)
    expected = alone(runner_of(loaded, shapes), prompt)
    assert in_company(runner_of(loaded, shapes), prompt, rng) == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_likewise(folder: Path, dtype: str) -> None:
    loaded, shapes = loaded_with_shapes(folder, "llama", dtype)
    expected = alone(runner_of(loaded, shapes), prompt_of(1, 130))
    for seed in range(4):
        assert in_company(runner_of(loaded, shapes), prompt_of(1, 130), random.Random(seed)) == expected


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_worker_that_is_not_deterministic_gives_other_bits(folder: Path, family: str) -> None:
    """Else the tests above would prove nothing."""
    loaded = load_model(save(folder, family))
    expected = alone(runner_of(loaded, None), prompt_of(33, 33))
    others = [in_company(runner_of(loaded, None), prompt_of(33, 33), random.Random(seed)) for seed in range(4)]
    assert any(other != expected for other in others)


def test_sizes_that_do_not_agree_show(folder: Path) -> None:
    """One row alone goes through another kernel, where layers are not packed: find_fixed_shapes leaves it out, and who
    takes it nevertheless gets other bits."""
    loaded = load_model(save(folder, "llama"))
    shapes = find_fixed_shapes(loaded)
    assert 1 not in shapes.rows
    wrong = replace(shapes, rows=(1, *shapes.rows))
    expected = alone(runner_of(loaded, wrong), prompt_of(33, 33))
    others = [in_company(runner_of(loaded, wrong), prompt_of(33, 33), random.Random(seed)) for seed in range(4)]
    assert any(other != expected for other in others)


# --- through the scheduler --------------------------------------------------------------------------------------------


def served(
    folder: Path, family: str, prompts: list[list[int]], params: SamplingParams, **changes: Any
) -> list[list[int]]:
    """New tokens of each, run beside each other."""
    loaded, shapes = loaded_with_shapes(folder, family)
    sizes = {"max_model_len": 512, "block_size": BLOCK_SIZE, "hash_block_size": BLOCK_SIZE, **changes}
    num_blocks = sizes.pop("num_blocks", NUM_BLOCKS)
    core = WorkerCore(SchedulerConfig(**sizes), num_blocks, bytes(32), loaded.facts.fingerprint)
    requests = [GenerateRequest(f"r{i}", f"c{i}", 1, array("i", p), len(p), params) for i, p in enumerate(prompts)]
    outputs = LocalEngine(core, runner_of(loaded, shapes)).generate(requests)
    return [outputs[request.request_id] for request in requests]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_generate(folder: Path, family: str) -> None:
    prompts = [prompt_of(seed, num_tokens) for seed, num_tokens in enumerate((1, 16, 61, 290))]
    greedy = replace(DRAWN, temperature=0.0, top_p=1.0, frequency_penalty=0.0, num_logprobs=None)
    expected = greedy_reference(save(folder, family), prompts, NUM_NEW_TOKENS)
    assert served(folder, family, prompts, greedy, max_num_batched_tokens=300) == expected


def test_a_pool_that_preempts_and_caches_changes_nothing(folder: Path) -> None:
    shared = prompt_of(0, 40)
    prompts = [shared + prompt_of(seed, 30) for seed in range(6)]
    params = replace(DRAWN, max_tokens=40, num_logprobs=None)
    expected = [served(folder, "llama", [prompt], params)[0] for prompt in prompts]
    tight = {"num_blocks": 40, "max_num_batched_tokens": 48}
    assert served(folder, "llama", prompts, params, **tight) == expected
    assert served(folder, "llama", prompts, params, **tight, enable_prefix_caching=False) == expected
    assert len({tuple(tokens) for tokens in expected}) == len(expected), "outputs that are alike would prove nothing"
