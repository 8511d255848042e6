"""One step as index tensors, built once and shared by all layers: which rows attend to which slots.

Knows positions, block tables and how a KV cache numbers its slots; knows neither the model nor what is in the slots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from engine.paged_kv_cache import PagedKVCache
from engine.scheduler_output import ScheduledRequest

# A group of decodes is cut before padding makes it read this many more tokens: about what one more group costs a CPU.
MAX_PADDING_TOKENS = 512

Int64Array = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class SlotGeometry:
    """How a KV cache numbers its slots; see PagedKVCache."""

    block_size: int
    slot_stride: int  # slots from one block to the next
    num_kv_heads: int

    @classmethod
    def of(cls, kv_cache: PagedKVCache) -> SlotGeometry:
        return cls(kv_cache.layout.block_size, kv_cache.slot_stride, kv_cache.layout.num_kv_heads)


@dataclass(frozen=True, slots=True)
class AttentionGroup:
    """Requests that attend in one call: either decodes, one row each, or one chunk of one request.

    All are padded to the longest, each with a slot that it has written itself; masks hide the padding."""

    first_row: int
    num_requests: int
    query_len: int  # rows per request
    kv_len: int  # keys per request
    kv_rows: torch.Tensor  # [num_requests * num_kv_heads * kv_len], rows of the KV cache
    positions: torch.Tensor  # [num_requests, query_len], of the queries
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)  # by sliding window

    @property
    def num_rows(self) -> int:
        return self.num_requests * self.query_len

    def is_causal(self, sliding_window: int | None) -> bool:
        """A whole prompt in one chunk, seen by no window: the triangle needs no mask, and half of the work."""
        whole = self.query_len == self.kv_len > 1
        return whole and (sliding_window is None or sliding_window >= self.kv_len)

    def mask(self, sliding_window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """[num_requests, 1, query_len, kv_len]: 0 where a query sees a key, -inf elsewhere. Made by the first layer
        that asks, kept for the step."""
        if sliding_window not in self.masks:
            distance = self.positions.unsqueeze(-1) - torch.arange(self.kv_len, device=self.positions.device)
            hidden = distance < 0
            if sliding_window is not None:
                hidden |= distance >= sliding_window
            zeros = torch.zeros((), dtype=dtype, device=hidden.device)
            self.masks[sliding_window] = torch.where(hidden, -torch.inf, zeros).unsqueeze(1)
        return self.masks[sliding_window]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """A step's rows, packed: the rows of a request are consecutive, the groups cover all rows in order."""

    requests: tuple[ScheduledRequest, ...]  # in packing order
    input_ids: torch.Tensor  # [1, num_rows]
    position_ids: torch.Tensor  # [1, num_rows]
    slot_mapping: torch.Tensor  # [num_rows], where each row's key and value go
    groups: tuple[AttentionGroup, ...]
    sampled_rows: torch.Tensor  # rows whose logits are wanted, in the order of `requests`


def build_step_inputs(
    scheduled: Sequence[ScheduledRequest], geometry: SlotGeometry, device: torch.device, kv_multiple: int = 1
) -> StepInputs:
    """kv_multiple: every group's kv_len is padded to a multiple of it."""
    requests: list[ScheduledRequest] = []
    groups: list[AttentionGroup] = []
    row_slots: list[Int64Array] = []
    first_row = 0
    for members in _grouped(scheduled):
        group, own_slots = _build_group(members, first_row, geometry, device, kv_multiple)
        requests += members
        groups.append(group)
        row_slots.append(own_slots)
        first_row += group.num_rows
    token_ids = np.concatenate([_chunk_token_ids(r) for r in requests])
    ends = np.cumsum([r.num_scheduled_tokens for r in requests]) - 1
    samples = np.array([r.samples for r in requests])
    return StepInputs(
        requests=tuple(requests),
        input_ids=torch.from_numpy(token_ids).to(device, torch.int64).unsqueeze(0),
        position_ids=torch.cat([g.positions.reshape(-1) for g in groups]).unsqueeze(0),
        slot_mapping=torch.from_numpy(np.concatenate(row_slots)).to(device),
        groups=tuple(groups),
        sampled_rows=torch.from_numpy(ends[samples]).to(device),
    )


def _grouped(scheduled: Sequence[ScheduledRequest]) -> Iterator[list[ScheduledRequest]]:
    """Decodes of similar length together, every longer chunk alone."""
    group: list[ScheduledRequest] = []
    num_padding_tokens = 0
    for request in sorted((r for r in scheduled if r.num_scheduled_tokens == 1), key=_kv_len, reverse=True):
        if group:
            num_padding_tokens += _kv_len(group[0]) - _kv_len(request)
        if num_padding_tokens > MAX_PADDING_TOKENS:
            yield group
            group, num_padding_tokens = [], 0
        group.append(request)
    if group:
        yield group
    for request in scheduled:
        if request.num_scheduled_tokens > 1:
            yield [request]


def _kv_len(request: ScheduledRequest) -> int:
    return request.num_computed_tokens + request.num_scheduled_tokens


def _chunk_token_ids(request: ScheduledRequest) -> np.ndarray[Any, np.dtype[np.int32]]:
    start = request.num_computed_tokens
    # A copy: a view would lock the array, and the scheduler appends to it.
    return np.array(request.token_ids[start : start + request.num_scheduled_tokens], dtype=np.int32)


def _build_group(
    members: Sequence[ScheduledRequest], first_row: int, geometry: SlotGeometry, device: torch.device, kv_multiple: int
) -> tuple[AttentionGroup, Int64Array]:
    """The group, and the slots that its rows write."""
    query_len = members[0].num_scheduled_tokens
    lengths = np.array([[_kv_len(r)] for r in members])  # [num_requests, 1]
    slots = _padded_slots(members, -(-int(lengths.max()) // kv_multiple) * kv_multiple, geometry)
    positions = lengths - query_len + np.arange(query_len)  # [num_requests, query_len]
    own_slots = np.take_along_axis(slots, positions, axis=1).reshape(-1)
    # Beyond a request's length lie slots that nobody wrote: read its first one, lest NaN leak through the mask.
    read_slots = np.where(np.arange(slots.shape[1]) < lengths, slots, slots[:, :1])
    heads = np.arange(geometry.num_kv_heads)[:, None]
    kv_rows = read_slots[:, None, :] * geometry.num_kv_heads + heads  # [num_requests, num_kv_heads, kv_len]
    group = AttentionGroup(
        first_row=first_row,
        num_requests=len(members),
        query_len=query_len,
        kv_len=slots.shape[1],
        kv_rows=torch.from_numpy(kv_rows.reshape(-1)).to(device),
        positions=torch.from_numpy(positions).to(device),
    )
    return group, own_slots


def _padded_slots(members: Sequence[ScheduledRequest], kv_len: int, geometry: SlotGeometry) -> Int64Array:
    """[num_requests, kv_len]: the slot of every token; a shorter block table goes on with its first block."""
    block_size = geometry.block_size
    tables = np.empty((len(members), -(-kv_len // block_size)), dtype=np.int64)
    for row, request in enumerate(members):
        used = request.block_table[: -(-_kv_len(request) // block_size)]
        tables[row, : len(used)] = used
        tables[row, len(used) :] = used[0]
    slots = tables[:, :, None] * geometry.slot_stride + np.arange(block_size)
    return slots.reshape(len(members), -1)[:, :kv_len]
