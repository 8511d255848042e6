"""Are the kernels right: attention over the pool against float64, with NaN in every slot that nobody may read and in
every output until it is written."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from bench._gpu_card import Card
from bench._gpu_models import DTYPES, GREEDY
from engine.device_steps import PagedStep, build_paged_step
from engine.paged_kv_cache import PagedKVCache
from engine.scheduler_output import ScheduledRequest
from engine.step_inputs import SlotGeometry
from protos.types import KVLayout

# Largest error, relative to 1 plus the value: sums of a few thousand products of numbers around 1.
TOLERANCES = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
NUM_LAYERS, LAYER = 3, 1

Requests = list[tuple[int, int]]  # of each: tokens in the cache, new tokens


@dataclass(frozen=True, slots=True)
class KernelCase:
    requests: tuple[tuple[int, int], ...]
    dtype: str = "bfloat16"
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 128
    block_size: int = 64
    window: int | None = None
    softcap: float | None = None


MIXED = ((0, 1), (1, 1), (255, 1), (256, 1), (257, 1), (1023, 1), (0, 129), (63, 65), (300, 7), (0, 2), (128, 128))
LONG = ((8191, 1), (9000, 1), (12345, 1), (7000, 1200))


def kernel_cases() -> Iterator[KernelCase]:
    for dtype in DTYPES:
        yield KernelCase(MIXED, dtype)
        yield KernelCase(MIXED, dtype, num_heads=32, num_kv_heads=8, block_size=16)
        yield KernelCase(MIXED, dtype, window=100, softcap=20.0, head_dim=64)
        yield KernelCase(MIXED, dtype, num_heads=6, num_kv_heads=6, head_dim=96, block_size=128)
        yield KernelCase(MIXED, dtype, num_heads=16, num_kv_heads=1, head_dim=256, block_size=32)
        yield KernelCase(LONG, dtype)
        yield KernelCase(LONG, dtype, window=4096)


def worst_error(case: KernelCase, card: Card) -> float:
    """Relative to 1 plus the value. NaN where a poisoned slot was read or an output was not written."""
    from engine import triton_attention

    pool = _Pool(case, card)
    queries = torch.randn(pool.num_rows, case.num_heads, case.head_dim, device=card.device).to(DTYPES[case.dtype])
    before = pool.cache.tensor.isnan()
    new_keys, new_values = pool.new_rows()
    scaling = case.head_dim**-0.5
    out = triton_attention.write_and_attend(
        *(queries, new_keys, new_values, LAYER, pool.step, pool.cache, scaling, case.window, case.softcap)
    )
    num_written = int((before & ~pool.cache.tensor.isnan()).sum())
    assert num_written == new_keys.numel() + new_values.numel(), f"{num_written} numbers written"
    worst, first = 0.0, 0
    for request in pool.step.requests:
        num_new = request.num_scheduled_tokens
        expected = pool.expected(request, queries[first : first + num_new], case, scaling)
        error = (out[first : first + num_new].double() - expected).abs() / (1 + expected.abs())
        worst = float("nan") if error.isnan().any() else max(worst, float(error.max()))
        if worst != worst:
            break
        first += num_new
    return worst


@contextmanager
def noted_compilations() -> Iterator[list[str]]:
    """Kernels that compile meanwhile, or are read from Triton's cache on disk."""
    import triton

    names: list[str] = []
    runtime: Any = triton.knobs.runtime
    runtime.jit_post_compile_hook = lambda *, fn, **_told: names.append(fn.name)
    try:
        yield names
    finally:
        runtime.jit_post_compile_hook = None


class _Pool:
    """Invariant: every slot that is no request's is NaN, in all layers but LAYER every slot is."""

    def __init__(self, case: KernelCase, card: Card) -> None:
        dtype = DTYPES[case.dtype]
        size = case.block_size
        num_blocks = 3 + sum(-(-(cached + new) // size) for cached, new in case.requests)
        layout = KVLayout(
            *("random", case.dtype, NUM_LAYERS, case.num_kv_heads, case.head_dim, size, size), itemsize=dtype.itemsize
        )
        self.cache = PagedKVCache(layout, num_blocks, card.device)
        self.cache.tensor.fill_(torch.nan)
        geometry = SlotGeometry(size, self.cache.slot_stride, case.num_kv_heads)
        free = random.Random(1).sample(range(num_blocks), num_blocks)
        scheduled = []
        for index, (cached, new) in enumerate(case.requests):
            table = [free.pop() for _ in range(-(-(cached + new) // size))]
            tokens = array("i", [0] * (cached + new))
            scheduled.append(ScheduledRequest(str(index), tokens, cached + new, cached, new, table, GREEDY, True))
        self.step: PagedStep = build_paged_step(scheduled, geometry, card.device)
        self.num_rows = sum(new for _, new in case.requests)
        torch.manual_seed(0)
        self._new: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._whole: dict[str, torch.Tensor] = {}  # [2, num_tokens, num_kv_heads, head_dim]
        for request in self.step.requests:
            self._fill(request, case)

    def _fill(self, request: ScheduledRequest, case: KernelCase) -> None:
        """Its cached tokens go into its blocks; slots behind them stay NaN."""
        shape = (2, len(request.token_ids), case.num_kv_heads, case.head_dim)
        both = torch.randn(shape, device=self.cache.tensor.device).to(self.cache.tensor.dtype)
        self._whole[request.request_id] = both
        cached, size = request.num_computed_tokens, case.block_size
        for first in range(0, cached, size):
            end = min(first + size, cached)
            self.cache.tensor[request.block_table[first // size], LAYER, :, : end - first] = both[:, first:end]
        self._new.append((both[0, cached:], both[1, cached:]))

    def new_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat([keys for keys, _ in self._new]), torch.cat([values for _, values in self._new])

    def expected(
        self, request: ScheduledRequest, queries: torch.Tensor, case: KernelCase, scaling: float
    ) -> torch.Tensor:
        """In float64. [num_new, num_heads, head_dim]"""
        group = case.num_heads // case.num_kv_heads
        keys, values = (each.double().transpose(0, 1) for each in self._whole[request.request_id])
        heads = queries.double().transpose(0, 1)
        shared = heads.reshape(-1, group, *heads.shape[1:])  # [num_kv_heads, group, num_new, head_dim]
        scores = shared @ keys.unsqueeze(1).transpose(-1, -2) * scaling
        if case.softcap is not None:
            scores = torch.tanh(scores / case.softcap) * case.softcap
        num_tokens, cached = keys.shape[1], request.num_computed_tokens
        positions = torch.arange(cached, num_tokens, device=keys.device)
        distance = positions[:, None] - torch.arange(num_tokens, device=keys.device)
        hidden = (distance < 0) | (distance >= (case.window or num_tokens + 1))
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        attended: torch.Tensor = (weights @ values.unsqueeze(1)).flatten(0, 1)
        return attended.transpose(0, 1)
