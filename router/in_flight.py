"""A request while the router answers for it, and its current attempt. Mutable records; router.py decides."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from protos.types import GenerateRequest, Handoff, ServingMode, WorkerAccount
from router.account import RequestAccount
from router.cluster_view import WorkerView
from router.commit_log import CommitLog
from router.placement import Plan


@dataclass(slots=True)
class Migration:
    """Of a running decode, from the worker that the plan names."""

    transfer_id: bytes
    to: WorkerView
    first_index: int  # so many tokens were committed when it began: what `to` says of earlier ones is from another life
    reason: str
    reported_index: int | None = None  # where the tokens of `to` begin, as far as they have come


@dataclass(slots=True)
class Attempt:
    """One try at the rest of a request: tokens from output index `first_index` on."""

    number: int  # the first attempt is 1
    first_index: int
    plan: Plan
    transfer_id: bytes
    reported: set[str] = field(default_factory=set)  # workers that have sent tokens
    refused: set[str] = field(default_factory=set)  # decode workers that had no room
    accounts: dict[tuple[str, int], WorkerAccount] = field(default_factory=dict)  # by worker and life
    queued_s: float = 0.0  # here, before it was sent
    migration: Migration | None = None  # under way
    num_migrations: int = 0
    migration_pause_s: float = 0.0
    first_decode: WorkerView | None = None  # who decoded before the first migration
    num_lives: int = 0  # begun by migrations
    lives: dict[str, int] = field(default_factory=dict)  # the latest one of each worker that it migrated to
    left_at: dict[str, float] = field(default_factory=dict)  # when a worker was told to forget it

    @property
    def workers(self) -> tuple[WorkerView, ...]:
        """Those that may hold state of this attempt and may report its tokens, each once."""
        to = self.migration.to if self.migration else None
        views = (self.plan.prefill, self.plan.decode, to)
        return tuple(dict.fromkeys(view for view in views if view is not None))

    def needs(self, view: WorkerView, num_committed_tokens: int) -> bool:
        """Whether the attempt is lost with this worker. The prefill worker of a handoff can be spared once the decode
        worker, which then owns the KV, has reported and the prefill worker's own token has come."""
        if view is self.plan.decoding_worker:
            return True
        return view is self.plan.prefill and not (
            self.plan.decoding_worker.worker_id in self.reported and num_committed_tokens > self.first_index
        )

    def involves(self, view: WorkerView) -> bool:
        """Whether it is one of `workers`: asked for every report."""
        is_to = self.migration is not None and self.migration.to is view
        return is_to or view is self.plan.prefill or view is self.plan.decode

    def begin_life(self, view: WorkerView) -> None:
        """A migration to a worker begins, maybe not the first one: what it has said is of another life."""
        self.num_lives += 1
        self.lives[view.worker_id] = self.num_lives
        self.reported.discard(view.worker_id)

    def note_account(self, view: WorkerView, account: WorkerAccount) -> None:
        self.accounts[view.worker_id, self.lives.get(view.worker_id, 0)] = account

    def account_of(self, view: WorkerView) -> WorkerAccount:
        """Of its first life, which no migration began."""
        return self.accounts.get((view.worker_id, 0), WorkerAccount())

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
        plan = self.attempt.plan if self.attempt else None
        return tuple(view.worker_id for view in (plan.prefill, plan.decode) if view) if plan else ()

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

    def submit_migrating(self, attempt: Attempt, handoff: Handoff, now: float) -> GenerateRequest:
        """What the destination of a migration receives: with all tokens that are committed, since a commit has the
        latest ones only. What it generates is brought to where the prompt is at home."""
        plan = attempt.plan
        return replace(
            self.submit(attempt, now),
            token_ids=self.template.token_ids + self.log.token_ids,
            handoff_from=handoff,
            home_worker_ids=(),
            return_worker_id=(plan.returns_to or plan.prefill).worker_id,
        )

    def account(self, now: float) -> RequestAccount:
        plan = self.attempt.plan if self.attempt else None
        accounts = self.attempt.accounts.values() if self.attempt else ()
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
            num_kv_bytes=sum(each.num_kv_bytes for each in accounts),
            transfer_s=sum(each.transfer_s for each in accounts),
            transfer_exposed_s=sum(each.transfer_exposed_s for each in accounts),
            num_preemptions=sum(each.num_preemptions for each in accounts),
            num_moves=self.num_moves,
            num_migrations=self.attempt.num_migrations if self.attempt else 0,
            migration_pause_s=self.attempt.migration_pause_s if self.attempt else 0.0,
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
        return self.attempt.account_of(self.attempt.plan.prefill)

    def _decode_account(self) -> WorkerAccount:
        if self.attempt is None:
            return WorkerAccount()
        return self.attempt.account_of(self.attempt.first_decode or self.attempt.plan.decoding_worker)

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
