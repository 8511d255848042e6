"""The executing half against transformers: same weights, same prompts, same tokens."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from engine.model_loader import LoadedModel, load_model
from engine.model_runner import ModelRunner
from engine.paged_kv_cache import PagedKVCache
from engine.scheduler_output import ScheduledRequest, SchedulerOutput
from protos.types import SamplingParams
from tests.tiny_models import FAMILIES, greedy_reference, save_tiny_model

BLOCK_SIZE = 8
NUM_BLOCKS = 64
NUM_NEW_TOKENS = 12
GREEDY = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, seed=0, max_tokens=NUM_NEW_TOKENS)
WINDOW = 9  # shorter than every prompt but one


@dataclass
class DrivenRequest:
    """A request driven by hand: what a scheduler would keep of it."""

    request_id: str
    token_ids: array[int]
    num_prompt_tokens: int
    block_table: list[int]
    sampling_params: SamplingParams = GREEDY
    num_computed_tokens: int = 0

    @property
    def output(self) -> list[int]:
        return list(self.token_ids[self.num_prompt_tokens :])

    def chunk(self, limit: int) -> ScheduledRequest:
        count = min(limit, len(self.token_ids) - self.num_computed_tokens)
        samples = self.num_computed_tokens + count == len(self.token_ids)
        return ScheduledRequest(
            self.request_id,
            self.token_ids,
            self.num_prompt_tokens,
            self.num_computed_tokens,
            count,
            self.block_table,
            self.sampling_params,
            samples,
        )


@dataclass
class Driver:
    """Steps a ModelRunner by hand, over block ids in random order."""

    runner: ModelRunner
    free: list[int]
    chunk_size: int = 7
    sequences: list[DrivenRequest] = field(default_factory=list)

    def add(self, prompt: Sequence[int], params: SamplingParams = GREEDY) -> DrivenRequest:
        num_blocks = -(-(len(prompt) + NUM_NEW_TOKENS) // BLOCK_SIZE)
        blocks = [self.free.pop() for _ in range(num_blocks)]
        name = f"r{len(self.sequences)}"
        self.sequences.append(DrivenRequest(name, array("i", prompt), len(prompt), blocks, params))
        return self.sequences[-1]

    def step(self) -> bool:
        unfinished = [s for s in self.sequences if len(s.output) < NUM_NEW_TOKENS]
        chunks = tuple(s.chunk(self.chunk_size) for s in unfinished)
        result = self.runner.execute(SchedulerOutput(0, chunks, sum(c.num_scheduled_tokens for c in chunks)))
        assert set(result.sampled) == {c.request_id for c in chunks if c.samples}
        for sequence, chunk in zip(unfinished, chunks, strict=True):
            sequence.num_computed_tokens += chunk.num_scheduled_tokens
            sequence.token_ids.extend(result.sampled.get(sequence.request_id, ()))
        return bool(unfinished)

    def run(self) -> list[list[int]]:
        while self.step():
            pass
        return [s.output for s in self.sequences]


def make_driver(loaded: LoadedModel, seed: int = 0, chunk_size: int = 7) -> Driver:
    """Over a pool full of NaN: whatever is read before it was written ruins the output."""
    cache = PagedKVCache(loaded.facts.kv_layout("float32", BLOCK_SIZE, BLOCK_SIZE), NUM_BLOCKS)
    cache.tensor.fill_(torch.nan)
    return Driver(ModelRunner(loaded, cache), random.Random(seed).sample(range(NUM_BLOCKS), NUM_BLOCKS), chunk_size)


def make_prompts(seed: int = 1) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(length)] for length in (1, 5, 8, 16, 23, 40, 61)]


CASES = [(family, None) for family in FAMILIES] + [(f, WINDOW) for f in FAMILIES if f != "llama"]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-window{case[1]}" if case[1] else case[0])
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    family, window = request.param
    path = save_tiny_model(tmp_path_factory.mktemp(family), family, seed=3, sliding_window=window)
    return path, greedy_reference(path, make_prompts(), NUM_NEW_TOKENS)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(save_tiny_model(tmp_path_factory.mktemp("llama")))


@pytest.mark.parametrize("chunk_size", [7, 1000])
def test_chunked_prefill_and_batched_decode_equal_generate(
    golden: tuple[Path, list[list[int]]], chunk_size: int
) -> None:
    path, expected = golden
    driver = make_driver(load_model(path), chunk_size=chunk_size)
    for prompt in make_prompts():
        driver.add(prompt)
    assert driver.run() == expected


def test_decode_goes_on_in_another_pool_after_gather_and_scatter(golden: tuple[Path, list[list[int]]]) -> None:
    path, expected = golden
    loaded = load_model(path)
    source, destination = make_driver(loaded, seed=1), make_driver(loaded, seed=2)
    for prompt in make_prompts():
        source.add(prompt)
    while any(len(s.output) < 3 for s in source.sequences):
        source.step()
    for sequence in source.sequences:
        moved = replace(sequence, block_table=[destination.free.pop() for _ in sequence.block_table])
        staging = torch.empty(len(moved.block_table), source.runner.kv_cache.block_numel)
        source.runner.kv_cache.gather(sequence.block_table, staging)
        destination.runner.kv_cache.scatter(moved.block_table, staging)
        destination.sequences.append(moved)
    assert destination.run() == expected


def test_a_sliding_window_changes_the_tokens(tmp_path: Path) -> None:
    """Otherwise the golden cases with a window would prove nothing."""
    windowed = load_model(save_tiny_model(tmp_path / "windowed", "mistral", sliding_window=WINDOW))
    full = load_model(save_tiny_model(tmp_path / "full", "mistral"))
    outputs = []
    for loaded in (windowed, full):
        driver = make_driver(loaded)
        driver.add(make_prompts()[-1])
        outputs.append(driver.run())
    assert outputs[0] != outputs[1]


def test_nan_in_a_slot_that_is_read_ruins_the_output(llama: LoadedModel) -> None:
    """The poison of make_driver is real: in a slot that belongs to the request, it shows."""
    prompt = make_prompts()[4]
    clean, poisoned = make_driver(llama), make_driver(llama)
    for driver in (clean, poisoned):
        driver.add(prompt)
        while not driver.sequences[0].output:
            driver.step()
    poisoned.runner.kv_cache.tensor[poisoned.sequences[0].block_table[0], :, :, 2] = torch.nan
    assert clean.run() != poisoned.run()


def test_a_step_writes_only_the_slots_of_its_own_tokens(llama: LoadedModel) -> None:
    driver = make_driver(llama, chunk_size=1000)
    sequence = driver.add(make_prompts()[4])  # 23 tokens: two full blocks, seven slots of a third
    driver.step()
    written = ~driver.runner.kv_cache.tensor.isnan().all(dim=(1, 2, 4, 5))  # [num_blocks, block_size]
    expected = torch.zeros_like(written)
    expected[sequence.block_table[:2]] = True
    expected[sequence.block_table[2], :7] = True
    assert written.equal(expected)


def test_sampled_tokens_do_not_depend_on_the_batch(llama: LoadedModel) -> None:
    drawn = replace(GREEDY, temperature=0.8, top_p=0.95, seed=7)
    alone, together = make_driver(llama, seed=4), make_driver(llama, seed=5, chunk_size=1000)
    alone.add(make_prompts()[3], drawn)
    together.add(make_prompts()[3], drawn)
    for prompt in make_prompts():
        together.add(prompt)
    assert alone.run()[0] == together.run()[0]
    assert together.run()[0] != together.run()[4], "sampling must differ from greedy on the same prompt"


def test_a_prefix_computed_by_another_request_is_read_from_its_blocks(llama: LoadedModel) -> None:
    prompt = make_prompts()[5]  # 40 tokens: four full blocks can be shared, the last token is computed again
    driver = make_driver(llama)
    first = driver.add(prompt)
    expected = driver.run()[0]
    second = driver.add(prompt)
    second.block_table[:4] = first.block_table[:4]
    second.num_computed_tokens = 4 * BLOCK_SIZE
    driver.run()
    assert second.output == expected


def test_a_step_without_samples_gives_no_tokens(llama: LoadedModel) -> None:
    driver = make_driver(llama, chunk_size=4)
    driver.add(make_prompts()[4])
    driver.step()
    assert driver.sequences[0].output == []
    assert driver.runner.execute(SchedulerOutput(0, (), 0)).sampled == {}


def test_a_cache_of_another_model_is_refused(llama: LoadedModel) -> None:
    layout = replace(llama.facts.kv_layout("float32", BLOCK_SIZE, BLOCK_SIZE), num_layers=2)
    with pytest.raises(ValueError, match="num_layers=2"):
        ModelRunner(llama, PagedKVCache(layout, 4))


def test_half_precision_runs(tmp_path: Path) -> None:
    loaded = load_model(save_tiny_model(tmp_path), dtype="bfloat16")
    cache = PagedKVCache(loaded.facts.kv_layout("bfloat16", BLOCK_SIZE, BLOCK_SIZE), NUM_BLOCKS)
    cache.tensor.fill_(torch.nan)
    driver = Driver(ModelRunner(loaded, cache), list(range(NUM_BLOCKS)))
    driver.add(make_prompts()[4])
    driver.add(make_prompts()[2])
    assert all(len(set(output)) > 1 for output in driver.run())
