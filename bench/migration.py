"""What a client sees of a decode that moves: the longest gap between two tokens, against the step at the same context.
Beside it, what else could be done: to stop the request and copy its KV then, or to drop it and compute it elsewhere."""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc.aio
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from bench._hand import Hand, serving_by_hand
from bench._near_ties import make_near_ties
from bench.harness import Figure
from cluster.config import DEMO_MODEL, ServeConfig, load_config
from cluster.pools import pools_of
from cluster.ray_cluster import ray_cluster
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as pb_grpc
from protos.codec import pack_token_ids, unpack_token_ids
from router.events import MigrationWanted
from router.migrations import RETURN_PAUSE_S

DESCRIPTION = "the gap that a migration leaves in a stream, against stop-and-copy and recompute; 1,000 at random"

KV_NBYTES_PER_TOKEN = 2 * 2 * 8 * 64 * 4  # little to compute and much to move: 256 MiB at 32k
VOCAB_SIZE = 512
CONTEXTS, QUICK_CONTEXTS = (256, 1024, 4096, 8192, 32_768), (256, 2048)
BLOCK_SIZE = 64
MAX_MODEL_LEN = 34_816
NUM_MOVES = 4  # of each stream
NUM_STEADY = 16  # tokens before the first, and between two
STOP_FIRST = 1 << 20  # blocks: whatever is left, the request is stopped
TARGET = 2.0
TIMEOUT_S = 900.0
NUM_RANDOM, QUICK_NUM_RANDOM, NUM_STREAMS, NUM_RANDOM_TOKENS = 1000, 50, 8, 300


def run(quick: bool) -> list[Figure]:
    contexts = QUICK_CONTEXTS if quick else CONTEXTS
    with tempfile.TemporaryDirectory() as folder:
        model, tied = Path(folder) / "wide", Path(folder) / "tied"
        for path in (model, tied):
            _save_wide_model(path)
        make_near_ties(tied)
        three = _config(model, num_decode=3, caches=True)
        alike = _config(tied, num_decode=3, caches=True, deterministic=True)
        with ray_cluster(three.ray, list(pools_of(three).slots.values())):
            return asyncio.run(_measured(model, three, alike, contexts, QUICK_NUM_RANDOM if quick else NUM_RANDOM))


async def _measured(
    model: Path, three: ServeConfig, alike: ServeConfig, contexts: tuple[int, ...], num_random: int
) -> list[Figure]:
    gaps = await _all_gaps(model, contexts)
    figures = [figure for context in contexts for figure in _figures(context, gaps)]
    figures += await _at_random(three, num_random, "")
    return [*figures, *await _at_random(alike, num_random, "_deterministic")]


def _save_wide_model(folder: Path) -> None:
    """With weights that make the likeliest token lead by far: it is then the same in every batch."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL, local_files_only=True)
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=max(VOCAB_SIZE, len(tokenizer)),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=MAX_MODEL_LEN,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                gain = 4.0 if "lm_head" in name else 1.5
                weight.normal_(0.0, 1.0 if "embed" in name else gain / weight.shape[1] ** 0.5, generator=generator)
    model.save_pretrained(folder)


def _figures(context: int, gaps: dict[tuple[str, int], Gaps]) -> list[Figure]:
    figures = []
    for name in ("migration", "stop_and_copy", "recompute"):
        one = gaps[name, context]
        mib = context * KV_NBYTES_PER_TOKEN / 2**20
        note = f"{1e3 * one.moving_s:.1f} ms, step {1e3 * one.itl_s:.1f} ms, {mib:.0f} MiB of KV"
        note += f"; longest gap at rest {1e3 * one.longest_still_s:.1f} ms"
        target = TARGET if name == "migration" else None
        figures.append(Figure(f"gap_over_itl_{name}_{context}", one.moving_s / one.itl_s, "", target, "lower", note))
    return figures


def _config(model: Path, num_decode: int = 2, caches: bool = False, **engine: int) -> ServeConfig:
    """Without prefix caches, unless said: what was there before would not have to move."""
    num_blocks = 2048 if caches else MAX_MODEL_LEN // BLOCK_SIZE + 32
    sizes = {"block_size": BLOCK_SIZE, "hash_block_size": BLOCK_SIZE, "num_blocks": num_blocks}
    return load_config(
        overrides={
            "num_decode": num_decode,
            "engine": {"model": str(model), "enable_prefix_caching": caches, "pulls": None, **sizes, **engine},
            "router": {"listen": "127.0.0.1:0", "http_listen": "", "refuses_early": False},
            "lease": {"lease_s": 6.0},
            "transfer": {"silence_timeout_s": 6.0, "chunk_timeout_s": 5.0},
            "ray": {"start_timeout_s": 180.0},
        }
    )


# --- gaps -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gaps:
    """Between two tokens of one stream, as its client sees them."""

    moving_s: float  # the longest of a move, the median of all moves
    itl_s: float  # the median at rest
    longest_still_s: float  # at rest: what the machine does to a stream of itself


async def _all_gaps(model: Path, contexts: tuple[int, ...]) -> dict[tuple[str, int], Gaps]:
    """By way of moving and context: the median of the gaps, and the median step beside them."""
    gaps: dict[tuple[str, int], Gaps] = {}
    for name, config in (
        ("migration", _config(model)),
        ("stop_and_copy", _config(model, max_migration_tail_blocks=STOP_FIRST)),
    ):
        async with serving_by_hand(config) as hand, grpc.aio.insecure_channel(hand.address) as channel:
            await _moved(hand, channel, 128, seed=0)  # links, code that has never run
            for context in contexts:
                gaps[name, context] = await _moved(hand, channel, context, seed=context)
                if name == "migration":
                    gaps["recompute", context] = await _recomputed(channel, context, seed=context)
    return gaps


async def _moved(hand: Hand, channel: grpc.aio.Channel, context: int, seed: int) -> Gaps:
    """A stream that is moved NUM_MOVES times, at leisure: the longest gap from the word to the second token behind."""
    times: list[float] = []
    windows: list[tuple[float, float]] = []
    stream = asyncio.create_task(_stream(channel, _prompt(context, seed), 1500, times))
    for _ in range(NUM_MOVES):
        before, num_before = len(times), hand.router.statistics.num_migrations
        await _until(lambda before=before: len(times) >= before + NUM_STEADY, stream)
        [(request_id, here)] = hand.decodes_at()
        word_at = time.perf_counter()
        to = "decode-1" if here == "decode-0" else "decode-0"
        while hand.router.statistics.num_migrations == num_before:
            hand.feed(MigrationWanted(request_id, to, "measured"))  # again, where it was too early
            await _until(lambda: hand.num_migrating == 0, stream)
        now = len(times)
        await _until(lambda now=now: len(times) >= now + 2, stream)
        windows.append((word_at, time.perf_counter()))
        await asyncio.sleep(RETURN_PAUSE_S)
    stream.cancel()
    await asyncio.gather(stream, return_exceptions=True)
    return _longest(times, windows)


def _longest(times: list[float], windows: list[tuple[float, float]]) -> Gaps:
    gaps = [(after, after - before) for before, after in pairwise(times)]
    moving = [max(gap for at, gap in gaps if start <= at <= end) for start, end in windows]
    still = [gap for at, gap in gaps[1:] if not any(start <= at <= end for start, end in windows)]
    return Gaps(statistics.median(moving), statistics.median(still), max(still))


async def _recomputed(channel: grpc.aio.Channel, context: int, seed: int) -> Gaps:
    """The client leaves, and comes back with what it has: what a worker's loss costs where nothing is cached."""
    prompt, times, token_ids = _prompt(context, seed + 1), list[float](), list[int]()
    stream = asyncio.create_task(_stream(channel, prompt, 1500, times, token_ids))
    await _until(lambda: len(times) >= NUM_STEADY, stream)
    stream.cancel()
    await asyncio.gather(stream, return_exceptions=True)
    still = [after - before for before, after in pairwise(times[1:])]
    again: list[float] = []
    await _stream(channel, prompt, len(token_ids) + 1, again, list(token_ids))
    return Gaps(again[0] - times[-1], statistics.median(still), max(still))


async def _stream(
    channel: grpc.aio.Channel, prompt: list[int], max_tokens: int, times: list[float], given: list[int] | None = None
) -> list[int]:
    """When each token came, into `times`; what came, behind what was given."""
    token_ids = [] if given is None else given
    params = pb.SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    request = pb.GenerateRequest(
        tokenized=pb.TokenizedInput(input_ids=prompt),
        sampling_params=params,
        stream=True,
        output_token_ids=pack_token_ids(token_ids),
    )
    async for response in pb_grpc.InferenceStub(channel).Generate(request, timeout=TIMEOUT_S):
        part = response.chunk if response.HasField("chunk") else response.complete
        new = unpack_token_ids(part.token_ids)
        times += [time.perf_counter()] * len(new)
        token_ids += new
    return token_ids


async def _until(holds: Any, stream: asyncio.Task[Any]) -> None:
    while not holds():
        assert not stream.done(), "the stream ended before it was moved often enough"
        await asyncio.sleep(0.001)


def _prompt(num_tokens: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCAB_SIZE - 256) for _ in range(num_tokens)]


# --- at random --------------------------------------------------------------------------------------------------------


async def _at_random(config: ServeConfig, num_wanted: int, suffix: str) -> list[Figure]:
    """Streams that are moved all the time, until so many moves were made; each is compared with itself in peace.
    Deterministic workers have a model whose tokens are nearly tied, the others one whose likeliest leads by far."""
    num_streams = num_equal = 0
    async with serving_by_hand(config) as hand, grpc.aio.insecure_channel(hand.address) as channel:
        statistics_ = hand.router.statistics
        while statistics_.num_migrations < num_wanted:
            prompts = [_prompt(40 + 30 * i, num_streams + i) for i in range(NUM_STREAMS)]
            left = await asyncio.gather(*(_stream(channel, one, NUM_RANDOM_TOKENS, []) for one in prompts))
            moving = asyncio.create_task(_move_about(hand, num_streams))
            moved = await asyncio.gather(*(_stream(channel, one, NUM_RANDOM_TOKENS, []) for one in prompts))
            moving.cancel()
            num_streams += NUM_STREAMS
            num_equal += sum(one == other for one, other in zip(left, moved, strict=True))
        await asyncio.sleep(1.0)  # for the last word of each worker
        views = hand.router.view.workers.values()
        num_leaked = sum(view.stats.num_held_blocks + view.stats.num_leased_blocks for view in views)
        note = f"{statistics_.num_failed_migrations} more were refused, {statistics_.num_failovers} failovers"
    return [
        Figure("random_migrations" + suffix, statistics_.num_migrations, "", num_wanted, note=note),
        Figure("equal_streams" + suffix, num_equal / num_streams, f"of {num_streams}", 1.0, note="none excluded"),
        Figure("leaked_blocks" + suffix, num_leaked, "", 0.0, "lower"),
    ]


async def _move_about(hand: Hand, seed: int) -> None:
    rng = random.Random(seed)
    while True:
        await asyncio.sleep(0.02)
        for request_id, _ in hand.decodes_at():
            hand.feed(MigrationWanted(request_id, f"decode-{rng.randrange(3)}", "by chance"))
