"""Short-hands for the values that simulator tests are made of: a small cluster, prompts that share prefixes."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from hypothesis import strategies as st

from engine.config import SchedulerConfig
from protos.cost_model import CostModel, Hardware
from router.config import RouterConfig
from simulator.requests import SimRequest
from simulator.setup import Setup, default_router

BLOCK = 16
COST = CostModel(0.01, 0.004, 1e-4, 1e-8, 0.005, 1e-4, 1e-7)
HARDWARE = Hardware(COST, num_kv_tokens=60 * BLOCK, kv_nbytes_per_token=1000)


def setup(**changes: Any) -> Setup:
    """Two prefill workers and one decode worker unless said; fields of the router's or the scheduler's settings too."""
    scheduler: dict[str, Any] = {"max_model_len": 4096, "max_num_batched_tokens": 64, "max_num_seqs": 8}
    router = {field.name: changes.pop(field.name) for field in fields(RouterConfig) if field.name in changes}
    scheduler |= {field.name: changes.pop(field.name) for field in fields(SchedulerConfig) if field.name in changes}
    if scheduler.get("pulls"):
        router.setdefault("pull_s_per_token", scheduler["pulls"].s_per_token)
    values: dict[str, Any] = {
        "hardware": HARDWARE,
        "num_prefill": 2,
        "num_decode": 1,
        "link_nbytes_per_s": 1e8,
        **changes,
    }
    return Setup(
        router=replace(default_router(), **{"block_size": BLOCK, "hash_block_size": BLOCK, **router}),
        scheduler=SchedulerConfig(**{"block_size": BLOCK, "hash_block_size": BLOCK, **scheduler}),
        **values,
    )


def request(at_s: float, hash_ids: tuple[int, ...], num_output_tokens: int = 1, num_missing: int = 0) -> SimRequest:
    """num_missing: tokens that the last block lacks."""
    return SimRequest(at_s, num_output_tokens, hash_ids, len(hash_ids) * BLOCK - num_missing, BLOCK)


@st.composite
def workloads(draw: st.DrawFn, max_requests: int = 25) -> list[SimRequest]:
    """Prompts of up to 12 blocks, many of which begin alike; some gaps are long, most are short."""
    at_s, requests = 0.0, []
    for number in range(draw(st.integers(1, max_requests))):
        at_s += draw(st.sampled_from([0.0, 0.003, 0.01, 0.01, 0.05, 0.4]))
        shared, depth = draw(st.integers(0, 3)), draw(st.integers(0, 6))
        own = draw(st.integers(0 if depth else 1, 6))
        ids = (*(100 * shared + i for i in range(depth)), *(10_000 + 10 * number + i for i in range(own)))
        num_output_tokens = draw(st.sampled_from([1, 2, 3, 17, 40, 90]))
        requests.append(request(at_s, ids, num_output_tokens, num_missing=draw(st.integers(0, BLOCK - 1))))
    return requests
