"""Host memory behind a device that is too small, with the real model, the real threads and real copies: the tokens stay
those of the model, and what comes back is not computed again."""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch

from engine import engine_thread
from engine.config import HostTierConfig, SchedulerConfig
from engine.engine_thread import EngineThread
from engine.events import Copied, CopyBlocks, CopyDirection, CopyLost, Effect, Submitted
from engine.host_copies import HostCopies
from engine.host_memory import HostMemory
from engine.model_loader import LoadedModel, load_model
from engine.model_runner import ModelRunner
from engine.paged_kv_cache import PagedKVCache
from engine.worker_core import WorkerCore
from protos.types import GenerateRequest, KVLayout, SamplingParams, TokenOutput, WorkerStats
from tests.tiny_models import greedy_reference, save_tiny_model

BLOCK_SIZE = 8
NUM_BLOCKS = 12
NUM_HOST_BLOCKS = 40
NUM_NEW_TOKENS = 6
LAYOUT = KVLayout("f", "float32", num_layers=2, num_kv_heads=2, head_dim=4, block_size=8, hash_block_size=8)


def prompt(seed: int, num_tokens: int = 8 * BLOCK_SIZE + 3) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_tokens,), generator=generator).tolist()


PROMPTS = [prompt(seed) for seed in range(4)]  # together three times what the device holds
NUM_FULL = 8 * BLOCK_SIZE  # tokens of a prompt in full blocks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("llama") / "model", "llama")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load_model(str(folder), "float32", "cpu", True)


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    return greedy_reference(folder, PROMPTS, NUM_NEW_TOKENS)


@pytest.fixture(autouse=True)
def _eager_stats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests wait for stats: this is what most of them would take."""
    monkeypatch.setattr(engine_thread, "STATS_INTERVAL_S", 0.01)


class BrokenMemory(HostMemory):
    """Fails one way, after it has written rubbish."""

    broken: CopyDirection | None = None

    def copy(self, direction: CopyDirection, from_block_ids: Sequence[int], to_block_ids: Sequence[int]) -> None:
        super().copy(direction, from_block_ids, to_block_ids)
        if direction is self.broken:
            memory = self._blocks if direction is CopyDirection.TO_HOST else self._device.blocks
            memory[list(to_block_ids)] = 0
            raise RuntimeError("the device is on fire")


class LiveEngine:
    """All of a worker but its network."""

    def __init__(self, loaded: LoadedModel, host: HostTierConfig | None) -> None:
        layout = loaded.facts.kv_layout("float32", BLOCK_SIZE, BLOCK_SIZE)
        cache = PagedKVCache(layout, NUM_BLOCKS)
        config = SchedulerConfig(
            max_model_len=512, max_num_batched_tokens=32, block_size=BLOCK_SIZE, hash_block_size=BLOCK_SIZE, host=host
        )
        core = WorkerCore(config, NUM_BLOCKS, b"k" * 32, "model")
        self.memory = BrokenMemory(cache, NUM_HOST_BLOCKS)
        self.outputs: SimpleQueue[TokenOutput | BaseException] = SimpleQueue()
        self.engine = EngineThread(core, ModelRunner(loaded, cache).execute, self._deliver, self.outputs.put)
        self.copies = HostCopies(self.memory, self.engine.post)

    def __enter__(self) -> LiveEngine:
        self.engine.start()
        self.copies.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        assert self.engine.stop(5.0) and self.copies.stop(5.0)

    def submit(self, request_id: str, token_ids: list[int], salt: bytes = b"") -> None:
        sampling = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, seed=0, max_tokens=NUM_NEW_TOKENS)
        ids = array("i", token_ids)
        request = GenerateRequest(request_id, request_id, 1, ids, len(ids), sampling, cache_salt=salt)
        self.engine.post(Submitted(request))

    def collect(self, num_requests: int) -> dict[str, tuple[list[int], int]]:
        """Tokens and num_cached_tokens by request_id, when so many have ended and all is quiet again."""
        tokens: dict[str, list[int]] = {}
        ended: dict[str, tuple[list[int], int]] = {}
        while len(ended) < num_requests:
            output = self.outputs.get(timeout=10.0)
            assert isinstance(output, TokenOutput), output
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
            if output.account is not None:
                ended[output.request_id] = tokens[output.request_id], output.account.num_cached_tokens
        self.wait_for(lambda stats: stats.num_leased_blocks == stats.num_held_blocks == 0)
        return ended

    def answer(self, token_ids: list[int], salt: bytes = b"") -> tuple[list[int], int]:
        self.submit("r", token_ids, salt)
        return self.collect(1)["r"]

    def wait_for(self, condition: Callable[[WorkerStats], bool]) -> None:
        """Of stats that were taken from now on."""
        old, give_up_at = self.engine.stats, time.monotonic() + 10.0
        while self.engine.stats is old or not condition(self.engine.stats):
            assert time.monotonic() < give_up_at, self.engine.stats
            time.sleep(0.01)
        assert self.engine.stats.ledger_balanced

    def _deliver(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, CopyBlocks):
                self.copies.copy(effect)
            else:
                assert isinstance(effect, TokenOutput)
                self.outputs.put(effect)


def host_tier(**changes: int) -> HostTierConfig:
    fields = {"num_blocks": NUM_HOST_BLOCKS, "max_saving_blocks": 4} | changes
    return HostTierConfig(s_per_token=1e-9, **fields)


@pytest.fixture
def live(loaded: LoadedModel) -> Iterator[LiveEngine]:
    with LiveEngine(loaded, host_tier()) as engine:
        yield engine


# --- the tier at work -------------------------------------------------------------------------------------------------


def test_what_the_device_evicted_comes_back_and_the_tokens_are_the_models(
    live: LiveEngine, expected: list[list[int]]
) -> None:
    first = [live.answer(each) for each in PROMPTS]
    again = [live.answer(each) for each in PROMPTS]
    assert [tokens for tokens, _ in first] == [tokens for tokens, _ in again] == expected
    assert [num_cached for _, num_cached in first] == [0] * 4
    assert [num_cached for _, num_cached in again] == [NUM_FULL] * 4
    live.wait_for(lambda stats: stats.num_host_loaded_tokens >= 3 * NUM_FULL)
    stats = live.engine.stats
    assert (stats.num_host_blocks, stats.num_cached_host_blocks) == (NUM_HOST_BLOCKS, 4 * 9), "with what was generated"


def test_without_it_what_was_evicted_is_computed_again(loaded: LoadedModel, expected: list[list[int]]) -> None:
    with LiveEngine(loaded, None) as live:
        answers = [live.answer(each) for each in [*PROMPTS, *PROMPTS]]
        assert [tokens for tokens, _ in answers] == [*expected, *expected]
        assert [num_cached for _, num_cached in answers] == [0] * 8
        assert live.engine.stats.num_host_blocks == live.engine.stats.num_host_loaded_tokens == 0


def test_many_at_once_with_copies_both_ways(live: LiveEngine, expected: list[list[int]]) -> None:
    for round_ in range(3):
        for number, each in enumerate(PROMPTS):
            live.submit(f"{round_} {number}", each)
            live.submit(f"{round_} {number} twin", each)
    answers = live.collect(24)
    for name, (tokens, _) in answers.items():
        assert tokens == expected[int(name.split()[1])], name
    assert live.answer(PROMPTS[0]) == (expected[0], NUM_FULL)
    live.wait_for(lambda stats: stats.num_host_loaded_tokens > 0)


def test_another_tenants_prompt_is_not_found(live: LiveEngine, expected: list[list[int]]) -> None:
    for each in PROMPTS:
        live.answer(each, b"one")
    assert live.answer(PROMPTS[0], b"other") == (expected[0], 0)
    assert live.answer(PROMPTS[1], b"one") == (expected[1], NUM_FULL)


@pytest.mark.parametrize("direction", list(CopyDirection))
def test_a_copy_that_fails_costs_a_recomputation(
    live: LiveEngine, expected: list[list[int]], direction: CopyDirection
) -> None:
    live.memory.broken = direction if direction is CopyDirection.TO_HOST else None
    for each in PROMPTS:
        live.answer(each)
    live.memory.broken = direction
    assert live.answer(PROMPTS[0]) == (expected[0], 0)
    live.memory.broken = None
    for each in PROMPTS:
        live.answer(each)
    assert live.answer(PROMPTS[0]) == (expected[0], NUM_FULL), "it works again"


# --- the threads ------------------------------------------------------------------------------------------------------


class SlowMemory(HostMemory):
    def __init__(self) -> None:
        super().__init__(PagedKVCache(LAYOUT, 4), 4)
        self.is_copying, self.goes_on = threading.Event(), threading.Event()

    def copy(self, direction: CopyDirection, from_block_ids: Sequence[int], to_block_ids: Sequence[int]) -> None:
        if direction is CopyDirection.TO_HOST:
            self.is_copying.set()
            assert self.goes_on.wait(10.0)
        super().copy(direction, from_block_ids, to_block_ids)


def test_a_load_does_not_wait_for_a_save_and_stopping_leaves_no_thread() -> None:
    memory, said = SlowMemory(), SimpleQueue[Copied | CopyLost]()
    copies = HostCopies(memory, said.put)
    before = set(threading.enumerate())
    copies.start()
    for copy_id in (b"save", b"late"):
        copies.copy(CopyBlocks(copy_id, CopyDirection.TO_HOST, (0,), (1,)))
    assert memory.is_copying.wait(5.0)
    copies.copy(CopyBlocks(b"load", CopyDirection.TO_DEVICE, (2,), (3,)))
    assert said.get(timeout=5.0) == Copied(b"load")
    assert not copies.stop(0.05), "a copy is under way"
    memory.goes_on.set()
    assert copies.stop(5.0)
    assert said.get_nowait() == Copied(b"save")
    assert said.empty(), "none begins after stop"
    assert set(threading.enumerate()) == before


# --- the memory -------------------------------------------------------------------------------------------------------


def numbered() -> tuple[PagedKVCache, HostMemory]:
    """Every element of the device is another number; host memory holds blocks 0..3 of it as 4..7 of 9."""
    cache = PagedKVCache(LAYOUT, 6)
    cache.tensor.copy_(torch.arange(1, 1 + cache.tensor.numel()).view(cache.tensor.shape))
    memory = HostMemory(cache, 9)
    memory.copy(CopyDirection.TO_HOST, range(4), range(4, 8))
    return cache, memory


def test_blocks_go_to_host_memory_and_come_back_elsewhere() -> None:
    cache, memory = numbered()
    before = cache.tensor.clone()
    memory.copy(CopyDirection.TO_DEVICE, [7, 4], [5, 1])
    assert cache.tensor[5].equal(before[3]) and cache.tensor[1].equal(before[0])
    untouched = [0, 2, 3, 4]
    assert cache.tensor[untouched].equal(before[untouched])


@pytest.mark.parametrize("block_ids", [[3, 1], [2, 0, 6 + 5], [6 + 7], [5, 6 + 4, 6 + 6]])
def test_a_transfer_reads_both_memories(block_ids: list[int]) -> None:
    cache, memory = numbered()
    assert memory.layout == LAYOUT
    blocks = cache.tensor.view(6, -1)
    staged = torch.empty(len(block_ids), cache.block_numel)
    memory.gather(block_ids, staged)
    on_device = [block_id if block_id < 6 else block_id - 6 - 4 for block_id in block_ids]
    assert staged.equal(blocks[on_device])
    memory.scatter([0], staged[:1] + 0.5)
    assert blocks[0].equal(staged[0] + 0.5)


def test_a_load_is_measured_and_sizes_are_checked() -> None:
    memory = HostMemory(PagedKVCache(LAYOUT, 4), 6)
    assert 0 < memory.measured_load_s() < 0.1
    with pytest.raises(ValueError, match="num_blocks must be at least 1, got 0"):
        HostMemory(PagedKVCache(LAYOUT, 4), 0)
