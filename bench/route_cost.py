"""What a request costs before it leaves the router: placement by the number of workers, also for a policy that asks all
of them, and tokenization, hashing and placement by the length of the prompt. In one process, without gRPC:
bench/service.py has the whole path."""

from __future__ import annotations

import random
import secrets
import statistics
from array import array
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

from transformers import AutoTokenizer

from bench.harness import Figure, interleave, median_of, time_of
from cluster.config import DEMO_MODEL
from protos.block_hash import chain_hashes, chain_root
from protos.types import GenerateRequest, PeerRef, Role, SamplingParams, WorkerReport, WorkerStats
from router.config import RouterConfig
from router.events import Arrived, ClientCancelled, Reported, WorkerUp
from router.placement import Planner
from router.policies.config import PolicyConfig, PolicyName
from router.router import Router

DESCRIPTION = "the router's cost of a request: placement at 2 to 1024 workers, hashing, tokenization"

NUM_WORKERS = (2, 16, 128, 1024)  # half of them prefill
PROMPT_LENGTHS = (1_000, 10_000, 100_000)  # tokens
TYPICAL_PROMPT = 2_000  # tokens, where the number of workers varies
NUM_PREFIXES = 64  # that prompts begin with, so that some workers are warm
NUM_LOADED = 4  # requests in flight per worker
NUM_BLOCKS = 4096
BLOCK = RouterConfig().block_size
KEY = bytes(32)
ROOT = chain_root(KEY, "model")
TARGET_MS = 0.2
TARGET_RATIO = 2.0  # 1024 workers may cost twice what 2 do
# The second asks the home pair and two random workers, the third all of them: what each holds, and what is before it.
POLICIES: tuple[PolicyName, ...] = ("dual_map", "home_pair", "min_ttft")
PREFILL_S_PER_TOKEN, PULL_S_PER_TOKEN = 2e-5, 5e-6  # an 8B model on an H100 over 200 Gb/s
GREEDY = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, seed=0, max_tokens=64)
TEXT = "Everyone is permitted to copy and distribute verbatim copies of this license document. "


def run(quick: bool) -> list[Figure]:
    runs, num_requests = (2, 40) if quick else (7, 400)
    counts = (2, 16) if quick else NUM_WORKERS
    return by_workers(counts, runs, num_requests) + by_length(PROMPT_LENGTHS[:2] if quick else PROMPT_LENGTHS, runs)


# --- by number of workers -----------------------------------------------------------------------------------------


def by_workers(counts: tuple[int, ...], runs: int, num_requests: int) -> list[Figure]:
    """Medians over runs of the p50 of each run; the sizes take turns."""
    fleets = {n: Fleet(n) for n in counts}
    figures = by_policy(fleets, runs, num_requests)
    whole = interleave(runs, {str(n): _each(fleets[n].time_of_arrival, num_requests) for n in counts})
    return figures + [Figure(f"arrival_p50_ms_at_{n}", _ms(whole[str(n)]), "ms", better="lower") for n in counts]


def by_policy(fleets: dict[int, Fleet], runs: int, num_requests: int) -> list[Figure]:
    """Of the policies, the default has targets; its figures have no name in front."""
    plan = interleave(
        runs,
        {
            f"{policy} {n}": _each(partial(fleet.time_of_plan, fleet.planner(policy)), num_requests)
            for policy in POLICIES
            for n, fleet in fleets.items()
        },
    )
    most, least = max(fleets), min(fleets)
    note = f"Planner.plan, {TYPICAL_PROMPT} tokens, {NUM_LOADED} requests in flight per worker, {most} workers"
    figures: list[Figure] = []
    for policy in POLICIES:
        is_default = policy == RouterConfig().policy.name
        prefix, goal, goal_ratio = ("", TARGET_MS, TARGET_RATIO) if is_default else (f"{policy}_", None, None)
        ratio = _ratio(plan[f"{policy} {most}"], plan[f"{policy} {least}"])
        p50_ms = _ms(plan[f"{policy} {most}"])
        figures += [
            Figure(f"{prefix}placement_p50_ms", p50_ms, "ms", goal, "lower", note),
            Figure(f"{prefix}placement_ratio_{most}_to_{least}", ratio, "x", goal_ratio, "lower"),
        ]
        figures += [
            Figure(f"{prefix}placement_p50_ms_at_{n}", _ms(plan[f"{policy} {n}"]), "ms", better="lower") for n in fleets
        ]
    to_global = _ratio(plan[f"min_ttft {most}"], plan[f"home_pair {most}"])
    return [*figures, Figure(f"min_ttft_to_home_pair_at_{most}", to_global, "x", better="higher")]


def _ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def _each(measure: Callable[[], float], num_requests: int) -> Callable[[], float]:
    return lambda: median_of(num_requests, measure)


def _ms(seconds: list[float]) -> float:
    return 1e3 * statistics.median(seconds)


class Fleet:
    """A router with workers up, linked and loaded, and prompts for it: one in two begins with a prefix seen before."""

    def __init__(self, num_workers: int) -> None:
        self._config = RouterConfig(
            max_in_flight=NUM_LOADED * num_workers + 1, dispatch_tokens=0, pull_s_per_token=PULL_S_PER_TOKEN
        )
        self._router = Router(self._config, lambda: secrets.token_bytes(16))
        self._random = random.Random(num_workers)
        self._prefixes = [make_tokens(self._random, TYPICAL_PROMPT // 2) for _ in range(NUM_PREFIXES)]
        self._numbers = count()
        self._start(num_workers)
        for _ in range(NUM_LOADED * num_workers):
            self._router.on(self._make_request(TYPICAL_PROMPT), 0.0)

    def planner(self, policy: PolicyName) -> Planner:
        """Of the same view."""
        return Planner(replace(self._config, policy=PolicyConfig(policy)), self._router.view)

    def time_of_plan(self, planner: Planner) -> float:
        links = self._make_request(TYPICAL_PROMPT).links
        return time_of(lambda: planner.plan(links, TYPICAL_PROMPT, GREEDY.max_tokens))

    def time_of_arrival(self, num_tokens: int = TYPICAL_PROMPT) -> float:
        arrived = self._make_request(num_tokens)
        seconds = time_of(lambda: self._router.on(arrived, 0.0))
        self._router.on(ClientCancelled(arrived.request.request_id), 0.0)
        return seconds

    def _start(self, num_workers: int) -> None:
        decode = tuple(f"decode-{i}" for i in range(num_workers // 2))
        prefill = [f"prefill-{i}" for i in range(num_workers - len(decode))]
        for role, worker_ids in ((Role.PREFILL, prefill), (Role.DECODE, decode)):
            for worker_id in worker_ids:
                self._router.on(WorkerUp(PeerRef(worker_id, "1", f"{worker_id}:1", role)), 0.0)
                num_free = self._random.randrange(NUM_BLOCKS // 2, NUM_BLOCKS)
                links = decode if role is Role.PREFILL else ()
                stats = WorkerStats(
                    num_blocks=NUM_BLOCKS,
                    num_free_blocks=num_free,
                    warm_links=links,
                    prefill_s_per_token=PREFILL_S_PER_TOKEN,
                )
                self._router.on(Reported(worker_id, "1", WorkerReport(stats=stats)), 0.0)

    def _make_request(self, num_tokens: int) -> Arrived:
        number = next(self._numbers)
        prefix = self._prefixes[number % NUM_PREFIXES] if number % 2 else array("i")
        token_ids = (prefix + make_tokens(self._random, num_tokens))[:num_tokens]
        request = GenerateRequest(
            request_id=str(number),
            client_request_id=str(number),
            attempt=0,
            token_ids=token_ids,
            num_prompt_tokens=num_tokens,
            sampling_params=GREEDY,
        )
        return Arrived(request, links_of(token_ids))


def make_tokens(rng: random.Random, num_tokens: int) -> array[int]:
    return array("i", rng.choices(range(32_000), k=num_tokens))


def links_of(token_ids: array[int]) -> tuple[bytes, ...]:
    return tuple(chain_hashes(token_ids, BLOCK, ROOT, KEY))


# --- by length of the prompt --------------------------------------------------------------------------------------


def by_length(lengths: tuple[int, ...], runs: int) -> list[Figure]:
    tokenizer: Any = AutoTokenizer.from_pretrained(DEMO_MODEL, local_files_only=True, model_max_length=max(lengths) * 2)
    fleet, rng, figures = Fleet(16), random.Random(0), []
    notes = {
        "tokenization": "the demo model's tokenizer: bytes and few merges; a thread's work, not the event loop's",
        "hashing": f"blocks of {BLOCK} tokens",
        "arrival": "the whole Router.on(Arrived), both submits included; 16 workers",
    }
    for length in lengths:
        text = make_text(tokenizer, length)
        token_ids = make_tokens(rng, length)
        stages: dict[str, Callable[[], float]] = {
            "tokenization": partial(time_of, partial(tokenizer.encode, text)),
            "hashing": partial(time_of, partial(links_of, token_ids)),
            "arrival": partial(fleet.time_of_arrival, length),
        }
        for name, seconds in interleave(runs, stages).items():
            figures.append(
                Figure(f"{name}_ms_at_{length // 1000}k", _ms(seconds), "ms", better="lower", note=notes[name])
            )
    return figures


def make_text(tokenizer: Any, num_tokens: int) -> str:
    """That is num_tokens long, give or take a few."""
    num_per_text = len(tokenizer.encode(TEXT * 10)) / 10
    text: str = (TEXT * (int(num_tokens / num_per_text) + 1))[: int(num_tokens * len(TEXT) / num_per_text)]
    return text
