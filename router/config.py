"""The router's settings. Decides nothing; refuses values that could never work."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import Literal, get_args

from protos.cost_model import CostModel
from router.key_depth import KeyDepthConfig
from router.policies.config import PolicyConfig
from router.queue_order import QueueOrderName
from router.relief import ReliefConfig
from router.tenants import TenantConfig

DecodePolicyName = Literal["most_free_blocks", "peak_room", "held_room"]


@dataclass(frozen=True, slots=True)
class RouterConfig:
    listen: str = "127.0.0.1:50051"  # gRPC; port 0: any free one
    http_listen: str = "127.0.0.1:8000"  # the OpenAI API, metrics and the page at /ui; empty: off
    tls_cert: str | None = None  # PEM file with the server's certificate chain, for gRPC and HTTP
    tls_key: str | None = None  # PEM file with its key
    tenants: tuple[TenantConfig, ...] = ()  # none: everybody may call, from this machine only; see tenants_file
    mode: Literal["disaggregated", "colocated"] = "disaggregated"  # colocated: every worker does both, and no KV moves

    # Placement
    ttft_slo_s: float = 5.0  # time to the first token that placement keeps to, and admission refuses for
    tpot_slo_s: float = 0.1  # what the page at /ui and the metrics measure against; placement does not use it
    key_depth_blocks: int = 2  # hash blocks that make the routing key
    adapts_key_depth: bool = False  # prefix by prefix, to how many requests share it; key_depth_blocks is not used then
    key_depth: KeyDepthConfig = field(default_factory=KeyDepthConfig)  # how it adapts
    hash_block_size: int = 64  # tokens; one value for the whole cluster
    block_size: int = 64  # tokens of a KV block
    ring_seed: int = 0  # of the two hash rings
    num_virtual_nodes: int = 64  # points of one worker on each ring
    policy: PolicyConfig = field(default_factory=PolicyConfig)  # where a request is prefilled
    decode_policy: DecodePolicyName = "most_free_blocks"  # most room now, at the predicted peak, or with KV held there
    num_decode_candidates: int = 4  # decode workers with the most room now that peak_room and held_room choose from
    max_local_prefill_tokens: int = 0  # that a decode worker computes at a time in place of handoffs; 0: none
    relieves: bool = False  # running decodes move away from workers that are short of memory
    relief: ReliefConfig = field(default_factory=ReliefConfig)  # when they do, and how many

    # Queues of the router, one for each worker that prefills
    dispatch_tokens: int = 1024  # sent to a worker ahead of its work; null: what two steps compute; 0: no limit
    queue_order: QueueOrderName = "shortest_remaining"  # of requests with the same priority
    estimates_by_order: bool = True  # a wait is what the order puts before a request; off: all that is queued there
    max_queue_wait_s: float = 30.0  # whoever has waited longer goes first, in every order
    rebalances: bool = False  # queued requests move within their home pair when they would miss ttft_slo_s
    cost: CostModel | None = None  # of a worker's steps; null: as each worker measures them
    pull_s_per_token: float | None = None  # to fetch KV from another worker; null: as each says; 0: none is told to
    returns: bool = False  # home_pair: what was computed away from home is brought there, where workers pull

    # Requests in flight
    max_attempts: int = 3  # to run one request; another one follows the loss of a worker
    max_in_flight: int = 1024  # requests; more are refused
    max_requests_per_worker: int = 128  # placed on one worker to decode; more would only wait there, in mid-answer
    refuses_early: bool = True  # a request that would miss ttft_slo_s in the queue
    max_wait_s: float = 30.0  # for a worker to join, where none is up
    max_pending_tokens: int = 4096  # of one request, reported ahead of a gap

    # Workers
    heartbeat_interval_s: float = 0.25  # set lease.heartbeat_interval_s
    lease_s: float = 1.5  # set lease.lease_s
    connect_timeout_s: float = 10.0  # to a worker that joins

    # Clients
    max_output_buffer_tokens: int = 4096  # of one call, waiting for a slow reader
    read_timeout_s: float = 30.0  # for the body of one HTTP request to come
    max_http_connections: int = 4096  # more get a 503 at once
    write_timeout_s: float = 30.0  # for one message to a reader that does not read
    max_message_bytes: int = 8 * 1024 * 1024  # of one gRPC message or HTTP body
    max_request_id_len: int = 128  # characters
    max_stop_strings: int = 16  # of one request
    max_stop_len: int = 256  # characters
    max_n: int = 16  # choices of one call
    max_logprobs: int = 20  # likeliest tokens named beside each output token
    max_tokenizing: int = 64  # long prompts that wait for the tokenizer's threads

    # Diagnosis
    record_events: str | None = None  # file for what the router is fed and chooses, prompts included, to replay it

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            missing = "tls_cert" if self.tls_cert is None else "tls_key"
            raise ValueError(f"tls_cert and tls_key go together: {missing} is not set")
        for name in ("listen", "http_listen"):
            address = getattr(self, name)
            if address and not self.tenants and not _is_loopback(address):
                raise ValueError(
                    f"{name} {address} can be reached from other machines: set tenants_file first, so that callers "
                    "must show a token, or listen on 127.0.0.1"
                )
        for name in (
            *("key_depth_blocks", "hash_block_size", "block_size", "num_virtual_nodes", "max_attempts"),
            "num_decode_candidates",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("dispatch_tokens", "max_queue_wait_s", "pull_s_per_token", "max_local_prefill_tokens"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        for name, names in (
            ("queue_order", get_args(QueueOrderName)),
            ("decode_policy", get_args(DecodePolicyName)),
        ):
            if getattr(self, name) not in names:
                raise ValueError(f"{name} must be one of {', '.join(names)}, got {getattr(self, name)!r}")
        if self.block_size % self.hash_block_size:
            raise ValueError(
                f"block_size must be a multiple of hash_block_size {self.hash_block_size}, got {self.block_size}"
            )
        if self.lease_s <= self.heartbeat_interval_s:
            raise ValueError(
                f"lease_s must exceed heartbeat_interval_s {self.heartbeat_interval_s}, got {self.lease_s}"
            )


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"  # any other name may mean anything
