"""What routers and workers say to each other, as frozen values. Knows no stubs: protos/codec.py turns these into wire
messages, and pure code (schedulers, router, simulator) uses them as they are."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import StrEnum

from protos.cost_model import CostModel, PullCost
from protos.step_moments import StepMoments

PROTOCOL_VERSION = 1


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class Role(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"


class ServingMode(StrEnum):
    DISAGGREGATED = "disaggregated"
    LOCAL = "local"
    RECOMPUTED = "recomputed"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Validated by the router; workers trust it. Temperature 0 is greedy, top_k 0 is off."""

    temperature: float
    top_p: float
    top_k: int
    seed: int
    max_tokens: int  # of the whole output, earlier attempts included
    stop_token_ids: tuple[int, ...] = ()
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)
    min_tokens: int = 0
    num_logprobs: int | None = None  # None: no log probabilities are asked for


class TransferKind(StrEnum):
    HANDOFF = "handoff"
    PULL = "pull"
    RETURN = "return"
    MIGRATE = "migrate"


class TransferFailure(StrEnum):
    """Why a KV transfer ended without its KV, at the end that counts it: a small closed set, for metrics."""

    REFUSED = "refused"  # the destination took nothing
    NO_LINK = "no_link"  # none was warm when prefill started
    LINK_LOST = "link_lost"  # or the peer's life ended
    TIMEOUT = "timeout"
    CORRUPT = "corrupt"  # a wrong checksum, or what a sound peer would not say
    ABORTED = "aborted"  # by its own worker, or by the peer, who counts the cause


@dataclass(frozen=True, slots=True)
class PeerRef:
    """One life of one worker, and where its internal service listens."""

    worker_id: str
    incarnation: str
    address: str
    role: Role


@dataclass(frozen=True, slots=True)
class Handoff:
    """One planned transfer and the worker at its other end."""

    transfer_id: bytes  # 128 random bits, used once
    peer: PeerRef
    kind: TransferKind = TransferKind.HANDOFF  # or a migration


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One attempt at one request, as a worker receives it."""

    request_id: str
    client_request_id: str
    attempt: int
    token_ids: array[int]  # type code "i": the prompt, then output committed by earlier attempts
    num_prompt_tokens: int
    sampling_params: SamplingParams
    tenant: str = ""
    cache_salt: bytes = b""
    priority: int = 0
    deadline_s: float | None = None  # remaining at the time of sending
    choice_index: int = 0
    handoff_to: Handoff | None = None  # None: the worker that prefills also decodes
    handoff_from: Handoff | None = None  # set at the worker that awaits the KV
    home_worker_ids: tuple[str, ...] = ()  # that its prefix may be pulled from, best first; none: not worth asking
    trace_context: str = ""
    return_worker_id: str = ""  # the home that its prefix is brought to when it is computed; none: it stays

    @property
    def num_committed_tokens(self) -> int:
        """Output tokens that came with the request: the index this attempt resumes at."""
        return len(self.token_ids) - self.num_prompt_tokens


@dataclass(frozen=True, slots=True)
class Abort:
    request_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Retarget:
    request_id: str
    attempt: int
    handoff_to: Handoff | None  # None: decode where the prefill ran, or where it was to migrate from


@dataclass(frozen=True, slots=True)
class Migrate:
    """To the worker that decodes it: go on doing so while its KV moves, then let the other one go on."""

    request_id: str
    attempt: int
    migrate_to: Handoff


@dataclass(frozen=True, slots=True)
class WorkerAccount:
    """What one worker did for one request; sent with its last output for it."""

    num_cached_tokens: int = 0
    queued_s: float = 0.0
    prefill_s: float = 0.0
    num_preemptions: int = 0
    num_kv_bytes: int = 0
    transfer_s: float = 0.0
    transfer_exposed_s: float = 0.0
    num_held_tokens: int = 0
    mode: ServingMode | None = None  # set by the worker that decodes
    mode_reason: str = ""
    num_pulled_tokens: int = 0  # hits that a pull had brought; num_cached_tokens leaves them out
    pull_s: float = 0.0  # part of queued_s: waiting for pulls, in vain or not
    num_failed_pulls: int = 0  # refused, lost or late


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Of one output token, after temperature 1 and before any filter."""

    logprob: float
    top_token_ids: tuple[int, ...] = ()  # most likely first
    top_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenOutput:
    request_id: str
    attempt: int
    index: int  # of token_ids[0] in the whole output
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    account: WorkerAccount | None = None
    error: str = ""
    logprobs: tuple[Logprobs, ...] = ()  # one for each token, where asked for


@dataclass(frozen=True, slots=True)
class HandoffRefused:
    request_id: str
    attempt: int
    reason: str


@dataclass(frozen=True, slots=True)
class MigrationFailed:
    """From the source: it still has the request, and goes on with it unless it has stopped for good; then it waits for
    the router's word (engine/migration_source.py)."""

    request_id: str
    attempt: int
    transfer_id: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class LinkStats:
    """Of one link out of a worker; sums since it first dialled that other one."""

    worker_id: str  # where to
    transport: str  # gloo, shared_memory; empty: not connected
    num_bytes: int = 0
    busy_s: float = 0.0  # with at least one chunk on its way
    num_queued: int = 0  # chunks that wait, or are being gathered
    num_failures: int = 0  # lost, or not made


@dataclass(frozen=True, slots=True)
class TransferStats:
    """Of one worker since its life began; a transfer counts at each of its ends."""

    num_completed: int = 0  # received whole
    num_bytes: int = 0  # received
    num_failed: tuple[tuple[TransferFailure, int], ...] = ()  # by name
    block_nbytes: int = 0  # of one KV block, as it travels
    links: tuple[LinkStats, ...] = ()  # out of this worker
    num_refused_peers: int = 0  # streams of who is no member, or does not know the cluster's secret


class PullOutcome(StrEnum):
    """What came of asking another worker for a prefix."""

    DONE = "done"
    REFUSED = "refused"  # it had nothing of it, or served enough others; or there was no room here
    LOST = "lost"  # on the way
    LATE = "late"  # nobody waited any longer


@dataclass(frozen=True, slots=True)
class PullStats:
    """Of one worker since its life began. A pull that several requests wait for counts once."""

    num_by_outcome: tuple[tuple[PullOutcome, int], ...] = ()  # by name
    num_tokens: int = 0  # that came


@dataclass(frozen=True, slots=True)
class WorkerStats:
    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_cached_blocks: int = 0
    num_held_blocks: int = 0
    num_leased_blocks: int = 0
    ledger_balanced: bool = True
    num_pending_prefill_tokens: int = 0
    prefill_s_per_token: float = 0.0
    warm_links: tuple[str, ...] = ()
    num_steps: int = 0
    transfers: TransferStats = TransferStats()
    num_host_blocks: int = 0  # of host memory, where evicted KV is kept
    step_moments: tuple[StepMoments, ...] = ()  # of the kinds of steps that there were, by name
    prefill_cost: CostModel | None = None  # fitted to its latest steps; None: they do not say. Nothing of decode
    pull_cost: PullCost | None = None  # as measured, set or assumed; None: it does not pull
    pulls: PullStats = PullStats()
    num_cached_host_blocks: int = 0
    num_host_loaded_tokens: int = 0  # brought back from host memory
    max_num_seqs: int = 0  # requests that it runs at once; 0: it does not say


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """One frame from a worker, without its hello."""

    heartbeat: int = 0
    outputs: tuple[TokenOutput, ...] = ()
    refusals: tuple[HandoffRefused, ...] = ()
    stats: WorkerStats | None = None
    failed_migrations: tuple[MigrationFailed, ...] = ()
    is_leaving: bool = False  # it was told to end: it should be drained


@dataclass(frozen=True, slots=True)
class RouterCommand:
    """One frame to a worker, without its hello."""

    heartbeat: int = 0
    membership_version: int = 0
    members: tuple[PeerRef, ...] | None = None  # None: unchanged
    submits: tuple[GenerateRequest, ...] = ()
    aborts: tuple[Abort, ...] = ()
    retargets: tuple[Retarget, ...] = ()
    migrates: tuple[Migrate, ...] = ()


@dataclass(frozen=True, slots=True)
class KVLayout:
    """What two workers must agree on before KV may move between them. Block-major:
    [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim], so one block is one contiguous run."""

    model_fingerprint: str
    dtype: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int  # tokens
    hash_block_size: int  # tokens
    tp_rank: int = 0
    tp_size: int = 1
    itemsize: int = field(default=4)
    numerics: str = ""  # digest of bits that a deterministic worker computes; empty: it is none

    @property
    def block_nbytes(self) -> int:
        return self.num_layers * 2 * self.block_size * self.num_kv_heads * self.head_dim * self.itemsize
