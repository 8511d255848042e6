"""What moving KV needs from whoever holds it. Block ids only: which block belongs to whom is decided elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from protos.types import KVLayout


class BlockStore(Protocol):
    """Both methods run on transport threads, and touch only blocks that are leased to a transfer. A copy is over when
    they return, on a GPU too."""

    layout: KVLayout

    @property
    def device(self) -> torch.device:
        """Where the pool is."""

    def gather(self, block_ids: Sequence[int], out: torch.Tensor) -> None:
        """Copy blocks into out, [num_blocks, block_numel] in the pool's dtype."""

    def scatter(self, block_ids: Sequence[int], staged: torch.Tensor) -> None:
        """Copy staged, [num_blocks, block_numel] in the pool's dtype, into blocks."""
