"""Attention whose result for a row depends on nothing but the row and its context: not on the other rows, nor on how
far the context was padded. Keys are taken SPLIT at a time; every product has one of a few fixed sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from engine.fixed_shapes import SPLIT, padded

# Elements: multiples of any vector, and no more than PyTorch leaves to one thread, of 2 ** x and of tanh.
EXP2_PART, TANH_PART = 16384, 2048


def attend_in_splits(
    rows: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    softcap: float | None,
    sizes: Sequence[int],
) -> torch.Tensor:
    """rows: [num_requests, num_kv_heads, query_len, group_size, head_dim], group_size query heads to a KV head; keys,
    values: [num_requests, num_kv_heads, kv_len, head_dim]; mask: [num_requests, 1, query_len, kv_len]; kv_len: a
    multiple of SPLIT; sizes: of the products, in query vectors. Returns the shape of rows."""
    keys, values = (each.view(*each.shape[:2], -1, SPLIT, each.shape[-1]) for each in (keys, values))
    mask = mask.view(*mask.shape[:3], -1, SPLIT)
    mask = mask.transpose(2, 3).unsqueeze(4)  # [num_requests, 1, splits, query_len, 1, SPLIT]
    length = max(1, sizes[-1] // rows.shape[3])
    pieces = zip(torch.split(rows, length, dim=2), torch.split(mask, length, dim=3), strict=True)
    attended = [_attend(piece, keys, values, its_mask, scaling, softcap, sizes) for piece, its_mask in pieces]
    return attended[0] if len(attended) == 1 else torch.cat(attended, dim=2)


def _attend(
    rows: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    softcap: float | None,
    sizes: Sequence[int],
) -> torch.Tensor:
    """keys, values: [num_requests, num_kv_heads, splits, SPLIT, head_dim].

    The largest score is the same in any order. A split that a row does not see adds zeros, which change no bit."""
    to_base_2 = math.log2(math.e)  # scores are exponents of 2, which is faster
    scaling = scaling * to_base_2 if softcap is None else scaling / softcap
    vectors = (rows * scaling).flatten(2, 3)  # [num_requests, num_kv_heads, num_queries, head_dim]
    num_queries = vectors.shape[2]
    vectors = functional.pad(vectors, (0, 0, 0, padded(num_queries, sizes) - num_queries))
    scores = vectors.unsqueeze(2) @ keys.transpose(-1, -2)  # [num_requests, num_kv_heads, splits, size, SPLIT]
    if softcap is not None:
        scores = _in_parts(torch.Tensor.tanh_, scores, TANH_PART).mul_(softcap * to_base_2)
    scores[:, :, :, :num_queries].view(*scores.shape[:3], *rows.shape[2:4], SPLIT).add_(mask)
    largest = scores.amax(-1).amax(2)  # [num_requests, num_kv_heads, size]
    weights = _in_parts(torch.Tensor.exp2_, scores.sub_(largest[:, :, None, :, None]), EXP2_PART)
    attended: torch.Tensor = _in_order(weights @ values) / _in_order(weights.sum(-1)).unsqueeze(-1)
    return attended[:, :, :num_queries].reshape(rows.shape)


def _in_parts(function: Callable[[torch.Tensor], torch.Tensor], numbers: torch.Tensor, size: int) -> torch.Tensor:
    """In place, in parts that PyTorch does not share among threads: where one ended amid a vector, scalar code would
    round otherwise."""
    for part in torch.split(numbers.view(-1), size):
        function(part)
    return numbers


def _in_order(sums: torch.Tensor) -> torch.Tensor:
    """[num_requests, num_kv_heads, splits, ...], added up over the splits."""
    total = sums[:, :, 0] + 0.0  # -0.0 becomes 0.0, to which zeros can be added
    for split in range(1, sums.shape[2]):
        total += sums[:, :, split]
    return total
