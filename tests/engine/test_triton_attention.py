"""The Triton kernels, under Triton's interpreter, against attention in float64: every slot that nobody may read, and
every output that must be written, starts as NaN."""

from __future__ import annotations

import random
from array import array

import pytest
import torch

pytest.importorskip("triton")

from engine import triton_attention
from engine.device_steps import PagedStep, build_paged_step
from engine.paged_kv_cache import PagedKVCache
from engine.scheduler_output import ScheduledRequest
from engine.step_inputs import SlotGeometry
from protos.types import KVLayout, SamplingParams

NUM_BLOCKS = 64
PARAMS = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, seed=0, max_tokens=1)
SCALING = 0.3
NUM_LAYERS, LAYER = 2, 1


class Case:
    """Requests as (num_cached, num_new) over a poisoned pool, their rows written by the kernel under test."""

    def __init__(
        self,
        requests: list[tuple[int, int]],
        dtype: str = "float32",
        num_heads: int = 4,
        num_kv_heads: int = 2,
        head_dim: int = 32,
        block_size: int = 16,
    ) -> None:
        torch.manual_seed(len(requests))
        torch_dtype, size = getattr(torch, dtype), getattr(torch, dtype).itemsize
        layout = KVLayout("f", dtype, NUM_LAYERS, num_kv_heads, head_dim, block_size, block_size, itemsize=size)
        self.cache = PagedKVCache(layout, NUM_BLOCKS)
        self.cache.tensor.fill_(torch.nan)
        self.geometry = SlotGeometry(block_size, self.cache.slot_stride, num_kv_heads)
        free = random.Random(0).sample(range(NUM_BLOCKS), NUM_BLOCKS)
        self.scheduled = []
        for index, (cached, new) in enumerate(requests):
            table = [free.pop() for _ in range(-(-(cached + new) // block_size))]
            tokens = array("i", range(cached + new))
            self.scheduled.append(ScheduledRequest(str(index), tokens, cached + new, cached, new, table, PARAMS, True))
        self.step = build_paged_step(self.scheduled, self.geometry, torch.device("cpu"))
        self.keys, self.values = {}, {}
        for request in self.step.requests:
            whole = (len(request.token_ids), num_kv_heads, head_dim)
            self.keys[request.request_id] = torch.randn(whole).to(torch_dtype)
            self.values[request.request_id] = torch.randn(whole).to(torch_dtype)
            self._write_cached(request)
        self.queries = torch.randn(self.step.input_ids.shape[1], num_heads, head_dim).to(torch_dtype)
        news = [(self.keys[r.request_id], self.values[r.request_id], r.num_computed_tokens) for r in self.step.requests]
        new_keys = torch.cat([keys[cached:] for keys, _, cached in news])
        new_values = torch.cat([values[cached:] for _, values, cached in news])
        triton_attention.write_rows(self.cache, LAYER, new_keys, new_values, self.step.slot_mapping)

    def _write_cached(self, request: ScheduledRequest) -> None:
        size = self.geometry.block_size
        for position in range(request.num_computed_tokens):
            block, offset = request.block_table[position // size], position % size
            self.cache.tensor[block, LAYER, 0, offset] = self.keys[request.request_id][position]
            self.cache.tensor[block, LAYER, 1, offset] = self.values[request.request_id][position]

    def attended(
        self, window: int | None = None, softcap: float | None = None, step: PagedStep | None = None
    ) -> torch.Tensor:
        return triton_attention.attend(self.queries, LAYER, step or self.step, self.cache, SCALING, window, softcap)

    def expected(self, window: int | None = None, softcap: float | None = None) -> torch.Tensor:
        """In float64, one request at a time."""
        outs, first = [], 0
        for request in self.step.requests:
            num_new, cached = request.num_scheduled_tokens, request.num_computed_tokens
            queries = self.queries[first : first + num_new].double().transpose(0, 1)
            group = queries.shape[0] // self.cache.layout.num_kv_heads
            keys, values = (
                whole[request.request_id].double().transpose(0, 1).repeat_interleave(group, 0)
                for whole in (self.keys, self.values)
            )
            scores = queries @ keys.transpose(1, 2) * SCALING
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            distance = torch.arange(cached, cached + num_new)[:, None] - torch.arange(cached + num_new)
            hidden = (distance < 0) | (distance >= (window or 1 << 30))
            outs.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values).transpose(0, 1))
            first += num_new
        return torch.cat(outs)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the launchers allocate holds NaN until a kernel has written it."""
    empty = torch.empty

    def poisoned(*size: object, **options: object) -> torch.Tensor:
        made: torch.Tensor = empty(*size, **options)  # type: ignore[call-overload]
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(triton_attention.torch, "empty", poisoned)


@pytest.fixture
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few tokens are already several splits of several tiles."""
    monkeypatch.setattr(triton_attention, "MIN_SPLIT", 32)
    monkeypatch.setattr(triton_attention, "MAX_SPLITS", 4)
    monkeypatch.setattr(triton_attention, "DECODE_TILE", 16)


# bfloat16 is left to `scripts/bench gpu`: the interpreter multiplies its bits as integers.
TOLERANCES = {"float32": 2e-6, "float16": 4e-3}
MIXED = [(0, 1), (30, 1), (16, 7), (0, 33), (17, 1), (63, 1), (5, 130)]


def check(case: Case, window: int | None = None, softcap: float | None = None) -> None:
    tolerance = TOLERANCES[case.cache.layout.dtype]
    found = case.attended(window, softcap).double()
    torch.testing.assert_close(found, case.expected(window, softcap), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_decodes_and_chunks_in_one_step(dtype: str) -> None:
    check(Case(MIXED, dtype))


@pytest.mark.parametrize(("window", "softcap"), [(9, None), (None, 2.0), (40, 5.0)])
@pytest.mark.usefixtures("short_splits")
def test_windows_and_caps(window: int | None, softcap: float | None) -> None:
    check(Case(MIXED), window, softcap)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size"),
    [(4, 4, 16, 16), (6, 2, 32, 32), (8, 1, 48, 64), (32, 1, 16, 16), (2, 1, 80, 128)],
)
def test_shapes(num_heads: int, num_kv_heads: int, head_dim: int, block_size: int) -> None:
    check(Case([(20, 1), (3, 20)], "float32", num_heads, num_kv_heads, head_dim, block_size))


@pytest.mark.parametrize("kv_len", [1, 31, 32, 33, 64, 127, 128, 129, 200, 300])
@pytest.mark.usefixtures("short_splits")
def test_a_context_is_split_however_long(kv_len: int) -> None:
    """Up to four splits of 32 keys, beyond them longer ones."""
    check(Case([(kv_len - 1, 1)]))
    check(Case([(kv_len - 1, 1)]), window=37)


@pytest.mark.usefixtures("short_splits")
def test_a_decode_is_the_same_in_every_batch() -> None:
    together = Case([(99, 1), (200, 1), (3, 1)])
    alone = Case([(99, 1)])
    alone.cache.tensor.copy_(together.cache.tensor)
    alone.queries = together.queries[:1].clone()
    alone.step.block_tables[:, :7] = together.step.block_tables[:1, :7]
    assert alone.attended()[0].equal(together.attended()[0])


def test_rows_without_a_slot_write_nothing_and_rows_without_keys_give_zeros() -> None:
    case = Case([(4, 1), (9, 1)])
    before = case.cache.tensor.clone()
    rows = torch.ones(2, 2, 32)
    triton_attention.write_rows(case.cache, LAYER, rows, rows, torch.tensor([-1, -1], dtype=torch.int32))
    assert case.cache.tensor.nan_to_num(7.0).equal(before.nan_to_num(7.0))
    case.step.kv_lens[0] = 0
    found = case.attended()
    assert found[0].eq(0).all() and found[1].ne(0).all()


def test_queries_may_be_a_view_of_wider_rows() -> None:
    case = Case([(4, 1), (9, 5)])
    wide = torch.randn(6, 9, 32)
    wide[:, 2:6] = case.queries
    expected = case.attended()
    case.queries = wide[:, 2:6]
    assert case.attended().equal(expected)


def test_nan_in_a_slot_that_is_read_shows() -> None:
    case = Case([(20, 1)])
    case.cache.tensor[case.scheduled[0].block_table[0], LAYER, 1, 3] = torch.nan
    assert case.attended().isnan().any()
