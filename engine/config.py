"""The limits a scheduler works within. What the model or the machine allows is found out elsewhere."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Raises ValueError where a limit is below 1 or the two block sizes do not fit."""

    max_model_len: int  # tokens of one request, prompt and output
    max_num_batched_tokens: int = 2048  # of one step
    max_num_seqs: int = 64  # requests running at once
    block_size: int = 64  # tokens of one KV block
    hash_block_size: int = 64  # tokens of one link of the hash chain: one value for the whole cluster
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_batched_tokens", "max_num_seqs", "block_size", "hash_block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.block_size % self.hash_block_size:
            raise ValueError(
                f"block_size {self.block_size} is not a multiple of hash_block_size {self.hash_block_size}"
            )

    @property
    def links_per_block(self) -> int:
        return self.block_size // self.hash_block_size

    def num_blocks_for(self, num_tokens: int) -> int:
        """KV blocks that hold num_tokens tokens, the partial tail included."""
        return -(-num_tokens // self.block_size)
