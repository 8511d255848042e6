"""How fast the engine is on the card: decode as a share of what memory allows, prefill as a share of what the cores
allow, both measured in the same run; and steps of many sizes for the cost model. All of it over random KV."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from bench._gpu_card import Card
from bench._gpu_models import GREEDY, Shape, chunk_of, decode_of
from engine.model_loader import LoadedModel
from engine.paged_kv_cache import PagedKVCache
from engine.runners import Runner, make_runner, num_blocks_beside
from engine.scheduler_output import ScheduledRequest, SchedulerOutput
from engine.step_costs import StepCosts
from engine.worker_config import EngineConfig
from protos.step_moments import StepMoments

MAX_CHUNK = 8192  # tokens of a prompt in one step
MAX_BATCH = 256


@dataclass(frozen=True, slots=True)
class Bench:
    """A model, its runner and a pool full of random KV. Block ids are handed out anew for every step."""

    card: Card
    loaded: LoadedModel
    runner: Runner
    cache: PagedKVCache

    @property
    def num_kv_tokens(self) -> int:
        return self.cache.num_blocks * self.cache.layout.block_size

    @property
    def weight_nbytes(self) -> int:
        """That one step reads: of the embeddings it reads only its rows."""
        model = self.loaded.model
        embedding = model.get_input_embeddings().weight
        return sum(w.nbytes for w in model.parameters() if w is not embedding)

    @property
    def kv_nbytes_per_token(self) -> int:
        return self.cache.layout.block_nbytes // self.cache.layout.block_size


def make_bench(card: Card, loaded: LoadedModel, num_blocks: int | None = None, max_rows: int = MAX_BATCH) -> Bench:
    """As a worker would be set up that may have 85 % of the card."""
    engine = EngineConfig(
        model="random",
        dtype=loaded.dtype,
        device=str(card.device),
        num_blocks=num_blocks,
        max_num_batched_tokens=MAX_CHUNK,
        max_num_seqs=max_rows,
        gpu_memory_utilization=0.85,
    )
    max_model_len = loaded.facts.max_model_len
    layout = loaded.facts.kv_layout(loaded.dtype, engine.block_size, engine.hash_block_size)
    cache = PagedKVCache(layout, num_blocks_beside(loaded, engine, max_model_len), card.device)
    for block in cache.tensor:  # piece by piece: a random tensor of that size would need as much again
        block.normal_()
    return Bench(card, loaded, make_runner(loaded, cache, engine, max_model_len, lambda progress: None), cache)


class _Blocks:
    """Block ids in random order, each once."""

    def __init__(self, bench: Bench) -> None:
        self._size = bench.cache.layout.block_size
        self._free = random.Random(0).sample(range(bench.cache.num_blocks), bench.cache.num_blocks)

    def table(self, num_tokens: int) -> list[int]:
        num_blocks = -(-num_tokens // self._size)
        if num_blocks > len(self._free):
            raise ValueError(f"{num_tokens} more tokens of KV do not fit: {len(self._free)} blocks are left")
        taken, self._free = self._free[:num_blocks], self._free[num_blocks:]
        return taken


def _tokens(num_tokens: int, vocab_size: int) -> array[int]:
    rng = random.Random(num_tokens)
    return array("i", [rng.randrange(vocab_size) for _ in range(num_tokens)])


# --- decode -------------------------------------------------------------------------------------------------------


def decode_step(bench: Bench, batch: int, context: int) -> SchedulerOutput:
    blocks = _Blocks(bench)
    tokens = _tokens(context, bench.loaded.facts.vocab_size)
    scheduled = tuple(decode_of(str(row), tokens, blocks.table(context), GREEDY) for row in range(batch))
    return SchedulerOutput(0, scheduled, batch)


def decode_s(bench: Bench, batch: int, context: int, runs: int) -> float:
    step = decode_step(bench, batch, context)
    return bench.card.median_s(lambda: bench.runner.execute(step), runs)


def decode_roofline_s(bench: Bench, batch: int, context: int, nbytes_per_s: float) -> float:
    return (bench.weight_nbytes + batch * context * bench.kv_nbytes_per_token) / nbytes_per_s


def largest_batch(bench: Bench, context: int) -> int:
    per_request = -(-context // bench.cache.layout.block_size)
    return min(MAX_BATCH, bench.cache.num_blocks // per_request)


# --- prefill ------------------------------------------------------------------------------------------------------


def prefill_steps(bench: Bench, num_tokens: int, num_cached: int = 0, chunk: int = MAX_CHUNK) -> list[SchedulerOutput]:
    """One prompt whose first num_cached tokens are there already."""
    whole = num_cached + num_tokens
    tokens, table = _tokens(whole, bench.loaded.facts.vocab_size), _Blocks(bench).table(whole)
    starts = range(num_cached, whole, chunk)
    chunks = [chunk_of(tokens, start, min(start + chunk, whole), table) for start in starts]
    return [SchedulerOutput(0, (each,), each.num_scheduled_tokens) for each in chunks]


def prefill_s(bench: Bench, num_tokens: int, runs: int) -> float:
    steps = prefill_steps(bench, num_tokens)
    return bench.card.median_s(lambda: [bench.runner.execute(step) for step in steps], runs, warm_up=1)


def prefill_flops(shape: Shape, num_tokens: int) -> float:
    """Of weights and rows, of queries, keys and values on and below the diagonal, and of the last row's logits."""
    hidden, kv = shape.hidden, shape.num_kv_heads * shape.head_dim
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * shape.intermediate
    attention = 2 * num_tokens * num_tokens * hidden
    head = 2 * hidden * shape.vocab_size
    return shape.num_layers * (2.0 * layer * num_tokens + attention) + head


# --- costs --------------------------------------------------------------------------------------------------------


def measured_moments(bench: Bench, runs: int) -> tuple[StepMoments, ...]:
    """Of steps that only decode and steps that only prefill, over a grid of sizes."""
    costs = StepCosts()
    for scheduled in _grid(bench):
        step = SchedulerOutput(0, scheduled, sum(r.num_scheduled_tokens for r in scheduled))
        bench.runner.execute(step)
        for _ in range(runs):
            costs.note_step(step, bench.card.seconds_of(partial(bench.runner.execute, step)))
    return costs.moments()


def _grid(bench: Bench) -> Iterator[tuple[ScheduledRequest, ...]]:
    for batch in (1, 2, 4, 8, 16, 32, 64, 128):
        for context in (128, 512, 2048, 8192):
            if batch <= largest_batch(bench, context):
                yield decode_step(bench, batch, context).scheduled
    longest = min(bench.num_kv_tokens, bench.loaded.facts.max_model_len)
    for num_new in (16, 48, 96, 192, 384, 768, 1536, 3072, 6144):
        for num_cached in (0, 1024, 4096, 16384):
            if num_new + num_cached <= longest:
                yield prefill_steps(bench, num_new, num_cached)[0].scheduled
