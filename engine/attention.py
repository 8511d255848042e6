"""Attention over the paged KV cache, in the shape in which transformers calls it.

A model loaded with attn_implementation=ATTENTION_NAME sends every layer's queries, keys and values here, with the
step's KVMeta. No mask function is registered beside it, so transformers builds no mask: ours come with the step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from engine.device_steps import PagedStep
from engine.fixed_attention import attend_in_splits
from engine.fixed_shapes import FixedShapes
from engine.paged_kv_cache import PagedKVCache
from engine.step_inputs import AttentionGroup, StepInputs

ATTENTION_NAME = "twinring_paged"


@dataclass(frozen=True, slots=True)
class KVMeta:
    """Where a step's rows read and write; travels through the model as the keyword argument kv_meta. Rows behind those
    of the step are there to fill a fixed shape: they read nothing, write nothing and get zeros."""

    kv_cache: PagedKVCache
    step: StepInputs | PagedStep
    shapes: FixedShapes | None = None  # of a deterministic worker


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    kv_meta: KVMeta,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_kwargs: object,
) -> tuple[torch.Tensor, None]:
    """query: [1, num_heads, num_rows, head_dim]; key, value: [1, num_kv_heads, num_rows, head_dim].
    Returns [1, num_rows, num_heads, head_dim]."""
    assert attention_mask is None
    layer = module.layer_idx
    assert isinstance(layer, int)
    if isinstance(kv_meta.step, PagedStep):
        from engine import triton_attention  # not there without a GPU

        how = (scaling, sliding_window, softcap)
        rows, keys, values = (each[0].transpose(0, 1) for each in (query, key, value))
        out = triton_attention.write_and_attend(rows, keys, values, layer, kv_meta.step, kv_meta.kv_cache, *how)
        return out.unsqueeze(0), None
    slots = kv_meta.step.slot_mapping
    new_keys, new_values = (new[0].transpose(0, 1).to(kv_meta.kv_cache.tensor.dtype) for new in (key, value))
    kv_meta.kv_cache.write(layer, new_keys[: len(slots)], new_values[: len(slots)], slots)
    rows = query[0].transpose(0, 1)  # [num_rows, num_heads, head_dim]
    if kv_meta.shapes is not None:
        step, kv_cache, shapes = kv_meta.step, kv_meta.kv_cache, kv_meta.shapes
        return _attend_fixed(rows, layer, step, kv_cache, shapes, scaling, sliding_window, softcap), None
    attended = [
        _attend(
            rows[g.first_row : g.first_row + g.num_rows], layer, g, kv_meta.kv_cache, scaling, sliding_window, softcap
        )
        for g in kv_meta.step.groups
    ]
    return (attended[0] if len(attended) == 1 else torch.cat(attended)).unsqueeze(0), None


def _attend_fixed(
    rows: torch.Tensor,
    layer: int,
    step: StepInputs,
    kv_cache: PagedKVCache,
    shapes: FixedShapes,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """All rows, [1, num_rows, num_heads, head_dim], attended in the sizes of a deterministic worker, in float32."""
    num_kv_heads, head_dim = kv_cache.layout.num_kv_heads, kv_cache.layout.head_dim
    out = torch.zeros_like(rows, memory_format=torch.contiguous_format)
    for group in step.groups:
        its_rows = slice(group.first_row, group.first_row + group.num_rows)
        queries = rows[its_rows].float().reshape(group.num_requests, group.query_len, num_kv_heads, -1, head_dim)
        keys, values = (
            each.float().view(group.num_requests, num_kv_heads, group.kv_len, head_dim)
            for each in kv_cache.read(layer, group.kv_rows)
        )
        mask = group.mask(sliding_window, queries.dtype)
        attended = attend_in_splits(
            queries.transpose(1, 2), keys, values, mask, scaling, softcap, shapes.queries
        )  # [num_requests, num_kv_heads, query_len, group_size, head_dim]
        out[its_rows] = attended.transpose(1, 2).reshape(group.num_rows, -1, head_dim)
    return out.unsqueeze(0)


def _attend(
    rows: torch.Tensor,
    layer: int,
    group: AttentionGroup,
    kv_cache: PagedKVCache,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Rows of one group, [num_rows, num_heads, head_dim], attended."""
    num_kv_heads, head_dim = kv_cache.layout.num_kv_heads, kv_cache.layout.head_dim
    keys, values = kv_cache.read(layer, group.kv_rows)
    # Rows may be wider than the cache: half_weights.py.
    keys = keys.to(rows.dtype).view(group.num_requests, num_kv_heads, group.kv_len, head_dim)
    values = values.to(rows.dtype).view(keys.shape)
    if group.query_len == 1:
        # The query heads that share a KV head become queries of that head: it is read once for all of them.
        queries = rows.reshape(group.num_requests, num_kv_heads, -1, head_dim)
    else:
        queries = rows.view(group.num_requests, group.query_len, -1, head_dim).transpose(1, 2)
    if softcap is not None:
        out = _soft_capped(queries, keys, values, group.mask(sliding_window, queries.dtype), scaling, softcap)
    else:
        causal = group.is_causal(sliding_window)
        out = functional.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=None if causal else group.mask(sliding_window, queries.dtype),
            is_causal=causal,
            scale=scaling,
            enable_gqa=True,
        )
    return (out if group.query_len == 1 else out.transpose(1, 2)).reshape(rows.shape)


def _soft_capped(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scaling: float, softcap: float
) -> torch.Tensor:
    """Attention whose scores stay within (-softcap, softcap), as Gemma 2 has it; torch has no fused kernel for that.

    queries: [num_requests, num_heads, query_len, head_dim]; mask: [num_requests, 1, query_len, kv_len]."""
    shared = queries.reshape(*keys.shape[:2], -1, *queries.shape[2:])  # the query heads of one KV head together
    scores = shared @ keys.unsqueeze(2).transpose(-1, -2) * scaling
    scores = torch.tanh(scores / softcap) * softcap + mask.unsqueeze(2)
    weights = scores.softmax(-1, dtype=torch.float32).to(values.dtype)
    return (weights @ values.unsqueeze(2)).flatten(1, 2)


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, paged_attention)
