"""One step as the paged kernels want it: block tables instead of slots to gather, in int32, decodes first. Pure layout
of numbers; which kernel reads them is triton_attention.py's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engine.scheduler_output import ScheduledRequest
from engine.step_inputs import SlotGeometry

QUERY_TILE = 128  # rows of a chunk that one program of the prefill kernel takes

Int32Array = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True, slots=True)
class PagedStep:
    """A step's rows, packed: one of each decode, then those of each chunk. Requests are in that order too.

    A row with a negative slot, and a decode with kv_len 0, are padding: they write and read nothing."""

    requests: tuple[ScheduledRequest, ...]
    input_ids: torch.Tensor  # [1, num_rows]
    position_ids: torch.Tensor  # [1, num_rows]
    slot_mapping: torch.Tensor  # [num_rows]
    sampled_rows: torch.Tensor  # rows whose logits are wanted, in the order of `requests`
    num_decodes: int
    block_tables: torch.Tensor  # [num_requests, width]; beyond a request's blocks, anything
    kv_lens: torch.Tensor  # [num_requests], keys that its last row sees
    chunk_starts: torch.Tensor  # [num_chunks + 1], rows, counted from the first chunk's
    tiles: torch.Tensor  # [num_tiles, 2]: chunk, first query of the tile within it


def build_paged_step(scheduled: Sequence[ScheduledRequest], geometry: SlotGeometry, device: torch.device) -> PagedStep:
    decodes = [r for r in scheduled if r.num_scheduled_tokens == 1]
    chunks = [r for r in scheduled if r.num_scheduled_tokens > 1]
    requests = (*decodes, *chunks)
    rows = [_rows_of(r, geometry) for r in requests]
    token_ids, positions, slots = (np.concatenate(each) for each in zip(*rows, strict=True))
    tables = np.zeros((len(requests), max(_num_blocks(r, geometry) for r in requests)), dtype=np.int32)
    for row, request in enumerate(requests):
        fill_table(tables[row], request, geometry)
    lengths = [r.num_scheduled_tokens for r in chunks]
    tiles = [(i, first) for i, length in enumerate(lengths) for first in range(0, length, QUERY_TILE)]
    ends = np.cumsum([r.num_scheduled_tokens for r in requests]) - 1

    def on_device(numbers: Any) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.int32)).to(device)

    return PagedStep(
        requests=requests,
        input_ids=on_device(token_ids).unsqueeze(0),
        position_ids=on_device(positions).unsqueeze(0),
        slot_mapping=on_device(slots),
        sampled_rows=on_device(ends[np.array([r.samples for r in requests])]),
        num_decodes=len(decodes),
        block_tables=on_device(tables),
        kv_lens=on_device([kv_len(r) for r in requests]),
        chunk_starts=on_device(np.cumsum([0, *lengths])),
        tiles=on_device(np.array(tiles).reshape(-1, 2)),
    )


def kv_len(request: ScheduledRequest) -> int:
    return request.num_computed_tokens + request.num_scheduled_tokens


def fill_table(row: Int32Array, request: ScheduledRequest, geometry: SlotGeometry) -> None:
    num_blocks = _num_blocks(request, geometry)
    row[:num_blocks] = request.block_table[:num_blocks]


def slot_of(request: ScheduledRequest, position: int, geometry: SlotGeometry) -> int:
    block_id = request.block_table[position // geometry.block_size]
    return block_id * geometry.slot_stride + position % geometry.block_size


def _num_blocks(request: ScheduledRequest, geometry: SlotGeometry) -> int:
    return -(-kv_len(request) // geometry.block_size)


def _rows_of(request: ScheduledRequest, geometry: SlotGeometry) -> tuple[Int32Array, Int32Array, Int32Array]:
    """Token ids, positions and slots of a request's rows."""
    positions = np.arange(request.num_computed_tokens, kv_len(request), dtype=np.int32)
    # A copy: a view would lock the array, and the scheduler appends to it.
    token_ids = np.array(request.token_ids[positions[0] : positions[-1] + 1], dtype=np.int32)
    blocks = np.array(request.block_table[: _num_blocks(request, geometry)], dtype=np.int64)
    slots = blocks[positions // geometry.block_size] * geometry.slot_stride + positions % geometry.block_size
    return token_ids, positions, slots.astype(np.int32)
