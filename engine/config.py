"""The limits a scheduler works within. What the model or the machine allows is found out elsewhere."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PullConfig:
    """When a prefix is fetched from its home, and how many prefixes may be fetched from here at once.

    Raises ValueError where a cost is negative or a limit makes no sense."""

    s_per_token: float | None = None  # what the KV of a token takes to come; null: as each worker measures it
    base_s: float = 0.0  # what a pull takes beside (question, answer, a link that must be made), with s_per_token
    deadline_s: float = 5.0  # a request waits no longer for all of its pulls
    max_served: int = 4  # 0: nobody pulls from here
    max_returns: int = 4  # brought home to here at once, and as many from here; 0: none
    returns_answers: bool = True  # a decode worker offers what it has generated to the home of the prompt

    def __post_init__(self) -> None:
        for name in ("s_per_token", "base_s", "max_served", "max_returns"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if not self.deadline_s > 0:
            raise ValueError(f"deadline_s must be above 0, got {self.deadline_s}")


@dataclass(frozen=True, slots=True, kw_only=True)
class HostTierConfig:
    """Host memory as a second tier of the prefix cache.

    Raises ValueError where a limit is below 1 or the cost is negative."""

    num_blocks: int  # KV blocks in host memory
    s_per_token: float  # what the KV of a token takes to come to the device
    max_saving_blocks: int = 64  # on their way to host memory at once; the device cannot evict them meanwhile

    def __post_init__(self) -> None:
        for name in ("num_blocks", "max_saving_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.s_per_token >= 0:
            raise ValueError(f"s_per_token must not be negative, got {self.s_per_token}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Raises ValueError where a limit is below 1 or the two block sizes do not fit."""

    max_model_len: int  # tokens of one request, prompt and output
    max_num_batched_tokens: int = 2048  # of one step
    max_num_seqs: int = 64  # requests running at once
    block_size: int = 64  # tokens of one KV block
    hash_block_size: int = 64  # tokens of one link of the hash chain: one value for the whole cluster
    enable_prefix_caching: bool = True
    pulls: PullConfig | None = None  # None: no prefix is fetched from or for another worker
    host: HostTierConfig | None = None  # None: what the device evicts is gone
    max_migration_tail_blocks: int = 1  # a migrating request is stopped when so many of its blocks are left to send
    kv_nbytes_per_token: int = 0  # by which pulls are reckoned before one has been measured

    def __post_init__(self) -> None:
        for name in (
            "max_model_len",
            "max_num_batched_tokens",
            "max_num_seqs",
            "block_size",
            "hash_block_size",
            "max_migration_tail_blocks",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.block_size % self.hash_block_size:
            raise ValueError(
                f"block_size {self.block_size} is not a multiple of hash_block_size {self.hash_block_size}"
            )
        for name in ("pulls", "host"):
            if getattr(self, name) is not None and not self.enable_prefix_caching:
                raise ValueError(f"{name} must be None without the prefix cache, enable_prefix_caching is False")

    @property
    def links_per_block(self) -> int:
        return self.block_size // self.hash_block_size

    def num_blocks_for(self, num_tokens: int) -> int:
        """KV blocks that hold num_tokens tokens, the partial tail included."""
        return -(-num_tokens // self.block_size)
