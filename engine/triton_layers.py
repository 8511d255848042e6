"""Parts of a layer that are several passes in PyTorch, as one kernel each: rotation of queries and keys with the
writing of keys and values, and the gated activation. They compute in float32 and round once, where PyTorch rounds after
every pass. Imported only where fused_kernels is on; fused_modules.py says where they stand in for what."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.paged_kv_cache import PagedKVCache

GATED_TILE = 1024


def rotate_and_write(
    rotated: torch.Tensor,
    values: torch.Tensor,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    kv_cache: PagedKVCache,
    layer: int,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """rotated: queries, then keys, [num_rows, num_heads + num_kv_heads, head_dim]; values: [num_rows, num_kv_heads,
    head_dim]; cosines, sines: [num_rows, head_dim], the two halves alike. Returns the queries; keys and values go to
    the cache, those of rows with a negative slot nowhere."""
    layout = kv_cache.layout
    num_rows, num_rotated, head_dim = rotated.shape
    assert rotated.stride(2) == values.stride(2) == cosines.stride(1) == sines.stride(1) == 1
    num_heads = num_rotated - layout.num_kv_heads
    queries = torch.empty(num_rows, num_heads, head_dim, dtype=rotated.dtype, device=rotated.device)
    _rotate_and_write[(num_rows, num_rotated + layout.num_kv_heads)](
        *(rotated, values, cosines, sines, queries, kv_cache.tensor[:, layer], slot_mapping),
        *(rotated.stride(0), rotated.stride(1), values.stride(0), values.stride(1), cosines.stride(0)),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=layout.num_kv_heads,
        HEAD_DIM=head_dim,
        PADDED_HALF=triton.next_power_of_2(head_dim // 2),
        BLOCK_SIZE=layout.block_size,
        num_warps=1,
    )
    return queries


def gated_silu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu of the first half times the second; gate_up: [..., 2 * size], contiguous."""
    size = gate_up.shape[-1] // 2
    rows = gate_up.view(-1, 2 * size)
    out = torch.empty(rows.shape[0], size, dtype=rows.dtype, device=rows.device)
    _gated_silu[(rows.shape[0], triton.cdiv(size, GATED_TILE))](rows, out, SIZE=size, TILE=GATED_TILE, num_warps=4)
    return out.view(*gate_up.shape[:-1], size)


# fmt: off


@triton.jit
def _rotate_and_write(rotated, values, cosines, sines, queries, layer, slots,
                      rotated_row, rotated_head, value_row, value_head, angle_row,
                      NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
                      PADDED_HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """One head of one row: a query, a key or a value."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half = tl.arange(0, PADDED_HALF)
    real = half < HEAD_DIM // 2
    slot = tl.load(slots + row).to(tl.int64)
    if head < NUM_HEADS + NUM_KV_HEADS:
        source = rotated + row * rotated_row + head * rotated_head + half
        first = tl.load(source, mask=real, other=0.0).to(tl.float32)
        second = tl.load(source + HEAD_DIM // 2, mask=real, other=0.0).to(tl.float32)
        cos = tl.load(cosines + row * angle_row + half, mask=real, other=0.0).to(tl.float32)
        sin = tl.load(sines + row * angle_row + half, mask=real, other=0.0).to(tl.float32)
        turned_first = first * cos - second * sin
        turned_second = second * cos + first * sin
        if head < NUM_HEADS:
            target = queries + (row * NUM_HEADS + head) * HEAD_DIM + half
            tl.store(target, turned_first.to(queries.dtype.element_ty), mask=real)
            tl.store(target + HEAD_DIM // 2, turned_second.to(queries.dtype.element_ty), mask=real)
        else:
            key = layer + (slot * NUM_KV_HEADS + head - NUM_HEADS) * HEAD_DIM + half
            written = real & (slot >= 0)
            tl.store(key, turned_first.to(layer.dtype.element_ty), mask=written)
            tl.store(key + HEAD_DIM // 2, turned_second.to(layer.dtype.element_ty), mask=written)
    else:
        kv_head = head - NUM_HEADS - NUM_KV_HEADS
        given = values + row * value_row + kv_head * value_head + half
        value = layer + ((slot + BLOCK_SIZE) * NUM_KV_HEADS + kv_head) * HEAD_DIM + half
        kept = real & (slot >= 0)
        tl.store(value, tl.load(given, mask=kept, other=0.0).to(layer.dtype.element_ty), mask=kept)
        rest = tl.load(given + HEAD_DIM // 2, mask=kept, other=0.0)
        tl.store(value + HEAD_DIM // 2, rest.to(layer.dtype.element_ty), mask=kept)


@triton.jit
def _gated_silu(rows, out, SIZE: tl.constexpr, TILE: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
    real = columns < SIZE
    gate = tl.load(rows + row * 2 * SIZE + columns, mask=real, other=0.0).to(tl.float32)
    up = tl.load(rows + row * 2 * SIZE + SIZE + columns, mask=real, other=0.0).to(tl.float32)
    gated = gate / (1 + tl.exp(-gate)) * up
    tl.store(out + row * SIZE + columns, gated.to(out.dtype.element_ty), mask=real)
