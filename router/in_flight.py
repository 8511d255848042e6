"""A request while the router answers for it, and its current attempt. Mutable records; router.py decides."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from protos.types import GenerateRequest, Handoff, ServingMode, WorkerAccount
from router.account import RequestAccount
from router.cluster_view import WorkerView
from router.commit_log import CommitLog
from router.placement import Plan


@dataclass(slots=True)
class Attempt:
    """One try at the rest of a request: tokens from output index `first_index` on."""

    number: int  # the first attempt is 1
    first_index: int
    plan: Plan
    transfer_id: bytes
    reported: set[str] = field(default_factory=set)  # workers that have sent tokens
    refused: set[str] = field(default_factory=set)  # decode workers that had no room
    accounts: dict[str, WorkerAccount] = field(default_factory=dict)
    queued_s: float = 0.0  # here, before it was sent

    @property
    def workers(self) -> tuple[WorkerView, ...]:
        """Those that may hold state of this attempt and may report its tokens."""
        return (self.plan.prefill,) if self.plan.decode is None else (self.plan.prefill, self.plan.decode)

    def needs(self, view: WorkerView, num_committed_tokens: int) -> bool:
        """Whether the attempt is lost with this worker. The prefill worker of a handoff can be spared once the decode
        worker, which then owns the KV, has reported and the prefill worker's own token has come."""
        if view is self.plan.decoding_worker:
            return True
        return view is self.plan.prefill and not (
            self.plan.decoding_worker.worker_id in self.reported and num_committed_tokens > self.first_index
        )

    def handoff_to(self) -> Handoff | None:
        return None if self.plan.decode is None else Handoff(self.transfer_id, self.plan.decode.ref)


@dataclass(slots=True)
class InFlight:
    """Invariant: it has an attempt, or is queued, or waits for a worker to join since `waiting_since`: one of these."""

    template: GenerateRequest  # attempt 0: the prompt, no handoff
    links: tuple[bytes, ...]
    log: CommitLog
    arrived_at: float
    beside: tuple[str, ...] = ()  # where its first attempt goes
    attempt: Attempt | None = None
    queued: Plan | None = None  # it is in the queue of the worker that this plan says prefills
    ready_since: float = 0.0  # since it came, or its last attempt failed, it may be sent
    waiting_since: float = 0.0
    num_attempts: int = 0
    num_moves: int = 0  # from one queue to another
    last_failure: str = ""  # why the last attempt failed
    first_token_at: float | None = None
    last_token_at: float = 0.0

    @property
    def request_id(self) -> str:
        return self.template.request_id

    @property
    def worker_ids(self) -> tuple[str, ...]:
        """Where its attempt runs: prefill, then decode."""
        return tuple(view.worker_id for view in self.attempt.workers) if self.attempt else ()

    @property
    def waits_for_a_worker(self) -> bool:
        """To join: none is up."""
        return self.attempt is None and self.queued is None

    @property
    def num_tokens(self) -> int:
        return self.template.num_prompt_tokens + len(self.log)

    @property
    def num_generated_tokens(self) -> int:
        return len(self.log)

    @property
    def num_remaining_tokens(self) -> int:
        return self.template.sampling_params.max_tokens - len(self.log)

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that the prefill worker had or has fetched from another, as far as it has said so."""
        account = self._prefill_account()
        return account.num_cached_tokens + account.num_pulled_tokens

    def note_tokens(self, now: float) -> None:
        if self.first_token_at is None:
            self.first_token_at = now
            if self.attempt and self.attempt.plan.returns_to:  # its KV is on its way there from now on
                self.attempt.plan.returns_to.prefixes.note(self.links)
        self.last_token_at = now

    def submit(self, attempt: Attempt, now: float) -> GenerateRequest:
        """What a worker receives for this attempt, without its end of a handoff. The tokens are those the attempt began
        with, also for a decode worker that joins late: both ends of a handoff must count alike."""
        deadline_s = self.template.deadline_s
        return replace(
            self.template,
            attempt=attempt.number,
            token_ids=self.template.token_ids + self.log.token_ids[: attempt.first_index],
            deadline_s=None if deadline_s is None else max(0.0, deadline_s - (now - self.arrived_at)),
            home_worker_ids=attempt.plan.pull_worker_ids,
            return_worker_id=attempt.plan.returns_to.worker_id if attempt.plan.returns_to else "",
        )

    def account(self, now: float) -> RequestAccount:
        plan = self.attempt.plan if self.attempt else None
        prefill, decode = self._prefill_account(), self._decode_account()
        mode, mode_reason = self._mode(decode)
        num_tokens = len(self.log) - self.log.num_given_tokens
        first_token_at = self.first_token_at or self.arrived_at
        return RequestAccount(
            prefill_worker=plan.prefill.worker_id if plan else "",
            prefill_reason=plan.prefill_reason if plan else "",
            decode_worker=plan.decoding_worker.worker_id if plan else "",
            decode_reason=plan.decode_reason if plan else "",
            mode=mode,
            mode_reason=mode_reason,
            num_attempts=self.num_attempts,
            num_predicted_cached_tokens=plan.num_predicted_cached_tokens if plan else 0,
            num_predicted_pulled_tokens=plan.num_predicted_pulled_tokens if plan else 0,
            num_cached_tokens=prefill.num_cached_tokens,
            num_pulled_tokens=prefill.num_pulled_tokens,
            num_failed_pulls=prefill.num_failed_pulls,
            num_held_tokens=decode.num_held_tokens,
            num_kv_bytes=decode.num_kv_bytes,
            transfer_s=decode.transfer_s,
            transfer_exposed_s=decode.transfer_exposed_s,
            num_preemptions=sum(a.num_preemptions for a in self.attempt.accounts.values()) if self.attempt else 0,
            num_moves=self.num_moves,
            queued_s=prefill.queued_s + (self.attempt.queued_s if self.attempt else 0.0),
            pull_s=prefill.pull_s,
            prefill_s=prefill.prefill_s,
            ttft_s=first_token_at - self.arrived_at,
            tpot_s=(self.last_token_at - first_token_at) / (num_tokens - 1) if num_tokens > 1 else 0.0,
            e2e_s=now - self.arrived_at,
        )

    def _prefill_account(self) -> WorkerAccount:
        if self.attempt is None:
            return WorkerAccount()
        return self.attempt.accounts.get(self.attempt.plan.prefill.worker_id, WorkerAccount())

    def _decode_account(self) -> WorkerAccount:
        if self.attempt is None:
            return WorkerAccount()
        return self.attempt.accounts.get(self.attempt.plan.decoding_worker.worker_id, WorkerAccount())

    def _mode(self, decode: WorkerAccount) -> tuple[ServingMode | None, str]:
        """As the worker that decoded says; where it ended before saying so, as far as the router knows."""
        if self.attempt is None:
            return None, ""
        plan = self.attempt.plan
        if decode.mode is not None:
            return decode.mode, decode.mode_reason or ("" if plan.decode else plan.decode_reason)
        if plan.decode is None:
            return ServingMode.LOCAL, plan.decode_reason
        if plan.decode.worker_id in self.attempt.reported:
            return ServingMode.DISAGGREGATED, ""
        return ServingMode.LOCAL, "the request ended before its KV was handed over"
