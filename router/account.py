"""What one request cost and where it ran, for the reply and the log line. Plain values."""

from __future__ import annotations

from dataclasses import dataclass

from protos.types import ServingMode


@dataclass(frozen=True, slots=True)
class RequestAccount:
    prefill_worker: str
    prefill_reason: str
    decode_worker: str
    decode_reason: str
    mode: ServingMode | None  # None: it ended before any worker had it
    mode_reason: str
    num_attempts: int
    num_predicted_cached_tokens: int
    num_predicted_pulled_tokens: int
    num_cached_tokens: int  # without those that were pulled
    num_pulled_tokens: int
    num_failed_pulls: int
    num_held_tokens: int
    num_kv_bytes: int
    transfer_s: float
    transfer_exposed_s: float
    num_preemptions: int
    num_moves: int  # from one of the router's queues to another
    num_migrations: int  # from one decode worker to another
    migration_pause_s: float  # of all of them: from the last token of the one to the first token of the other
    queued_s: float  # at the router and on the worker that prefills
    pull_s: float  # of it, waiting for pulls, in vain or not
    prefill_s: float
    ttft_s: float
    tpot_s: float
    e2e_s: float
