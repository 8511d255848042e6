"""The router's settings. Decides nothing; refuses values that could never work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class RouterConfig:
    listen: str = "127.0.0.1:50051"  # port 0: any free one
    mode: Literal["disaggregated", "colocated"] = "disaggregated"

    # Placement
    ttft_slo_s: float = 5.0
    key_depth_blocks: int = 2  # hash blocks that make the routing key
    hash_block_size: int = 64  # tokens; one value for the whole cluster
    block_size: int = 64  # tokens of a KV block
    ring_seed: int = 0
    num_virtual_nodes: int = 64  # points of one worker on each ring

    # Requests in flight
    max_attempts: int = 3
    max_in_flight: int = 1024
    max_requests_per_worker: int = 128  # placed on one worker to decode; more would only wait there, in mid-answer
    refuses_early: bool = True  # a request that would miss ttft_slo_s in the queue
    max_wait_s: float = 30.0  # for a worker to join, where none is up
    max_pending_tokens: int = 4096  # of one request, reported ahead of a gap

    # Workers
    heartbeat_interval_s: float = 0.25
    lease_s: float = 1.5
    connect_timeout_s: float = 10.0

    # Clients
    max_output_buffer_tokens: int = 4096  # of one call, waiting for a slow reader
    write_timeout_s: float = 30.0  # for one message to a reader that does not read
    max_message_bytes: int = 8 * 1024 * 1024
    max_request_id_len: int = 128
    max_stop_strings: int = 16
    max_stop_len: int = 256  # characters
    max_n: int = 16  # choices of one call
    max_logprobs: int = 20  # likeliest tokens named beside each output token
    max_tokenizing: int = 64  # long prompts that wait for the tokenizer's threads

    def __post_init__(self) -> None:
        for name in ("key_depth_blocks", "hash_block_size", "block_size", "num_virtual_nodes", "max_attempts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.block_size % self.hash_block_size:
            raise ValueError(
                f"block_size must be a multiple of hash_block_size {self.hash_block_size}, got {self.block_size}"
            )
        if self.lease_s <= self.heartbeat_interval_s:
            raise ValueError(
                f"lease_s must exceed heartbeat_interval_s {self.heartbeat_interval_s}, got {self.lease_s}"
            )
