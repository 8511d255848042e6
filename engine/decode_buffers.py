"""The inputs of a decode step at addresses that do not change, as a CUDA graph needs them, and which steps fit. What is
computed from them is not known here."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import torch

from engine.device_steps import PagedStep, fill_table, kv_len, slot_of
from engine.sampler import signed_key
from engine.scheduler_output import ScheduledRequest
from engine.step_inputs import SlotGeometry

NOWHERE = -1  # the slot of a row that is padding
_NUM_COLUMNS = 4  # token, position, slot, keys it sees: of each row, before the block tables


def decode_buckets(max_rows: int) -> tuple[int, ...]:
    """Batch sizes that get a graph: every power of two up to 16, then every sixteenth, and the largest. Less than half
    of a padded step is padding, and less than 16 rows."""
    return tuple(sorted({size for size in (1, 2, 4, 8, *range(16, max_rows, 16)) if size < max_rows} | {max_rows}))


def bucket_of(scheduled: Sequence[ScheduledRequest], buckets: Sequence[int]) -> int | None:
    """The smallest that holds the step; None where it is too large, or not a step of decodes alone."""
    if not scheduled or not all(r.num_scheduled_tokens == 1 and r.samples for r in scheduled):
        return None
    index = bisect_left(buckets, len(scheduled))
    return buckets[index] if index < len(buckets) else None


class DecodeBuffers:
    """Invariant: the tensors that `step` shows are views of one device tensor, which `fill` overwrites in one copy.
    Rows beyond those that were filled are padding up to the bucket that was asked for."""

    def __init__(self, max_rows: int, max_model_len: int, geometry: SlotGeometry, device: torch.device) -> None:
        self._geometry = geometry
        self._max_rows = max_rows
        self._width = -(-max_model_len // geometry.block_size)  # of a block table
        num_numbers = max_rows * (_NUM_COLUMNS + self._width)
        pinned = device.type == "cuda"
        self._staged = torch.zeros(num_numbers, dtype=torch.int32, pin_memory=pinned)
        self._on_device = torch.zeros(num_numbers, dtype=torch.int32, device=device)
        numbers = self._staged.numpy()
        self._columns = numbers[: max_rows * _NUM_COLUMNS].reshape(_NUM_COLUMNS, max_rows)
        self._tables = numbers[max_rows * _NUM_COLUMNS :].reshape(max_rows, self._width)
        self._columns[2] = NOWHERE
        self._on_device.copy_(self._staged)
        self._staged_keys = torch.zeros(max_rows, 1, dtype=torch.int64, pin_memory=pinned)
        self._staged_temperatures = torch.zeros(max_rows, 1, pin_memory=pinned)
        self.keys = self._staged_keys.to(device)  # [max_rows, 1]
        self.temperatures = self._staged_temperatures.to(device)  # [max_rows, 1]; 0: the likeliest token
        self._sampling = self._staged_keys.numpy(), self._staged_temperatures.numpy()
        self._all_rows = torch.arange(max_rows, dtype=torch.int32, device=device)
        self._no_chunks = torch.zeros(1, dtype=torch.int32, device=device)
        self._no_tiles = torch.zeros(0, 2, dtype=torch.int32, device=device)

    def fill(self, scheduled: Sequence[ScheduledRequest], bucket: int) -> None:
        """Begins to copy; a step that is launched on the same stream afterwards finds its numbers. The staged ones may
        be written again once that step is over."""
        tokens, positions, slots, lengths = self._columns
        for row, request in enumerate(scheduled):
            position = request.num_computed_tokens
            tokens[row], positions[row] = request.token_ids[position], position
            slots[row], lengths[row] = slot_of(request, position, self._geometry), kv_len(request)
            fill_table(self._tables[row], request, self._geometry)
        self._columns[:, len(scheduled) : bucket] = [[0], [0], [NOWHERE], [0]]
        num_used = self._max_rows * _NUM_COLUMNS + len(scheduled) * self._width
        self._on_device[:num_used].copy_(self._staged[:num_used], non_blocking=True)

    def fill_sampling(self, scheduled: Sequence[ScheduledRequest]) -> None:
        """Likewise, what is drawn with; see draw_plain."""
        keys, temperatures = self._sampling
        for row, request in enumerate(scheduled):
            params = request.sampling_params
            keys[row], temperatures[row] = signed_key(params.seed, kv_len(request)), params.temperature
        self.temperatures.copy_(self._staged_temperatures, non_blocking=True)
        self.keys.copy_(self._staged_keys, non_blocking=True)

    def step(self, bucket: int, requests: tuple[ScheduledRequest, ...] = ()) -> PagedStep:
        tokens, positions, slots, lengths = self._on_device[: self._max_rows * _NUM_COLUMNS].view(_NUM_COLUMNS, -1)
        tables = self._on_device[self._max_rows * _NUM_COLUMNS :].view(self._max_rows, self._width)
        return PagedStep(
            requests=requests,
            input_ids=tokens[:bucket].unsqueeze(0),
            position_ids=positions[:bucket].unsqueeze(0),
            slot_mapping=slots[:bucket],
            sampled_rows=self._all_rows[:bucket],
            num_decodes=bucket,
            block_tables=tables[:bucket],
            kv_lens=lengths[:bucket],
            chunk_starts=self._no_chunks,
            tiles=self._no_tiles,
        )
