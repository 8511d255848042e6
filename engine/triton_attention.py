"""Attention over the block-major pool in Triton: keys and values are read where they lie, by block table. Decodes are
split over their keys, so that one long context fills a whole device; chunks of prompts are cut into tiles of queries.

How a request's keys are split depends on its own length alone, not on the batch. Imported only where there is a CUDA
device (or by tests, under Triton's interpreter); engine/device_steps.py makes what it is given.

Flash attention: Dao et al. 2022, section 3.1; split keys: Flash-Decoding, Dao et al. 2023."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.device_steps import QUERY_TILE, PagedStep
from engine.paged_kv_cache import PagedKVCache

MIN_SPLIT = 256  # keys; a shorter context is not split
MAX_SPLITS = 32  # a power of two; beyond MIN_SPLIT * MAX_SPLITS keys the splits grow
DECODE_TILE, PREFILL_TILE = 64, 64  # keys at a time
MIN_DOT = 16  # rows of the smallest matrix product
LOG2_E = tl.constexpr(1.4426950408889634)


def write_and_attend(
    rows: torch.Tensor,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    layer: int,
    step: PagedStep,
    kv_cache: PagedKVCache,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """rows: [num_rows, num_heads, head_dim]; new_keys, new_values: [num_rows, num_kv_heads, head_dim]."""
    write_rows(kv_cache, layer, new_keys, new_values, step.slot_mapping)
    return attend(rows, layer, step, kv_cache, scaling, sliding_window, softcap)


def write_rows(
    kv_cache: PagedKVCache, layer: int, keys: torch.Tensor, values: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Store one layer's new keys and values, [num_rows, num_kv_heads, head_dim] each, at their slots; those of rows
    whose slot is negative nowhere."""
    keys, values = _with_whole_heads(keys), _with_whole_heads(values)
    layout = kv_cache.layout
    _write_rows[(keys.shape[0], layout.num_kv_heads)](
        keys,
        values,
        kv_cache.tensor[:, layer],
        slot_mapping,
        *(keys.stride(0), keys.stride(1), values.stride(0), values.stride(1)),
        SLOT_STRIDE=kv_cache.slot_stride,
        NUM_KV_HEADS=layout.num_kv_heads,
        HEAD_DIM=layout.head_dim,
        PADDED_DIM=triton.next_power_of_2(layout.head_dim),
        BLOCK_SIZE=layout.block_size,
    )


def attend(
    rows: torch.Tensor,
    layer: int,
    step: PagedStep,
    kv_cache: PagedKVCache,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """rows: queries, [num_rows, num_heads, head_dim], decodes first. Contiguous, of the same shape and dtype."""
    rows = _with_whole_heads(rows)
    out = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    layout = kv_cache.layout
    head_dim = layout.head_dim
    geometry = {
        "SCALING": scaling,
        "WINDOW": sliding_window or 0,
        "SOFTCAP": softcap or 0.0,
        "GROUP": rows.shape[1] // layout.num_kv_heads,
        "NUM_KV_HEADS": layout.num_kv_heads,
        "HEAD_DIM": head_dim,
        "PADDED_DIM": max(MIN_DOT, triton.next_power_of_2(head_dim)),
        "BLOCK_SIZE": layout.block_size,
        "BLOCK_STRIDE": kv_cache.block_numel,
        "PRECISION": "ieee" if rows.dtype is torch.float32 else "tf32",
    }
    if step.num_decodes:
        _decode(rows, out, kv_cache.tensor[:, layer], step, geometry)
    if len(step.tiles):
        _prefill(rows, out, kv_cache.tensor[:, layer], step, geometry)
    return out


def _decode(
    rows: torch.Tensor, out: torch.Tensor, layer: torch.Tensor, step: PagedStep, geometry: dict[str, object]
) -> None:
    num_rows, num_heads = step.num_decodes, rows.shape[1]
    is_wide = rows.shape[2] * rows.element_size() > 512  # keys and values of a tile must fit shared memory
    # As many as the longest context that the block tables have room for may need: the same in every replay of a graph.
    longest = step.block_tables.shape[1] * layer.shape[2]
    num_splits = min(MAX_SPLITS, triton.cdiv(longest, MIN_SPLIT))
    num_kv_heads = layer.shape[3]
    partial = torch.empty(num_rows, num_heads, num_splits, rows.shape[2], dtype=torch.float32, device=rows.device)
    log_sums = torch.empty(num_rows, num_heads, num_splits, dtype=torch.float32, device=rows.device)
    _decode_split[(num_rows, num_kv_heads, num_splits)](
        *(rows, layer, partial, log_sums, step.block_tables, step.kv_lens),
        *(rows.stride(0), rows.stride(1), step.block_tables.stride(0)),
        **geometry,
        PADDED_GROUP=max(MIN_DOT, triton.next_power_of_2(num_heads // num_kv_heads)),
        MIN_SPLIT=MIN_SPLIT,
        TILE=DECODE_TILE // 2 if is_wide else DECODE_TILE,
        num_warps=4,
        num_stages=1 if is_wide else 3,
    )
    _join_splits[(num_rows, num_heads)](
        *(partial, log_sums, out, step.kv_lens, num_splits),
        WINDOW=geometry["WINDOW"],
        HEAD_DIM=geometry["HEAD_DIM"],
        PADDED_DIM=geometry["PADDED_DIM"],
        MIN_SPLIT=MIN_SPLIT,
        MAX_SPLITS=MAX_SPLITS,
        num_warps=4,
    )


def _prefill(
    rows: torch.Tensor, out: torch.Tensor, layer: torch.Tensor, step: PagedStep, geometry: dict[str, object]
) -> None:
    """A head of 128 dimensions and less takes eight warps, a wider one fewer stages: both must fit shared memory."""
    is_wide = rows.shape[2] * rows.element_size() > 256
    _prefill_tile[(len(step.tiles), rows.shape[1])](
        *(rows[step.num_decodes :], layer, out[step.num_decodes :]),
        *(step.block_tables[step.num_decodes :], step.kv_lens[step.num_decodes :], step.chunk_starts, step.tiles),
        *(rows.stride(0), rows.stride(1), step.block_tables.stride(0)),
        **geometry,
        QUERIES=QUERY_TILE,
        TILE=PREFILL_TILE // 2 if is_wide else PREFILL_TILE,
        num_warps=8,
        num_stages=1 if is_wide else 3,
    )


def _with_whole_heads(rows: torch.Tensor) -> torch.Tensor:
    return rows if rows.stride(2) == 1 else rows.contiguous()


# --- kernels ------------------------------------------------------------------------------------------------------
# `layer` points to the layer's keys in block 0; its values lie a block's worth of slots behind them.
# fmt: off

# What differs from step to step chooses no variant of a kernel: a variant compiles for seconds when it is first met.
_VARYING = ("slots", "block_tables", "kv_lens", "chunk_starts", "tiles", "table_row", "num_splits")
_of_any_step = triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_VARYING)


@_of_any_step
def _write_rows(keys, values, layer, slots, key_row, key_head, value_row, value_head,
                SLOT_STRIDE: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
                PADDED_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= 0:
        dims = tl.arange(0, PADDED_DIM)
        real = dims < HEAD_DIM
        target = layer + (slot * NUM_KV_HEADS + head) * HEAD_DIM + dims
        key = tl.load(keys + row * key_row + head * key_head + dims, mask=real)
        value = tl.load(values + row * value_row + head * value_head + dims, mask=real)
        tl.store(target, key.to(layer.dtype.element_ty), mask=real)
        tl.store(target + BLOCK_SIZE * NUM_KV_HEADS * HEAD_DIM, value.to(layer.dtype.element_ty), mask=real)


@triton.jit
def _scored(queries, keys, SCALING: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """In units of log2. [num_queries, num_keys], float32."""
    scores = tl.dot(queries, keys, input_precision=PRECISION) * SCALING
    if SOFTCAP > 0:
        scores = SOFTCAP * (1 - 2 / (tl.exp2(scores * (2 * LOG2_E / SOFTCAP)) + 1))  # tanh
    return scores * LOG2_E


@triton.jit
def _fold(scores, values, top, total, out, PRECISION: tl.constexpr):
    """One more tile of the online softmax. A row that has seen no key yet has top = -inf."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    old = tl.exp2(top - shift)
    weights = tl.exp2(scores - shift[:, None])
    out = out * old[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
    return new_top, total * old + tl.sum(weights, 1), out


@triton.jit
def _split_of(num_keys, num_splits, MIN_SPLIT: tl.constexpr):
    """Keys of one split: a multiple of MIN_SPLIT, so that most tiles are whole."""
    return MIN_SPLIT * ((num_keys + MIN_SPLIT * num_splits - 1) // (MIN_SPLIT * num_splits))


@_of_any_step
def _decode_split(queries, layer, partial, log_sums, block_tables, kv_lens, query_row, query_head, table_row,
                  SCALING: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, GROUP: tl.constexpr,
                  NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
                  BLOCK_SIZE: tl.constexpr, BLOCK_STRIDE: tl.constexpr, PRECISION: tl.constexpr,
                  PADDED_GROUP: tl.constexpr, MIN_SPLIT: tl.constexpr, TILE: tl.constexpr):
    """The query heads of one KV head over one split of one request's keys."""
    row, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    split, num_splits = tl.program_id(2), tl.num_programs(2)
    kv_len = tl.load(kv_lens + row)
    first = kv_len * 0
    if WINDOW > 0:
        first = tl.maximum(kv_len - WINDOW, 0)
    per_split = _split_of(kv_len - first, num_splits, MIN_SPLIT)
    begin = first + split * per_split
    end = tl.minimum(begin + per_split, kv_len)
    if begin < end:
        heads, dims, offsets = tl.arange(0, PADDED_GROUP), tl.arange(0, PADDED_DIM), tl.arange(0, TILE)
        mine = (heads < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
        head = kv_head * GROUP + heads
        query = tl.load(queries + row * query_row + head[:, None] * query_head + dims[None, :], mask=mine, other=0.0)
        query = query.to(layer.dtype.element_ty)
        top = tl.full([PADDED_GROUP], float("-inf"), tl.float32)
        total = tl.zeros([PADDED_GROUP], tl.float32)
        out = tl.zeros([PADDED_GROUP, PADDED_DIM], tl.float32)
        for start in range(begin, end, TILE):
            tokens = start + offsets
            inside = tokens < end
            block = tl.load(block_tables + row * table_row + tokens // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
            slot = block * BLOCK_STRIDE + ((tokens % BLOCK_SIZE) * NUM_KV_HEADS + kv_head) * HEAD_DIM
            whole = inside[:, None] & (dims < HEAD_DIM)[None, :]
            keys = tl.load(layer + slot[:, None] + dims[None, :], mask=whole, other=0.0)
            values = tl.load(layer + slot[:, None] + dims[None, :] + BLOCK_SIZE * NUM_KV_HEADS * HEAD_DIM,
                             mask=whole, other=0.0)
            scores = _scored(query, tl.trans(keys), SCALING, SOFTCAP, PRECISION)
            scores = tl.where(inside[None, :], scores, float("-inf"))
            top, total, out = _fold(scores, values, top, total, out, PRECISION)
        place = (row * NUM_KV_HEADS * GROUP + head) * num_splits + split
        tl.store(log_sums + place, top + tl.log2(total), mask=heads < GROUP)
        tl.store(partial + place[:, None] * HEAD_DIM + dims[None, :], out / total[:, None], mask=mine)


@_of_any_step
def _join_splits(partial, log_sums, out, kv_lens, num_splits, WINDOW: tl.constexpr, HEAD_DIM: tl.constexpr,
                 PADDED_DIM: tl.constexpr, MIN_SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """The splits of one head of one row, weighed by their sums; zeros where there are none."""
    row, head, num_heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    num_keys = tl.load(kv_lens + row)
    if WINDOW > 0:
        num_keys = tl.minimum(num_keys, WINDOW)
    splits, dims = tl.arange(0, MAX_SPLITS), tl.arange(0, PADDED_DIM)
    used = splits * _split_of(num_keys, num_splits, MIN_SPLIT) < num_keys
    place = (row * num_heads + head) * num_splits + splits
    sums = tl.load(log_sums + place, mask=used, other=float("-inf"))
    top = tl.max(sums, 0)
    weights = tl.where(used, tl.exp2(sums - tl.where(top == float("-inf"), 0.0, top)), 0.0)
    weights = weights / tl.maximum(tl.sum(weights, 0), 1e-30)
    real = used[:, None] & (dims < HEAD_DIM)[None, :]
    parts = tl.load(partial + place[:, None] * HEAD_DIM + dims[None, :], mask=real, other=0.0)
    joined = tl.sum(parts * weights[:, None], 0)
    tl.store(out + (row * num_heads + head) * HEAD_DIM + dims, joined.to(out.dtype.element_ty), mask=dims < HEAD_DIM)


@_of_any_step
def _prefill_tile(queries, layer, outs, block_tables, kv_lens, chunk_starts, tiles, query_row, query_head, table_row,
                  SCALING: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, GROUP: tl.constexpr,
                  NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
                  BLOCK_SIZE: tl.constexpr, BLOCK_STRIDE: tl.constexpr, PRECISION: tl.constexpr,
                  QUERIES: tl.constexpr, TILE: tl.constexpr):
    """QUERIES consecutive rows of one chunk, one head."""
    tile, head = tl.program_id(0), tl.program_id(1)
    chunk = tl.load(tiles + 2 * tile).to(tl.int64)
    first_query = tl.load(tiles + 2 * tile + 1)
    first_row = tl.load(chunk_starts + chunk)
    num_queries = tl.load(chunk_starts + chunk + 1) - first_row
    num_cached = tl.load(kv_lens + chunk) - num_queries
    offsets, dims, steps = first_query + tl.arange(0, QUERIES), tl.arange(0, PADDED_DIM), tl.arange(0, TILE)
    positions = num_cached + offsets
    real = (offsets < num_queries)[:, None] & (dims < HEAD_DIM)[None, :]
    row = (first_row + offsets).to(tl.int64)
    query = tl.load(queries + row[:, None] * query_row + head * query_head + dims[None, :], mask=real, other=0.0)
    query = query.to(layer.dtype.element_ty)
    end = num_cached + tl.minimum(first_query + QUERIES, num_queries)
    begin = end * 0
    if WINDOW > 0:
        begin = tl.maximum(num_cached + first_query - WINDOW + 1, 0) // TILE * TILE
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    out = tl.zeros([QUERIES, PADDED_DIM], tl.float32)
    for start in range(begin, end, TILE):
        tokens = start + steps
        inside = tokens < end
        block = tl.load(block_tables + chunk * table_row + tokens // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        slot = block * BLOCK_STRIDE + ((tokens % BLOCK_SIZE) * NUM_KV_HEADS + head // GROUP) * HEAD_DIM
        whole = inside[:, None] & (dims < HEAD_DIM)[None, :]
        keys = tl.load(layer + slot[:, None] + dims[None, :], mask=whole, other=0.0)
        values = tl.load(layer + slot[:, None] + dims[None, :] + BLOCK_SIZE * NUM_KV_HEADS * HEAD_DIM,
                         mask=whole, other=0.0)
        scores = _scored(query, tl.trans(keys), SCALING, SOFTCAP, PRECISION)
        seen = inside[None, :] & (tokens[None, :] <= positions[:, None])
        if WINDOW > 0:
            seen = seen & (tokens[None, :] > positions[:, None] - WINDOW)
        top, total, out = _fold(tl.where(seen, scores, float("-inf")), values, top, total, out, PRECISION)
    out = out / tl.maximum(total, 1e-30)[:, None]
    target = outs + (row[:, None] * (NUM_KV_HEADS * GROUP) + head) * HEAD_DIM + dims[None, :]
    tl.store(target, out.to(outs.dtype.element_ty), mask=real)
