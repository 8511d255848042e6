"""The buffers between block pool and wire, and the sums that vouch for their bytes. Knows no links and no transfers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import xxhash

from kvtransfer.config import Checksum
from protos.types import KVLayout

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


class StagingRing:
    """Chunk buffers of one side of one link, allocated once. Invariant: a slot is free or has exactly one owner. Slots
    are taken and given back on one thread; what lies in a taken slot is its owner's business."""

    def __init__(
        self, layout: KVLayout, num_slots: int, num_slot_blocks: int, allocate: Callable[[int], torch.Tensor]
    ) -> None:
        block_numel = layout.block_nbytes // layout.itemsize
        dtype = _DTYPES[layout.dtype]
        assert dtype.itemsize == layout.itemsize, f"{layout.dtype} does not have {layout.itemsize} bytes"
        memory = allocate(num_slots * num_slot_blocks * layout.block_nbytes)  # [num_bytes], uint8
        self._slots = memory.view(dtype).view(num_slots, num_slot_blocks, block_numel)
        self._free = list(range(num_slots))

    def take(self) -> int | None:
        return self._free.pop() if self._free else None

    def release(self, slot: int) -> None:
        assert slot not in self._free
        self._free.append(slot)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks(self, slot: int, num_blocks: int) -> torch.Tensor:  # [num_blocks, block_numel]
        return self._slots[slot][:num_blocks]


def private_memory(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8)


def as_bytes(blocks: torch.Tensor) -> torch.Tensor:  # [num_bytes], uint8, the same memory
    return blocks.view(-1).view(torch.uint8)


def checksum_of(name: Checksum) -> Callable[[torch.Tensor], int]:
    """The sum over a tensor's bytes, as an unsigned 64-bit number; "none" vouches for nothing."""
    return {"xxh3_64": _xxh3_64, "sum64": _sum64, "none": _none}[name]


def _xxh3_64(data: torch.Tensor) -> int:
    return xxhash.xxh3_64_intdigest(data.numpy().data)


def _sum64(data: torch.Tensor) -> int:
    """A plain integer sum, because a device can compute it in place. It misses words that swapped places."""
    words = data.view(torch.int64) if data.numel() % 8 == 0 else data
    return int(words.sum(dtype=torch.int64).item()) & (1 << 64) - 1


def _none(data: torch.Tensor) -> int:
    return 0
