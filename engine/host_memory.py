"""The KV tensor in host memory behind the device's: blocks copied from one to the other, and read from both by whoever
sends them to another worker. Which block is where is not known here: ids come from the scheduler and from transfers."""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence

import torch

from engine.events import CopyDirection
from engine.paged_kv_cache import PagedKVCache, select_rows

MAX_BLOCKS_TO_MEASURE = 16
NUM_ROUNDS = 3  # the best counts: what else runs then says nothing about the copy
CUDA_HOST_REGISTER_PORTABLE = 1


class HostMemory:
    """Stands where a PagedKVCache would, for transfers: ids from num_blocks of the device on are blocks of host memory,
    counted from there.

    Invariant: takes num_blocks times what a block takes, and allocates nothing after construction."""

    def __init__(self, device: PagedKVCache, num_blocks: int) -> None:
        """ValueError where num_blocks is below 1; RuntimeError where the machine does not have the memory."""
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        self.layout = device.layout
        self.num_blocks = num_blocks
        self._device = device
        self._blocks = torch.zeros(num_blocks, device.blocks.shape[1], dtype=device.blocks.dtype)
        self._streams: dict[CopyDirection, torch.cuda.Stream] = {}
        if device.tensor.is_cuda:
            _pin(self, self._blocks)
            for each in CopyDirection:
                self._streams[each] = torch.cuda.Stream(device.tensor.device)  # type: ignore[no-untyped-call]

    @property
    def device(self) -> torch.device:
        return self._device.device

    def copy(self, direction: CopyDirection, from_block_ids: Sequence[int], to_block_ids: Sequence[int]) -> None:
        """Both numbered in their own memory. Over when it returns; safe beside the steps and a copy the other way, as
        long as nobody writes to the ones or uses the others. RuntimeError where the device fails."""
        source, target = self._device.blocks, self._blocks
        if direction is CopyDirection.TO_DEVICE:
            source, target = target, source
        stream = self._streams.get(direction)
        if stream is None:
            _copy_rows(source, from_block_ids, target, to_block_ids)
            return
        # What has been computed may not be in its blocks yet, and steps that read the overwritten ones may not be over.
        stream.wait_stream(torch.cuda.default_stream(stream.device))
        with torch.cuda.stream(stream):
            _copy_rows(source, from_block_ids, target, to_block_ids)
        stream.synchronize()

    def gather(self, block_ids: Sequence[int], out: torch.Tensor) -> None:
        """As PagedKVCache.gather, of blocks on the device and, after those, of blocks in host memory."""
        num_device_blocks = self._device.num_blocks
        num_on_device = sum(block_id < num_device_blocks for block_id in block_ids)
        if num_on_device:
            self._device.gather(block_ids[:num_on_device], out[:num_on_device])
        if num_on_device < len(block_ids):
            in_host = torch.tensor(block_ids[num_on_device:], dtype=torch.int64) - num_device_blocks
            select_rows(self._blocks, in_host, out[num_on_device:].view(torch.int64))

    def scatter(self, block_ids: Sequence[int], staged: torch.Tensor) -> None:
        """What comes from elsewhere is written to the device."""
        self._device.scatter(block_ids, staged)

    def measured_load_s(self) -> float:
        """What one block takes to come to the device. Overwrites blocks in both: for before they are used."""
        num_blocks = min(self.num_blocks, self._device.num_blocks, MAX_BLOCKS_TO_MEASURE)
        block_ids = range(num_blocks)
        for direction in (CopyDirection.TO_HOST, CopyDirection.TO_DEVICE):
            self.copy(direction, block_ids, block_ids)  # memory is mapped when it is first written to
        best_s = min(self._load_s(block_ids) for _ in range(NUM_ROUNDS))
        return best_s / num_blocks

    def _load_s(self, block_ids: Sequence[int]) -> float:
        started_at = time.monotonic()
        self.copy(CopyDirection.TO_DEVICE, block_ids, block_ids)
        return time.monotonic() - started_at


def _copy_rows(source: torch.Tensor, from_rows: Sequence[int], target: torch.Tensor, to_rows: Sequence[int]) -> None:
    for from_row, to_row in zip(from_rows, to_rows, strict=True):
        target[to_row].copy_(source[from_row], non_blocking=True)


def _pin(owner: HostMemory, blocks: torch.Tensor) -> None:
    """Registered and not made by pin_memory=True, which takes the next power of two."""
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    error = int(cudart.cudaHostRegister(blocks.data_ptr(), blocks.nbytes, CUDA_HOST_REGISTER_PORTABLE))
    if error:
        raise RuntimeError(f"{blocks.nbytes} bytes of host memory cannot be pinned: CUDA error {error}")
    weakref.finalize(owner, cudart.cudaHostUnregister, blocks.data_ptr())
