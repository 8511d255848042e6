"""How long a large prompt holds up the router's event loop, on which every stream is written, while it is tokenized."""

from __future__ import annotations

import asyncio
import statistics
import time

from bench.harness import Figure, time_of
from cluster.config import load_config
from cluster.serve import served_model
from engine.model_facts import read_model_facts
from router.prompts import PromptReader
from router.validation import PublicRequest

DESCRIPTION = "longest stall of the router's event loop while a 1 MB prompt is tokenized aside"

SENTENCE = "Everyone is permitted to copy and distribute verbatim copies of this license document. "
NUM_CHARS = 1_000_000
TICK_S = 0.001


def run(quick: bool) -> list[Figure]:
    config = load_config()
    served = served_model(config, read_model_facts(config.engine.model), hash_key=bytes(32))
    reader = PromptReader(served, config.router)
    text = SENTENCE * (NUM_CHARS // len(SENTENCE))
    try:
        reads = [asyncio.run(_read(reader, text)) for _ in range(2 if quick else 10)]
        idle = asyncio.run(_idle(statistics.median(read_s for read_s, _ in reads)))
    finally:
        reader.close()
    inline_s = time_of(lambda: served.encode(text))
    stalls = sorted(stall_s for _, stall_s in reads)
    return [
        Figure(
            "tokenizing", statistics.median(read_s for read_s, _ in reads), "s", note="aside, 1 MB of one-byte tokens"
        ),
        Figure("stall", statistics.median(stalls), "s", note="longest pause of the event loop, median of the runs"),
        Figure("worst stall", stalls[-1], "s", target=0.25, better="lower", note="in any run"),
        Figure("idle stall", idle, "s", note="the same without a prompt: this machine's own"),
        Figure("inline", inline_s, "s", note="what every stream would wait for without the threads"),
    ]


async def _read(reader: PromptReader, text: str) -> tuple[float, float]:
    """(how long it took, the longest time in which nothing else ran)."""
    started_at = time.perf_counter()
    reading = asyncio.create_task(reader.token_ids(PublicRequest(text=text)))
    stall_s = await _longest_stall(reading)
    await reading
    return time.perf_counter() - started_at, stall_s


async def _idle(duration_s: float) -> float:
    return await _longest_stall(asyncio.create_task(asyncio.sleep(duration_s)))


async def _longest_stall(task: asyncio.Task[object]) -> float:
    longest_s, seen_at = 0.0, time.perf_counter()
    while not task.done():
        await asyncio.sleep(TICK_S)
        now = time.perf_counter()
        longest_s, seen_at = max(longest_s, now - seen_at - TICK_S), now
    return longest_s
