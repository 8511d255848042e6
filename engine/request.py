"""The mutable life of one request on one worker. Knows neither blocks nor queues, only its tokens and its counts."""

from __future__ import annotations

from array import array
from enum import StrEnum

from protos.types import FinishReason, GenerateRequest, Handoff, ServingMode, WorkerAccount


class RequestStatus(StrEnum):
    WAITING = "waiting"
    WAITING_FOR_REMOTE_KV = "waiting_for_remote_kv"
    RUNNING = "running"
    PREEMPTED = "preempted"
    HANDING_OFF = "handing_off"  # prefilled here, decodes elsewhere: not scheduled, may still come back
    FINISHED = "finished"


class Request:
    """Invariant: 0 <= num_computed_tokens < num_tokens while it is not finished: the last token has no KV yet.

    Compared and hashed by identity: two lives of one request_id may meet while a step is under way."""

    def __init__(self, generate: GenerateRequest, arrival: int, now: float) -> None:
        """arrival: its place in the order in which requests came to this worker."""
        self.request_id = generate.request_id
        self.attempt = generate.attempt
        self.arrival = arrival
        self.priority = generate.priority  # higher goes first
        self.cache_salt = generate.cache_salt
        self.sampling_params = generate.sampling_params
        self.token_ids = array("i", generate.token_ids)  # own copy: prompt, committed output, then what is sampled
        self.num_prompt_tokens = generate.num_prompt_tokens
        self.num_given_tokens = len(generate.token_ids)
        self.num_committed_tokens = generate.num_committed_tokens

        self.status = RequestStatus.WAITING
        self.finish_reason: FinishReason | None = None
        self.waiting_order = (True, 0, True, 0)  # the scheduler's, fixed when it is queued
        self.num_computed_tokens = 0
        self.num_hashed_blocks = 0  # first blocks of its table that the prefix cache has been told of
        self.hash_links: list[bytes] = []  # of its first full hash blocks; grows with token_ids

        self.handoff_to: Handoff | None = generate.handoff_to
        self.handoff_from: Handoff | None = generate.handoff_from
        self.opened_transfer_ids: set[bytes] = set()  # source: each once; after a refusal the router names another
        self.open_transfer_id: bytes | None = None  # source: the transfer that takes its blocks now
        self.num_sent_blocks = 0  # source: handed to SendBlocks under open_transfer_id

        self.unasked_home_ids = list(generate.home_worker_ids)  # homes that it may still pull from
        self.return_worker_id = generate.return_worker_id
        self.pulling_since: float | None = None  # its first pull, or load from host memory
        self.has_lost_load = False  # from host memory: what is there is computed then
        self.pulled_blocks: set[int] = set()  # places in its table whose blocks a pull brought into the cache
        self.borrowed_blocks: list[int] = []  # those of them that the home keeps, where others will look for them

        self.queued_at = now
        self.first_scheduled_at: float | None = None
        self.first_token_at: float | None = None
        self.num_cached_tokens = 0  # prefix hits when first scheduled, those that were pulled left out
        self.num_pulled_tokens = 0
        self.num_failed_pulls = 0
        self.pull_s = 0.0
        self.num_preemptions = 0
        self.num_kv_bytes = 0
        self.transfer_s = 0.0
        self.transfer_exposed_s = 0.0
        self.num_held_tokens = 0
        self.mode = ServingMode.LOCAL
        self.mode_reason = ""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_pending_prefill_tokens(self) -> int:
        """Of the tokens it came with, those not computed yet."""
        return max(0, self.num_given_tokens - self.num_computed_tokens)

    def start(self, num_hit_blocks: int, block_size: int, now: float) -> None:
        """It runs for the first time, from this many cached blocks."""
        num_pulled_blocks = sum(place < num_hit_blocks for place in self.pulled_blocks)
        self.first_scheduled_at = now
        self.num_pulled_tokens = num_pulled_blocks * block_size
        self.num_cached_tokens = (num_hit_blocks - num_pulled_blocks) * block_size
        if self.return_worker_id:
            self.borrowed_blocks = sorted(place for place in self.pulled_blocks if place < num_hit_blocks)
        self.pulled_blocks.clear()

    def append(self, sampled: tuple[int, ...], max_model_len: int, now: float) -> tuple[int, ...]:
        """Take sampled tokens up to the one that ends the request, and return those taken."""
        if self.first_token_at is None:
            self.first_token_at = now
        for num_taken, token_id in enumerate(sampled, start=1):
            self.token_ids.append(token_id)
            self.finish_reason = self._finish_reason_after(token_id, max_model_len)
            if self.finish_reason is not None:
                return sampled[:num_taken]
        return sampled

    def _finish_reason_after(self, token_id: int, max_model_len: int) -> FinishReason | None:
        if token_id in self.sampling_params.stop_token_ids:
            return FinishReason.STOP
        if self.num_output_tokens >= self.sampling_params.max_tokens or self.num_tokens >= max_model_len:
            return FinishReason.LENGTH
        return None

    def account(self, decoded_here: bool) -> WorkerAccount:
        """What this worker did for it. Where the KV came from another worker, that one accounts for the prefill."""
        prefilled_here = self.mode is not ServingMode.DISAGGREGATED
        assert self.first_scheduled_at is not None and self.first_token_at is not None
        return WorkerAccount(
            num_cached_tokens=self.num_cached_tokens if prefilled_here else 0,
            queued_s=self.first_scheduled_at - self.queued_at if prefilled_here else 0.0,
            prefill_s=self.first_token_at - self.first_scheduled_at if prefilled_here else 0.0,
            num_preemptions=self.num_preemptions,
            num_kv_bytes=self.num_kv_bytes,
            transfer_s=self.transfer_s,
            transfer_exposed_s=self.transfer_exposed_s,
            num_held_tokens=self.num_held_tokens,
            mode=self.mode if decoded_here else None,
            mode_reason=self.mode_reason if decoded_here else "",
            num_pulled_tokens=self.num_pulled_tokens if prefilled_here else 0,
            pull_s=self.pull_s,
            num_failed_pulls=self.num_failed_pulls,
        )
