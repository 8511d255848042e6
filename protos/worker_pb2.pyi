from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PeerFrame(_message.Message):
    __slots__ = ("body",)
    BODY_FIELD_NUMBER: _ClassVar[int]
    body: bytes
    def __init__(self, body: _Optional[bytes] = ...) -> None: ...

class PeerRef(_message.Message):
    __slots__ = ("worker_id", "incarnation", "address", "role")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: str
    address: str
    role: str
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., address: _Optional[str] = ..., role: _Optional[str] = ...) -> None: ...

class HandoffRef(_message.Message):
    __slots__ = ("transfer_id", "peer", "kind")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    peer: PeerRef
    kind: str
    def __init__(self, transfer_id: _Optional[bytes] = ..., peer: _Optional[_Union[PeerRef, _Mapping]] = ..., kind: _Optional[str] = ...) -> None: ...

class WorkerSamplingParams(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "seed", "max_tokens", "stop_token_ids", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "min_tokens", "num_logprobs")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    seed: int
    max_tokens: int
    stop_token_ids: bytes
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: _containers.ScalarMap[int, float]
    min_tokens: int
    num_logprobs: int
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., seed: _Optional[int] = ..., max_tokens: _Optional[int] = ..., stop_token_ids: _Optional[bytes] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., min_tokens: _Optional[int] = ..., num_logprobs: _Optional[int] = ...) -> None: ...

class Logprobs(_message.Message):
    __slots__ = ("logprob", "top_token_ids", "top_logprobs")
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    logprob: float
    top_token_ids: bytes
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, logprob: _Optional[float] = ..., top_token_ids: _Optional[bytes] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("request_id", "client_request_id", "tenant", "cache_salt", "attempt", "token_ids", "num_prompt_tokens", "sampling_params", "priority", "deadline_s", "choice_index", "handoff_to", "handoff_from", "home_worker_ids", "trace_context", "return_worker_id")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CLIENT_REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_PARAMS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    CHOICE_INDEX_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_TO_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_FROM_FIELD_NUMBER: _ClassVar[int]
    HOME_WORKER_IDS_FIELD_NUMBER: _ClassVar[int]
    TRACE_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    RETURN_WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    client_request_id: str
    tenant: str
    cache_salt: bytes
    attempt: int
    token_ids: bytes
    num_prompt_tokens: int
    sampling_params: WorkerSamplingParams
    priority: int
    deadline_s: float
    choice_index: int
    handoff_to: HandoffRef
    handoff_from: HandoffRef
    home_worker_ids: _containers.RepeatedScalarFieldContainer[str]
    trace_context: str
    return_worker_id: str
    def __init__(self, request_id: _Optional[str] = ..., client_request_id: _Optional[str] = ..., tenant: _Optional[str] = ..., cache_salt: _Optional[bytes] = ..., attempt: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., num_prompt_tokens: _Optional[int] = ..., sampling_params: _Optional[_Union[WorkerSamplingParams, _Mapping]] = ..., priority: _Optional[int] = ..., deadline_s: _Optional[float] = ..., choice_index: _Optional[int] = ..., handoff_to: _Optional[_Union[HandoffRef, _Mapping]] = ..., handoff_from: _Optional[_Union[HandoffRef, _Mapping]] = ..., home_worker_ids: _Optional[_Iterable[str]] = ..., trace_context: _Optional[str] = ..., return_worker_id: _Optional[str] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("request_id", "attempt")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ...) -> None: ...

class Retarget(_message.Message):
    __slots__ = ("request_id", "attempt", "handoff_to")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_TO_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    handoff_to: HandoffRef
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., handoff_to: _Optional[_Union[HandoffRef, _Mapping]] = ...) -> None: ...

class Migrate(_message.Message):
    __slots__ = ("request_id", "attempt", "migrate_to")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    MIGRATE_TO_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    migrate_to: HandoffRef
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., migrate_to: _Optional[_Union[HandoffRef, _Mapping]] = ...) -> None: ...

class RouterHello(_message.Message):
    __slots__ = ("protocol_version", "router_id", "router_incarnation", "worker_incarnation")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    ROUTER_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    WORKER_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    router_id: str
    router_incarnation: str
    worker_incarnation: str
    def __init__(self, protocol_version: _Optional[int] = ..., router_id: _Optional[str] = ..., router_incarnation: _Optional[str] = ..., worker_incarnation: _Optional[str] = ...) -> None: ...

class Membership(_message.Message):
    __slots__ = ("version", "workers")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    version: int
    workers: _containers.RepeatedCompositeFieldContainer[PeerRef]
    def __init__(self, version: _Optional[int] = ..., workers: _Optional[_Iterable[_Union[PeerRef, _Mapping]]] = ...) -> None: ...

class RouterFrame(_message.Message):
    __slots__ = ("hello", "heartbeat", "membership", "submits", "aborts", "retargets", "migrates")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    MEMBERSHIP_FIELD_NUMBER: _ClassVar[int]
    SUBMITS_FIELD_NUMBER: _ClassVar[int]
    ABORTS_FIELD_NUMBER: _ClassVar[int]
    RETARGETS_FIELD_NUMBER: _ClassVar[int]
    MIGRATES_FIELD_NUMBER: _ClassVar[int]
    hello: RouterHello
    heartbeat: int
    membership: Membership
    submits: _containers.RepeatedCompositeFieldContainer[Submit]
    aborts: _containers.RepeatedCompositeFieldContainer[Abort]
    retargets: _containers.RepeatedCompositeFieldContainer[Retarget]
    migrates: _containers.RepeatedCompositeFieldContainer[Migrate]
    def __init__(self, hello: _Optional[_Union[RouterHello, _Mapping]] = ..., heartbeat: _Optional[int] = ..., membership: _Optional[_Union[Membership, _Mapping]] = ..., submits: _Optional[_Iterable[_Union[Submit, _Mapping]]] = ..., aborts: _Optional[_Iterable[_Union[Abort, _Mapping]]] = ..., retargets: _Optional[_Iterable[_Union[Retarget, _Mapping]]] = ..., migrates: _Optional[_Iterable[_Union[Migrate, _Mapping]]] = ...) -> None: ...

class WorkerAccount(_message.Message):
    __slots__ = ("num_cached_tokens", "queued_s", "prefill_s", "num_preemptions", "num_kv_bytes", "transfer_s", "transfer_exposed_s", "num_held_tokens", "mode", "mode_reason", "num_pulled_tokens", "pull_s", "num_failed_pulls")
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_S_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_EXPOSED_S_FIELD_NUMBER: _ClassVar[int]
    NUM_HELD_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    MODE_REASON_FIELD_NUMBER: _ClassVar[int]
    NUM_PULLED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PULL_S_FIELD_NUMBER: _ClassVar[int]
    NUM_FAILED_PULLS_FIELD_NUMBER: _ClassVar[int]
    num_cached_tokens: int
    queued_s: float
    prefill_s: float
    num_preemptions: int
    num_kv_bytes: int
    transfer_s: float
    transfer_exposed_s: float
    num_held_tokens: int
    mode: str
    mode_reason: str
    num_pulled_tokens: int
    pull_s: float
    num_failed_pulls: int
    def __init__(self, num_cached_tokens: _Optional[int] = ..., queued_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., num_preemptions: _Optional[int] = ..., num_kv_bytes: _Optional[int] = ..., transfer_s: _Optional[float] = ..., transfer_exposed_s: _Optional[float] = ..., num_held_tokens: _Optional[int] = ..., mode: _Optional[str] = ..., mode_reason: _Optional[str] = ..., num_pulled_tokens: _Optional[int] = ..., pull_s: _Optional[float] = ..., num_failed_pulls: _Optional[int] = ...) -> None: ...

class TokenOutput(_message.Message):
    __slots__ = ("request_id", "attempt", "index", "token_ids", "finish_reason", "account", "error", "logprobs")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    index: int
    token_ids: bytes
    finish_reason: str
    account: WorkerAccount
    error: str
    logprobs: _containers.RepeatedCompositeFieldContainer[Logprobs]
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., index: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., finish_reason: _Optional[str] = ..., account: _Optional[_Union[WorkerAccount, _Mapping]] = ..., error: _Optional[str] = ..., logprobs: _Optional[_Iterable[_Union[Logprobs, _Mapping]]] = ...) -> None: ...

class HandoffRefused(_message.Message):
    __slots__ = ("request_id", "attempt", "reason")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    reason: str
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class MigrationFailed(_message.Message):
    __slots__ = ("request_id", "attempt", "transfer_id", "reason")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    transfer_id: bytes
    reason: str
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., transfer_id: _Optional[bytes] = ..., reason: _Optional[str] = ...) -> None: ...

class WorkerHello(_message.Message):
    __slots__ = ("protocol_version", "worker_id", "incarnation", "role", "model_fingerprint", "pid")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    worker_id: str
    incarnation: str
    role: str
    model_fingerprint: str
    pid: int
    def __init__(self, protocol_version: _Optional[int] = ..., worker_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., role: _Optional[str] = ..., model_fingerprint: _Optional[str] = ..., pid: _Optional[int] = ...) -> None: ...

class TransferStats(_message.Message):
    __slots__ = ("num_completed", "num_bytes", "num_failed", "block_nbytes", "links", "num_refused_peers")
    class NumFailedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    NUM_COMPLETED_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_FAILED_FIELD_NUMBER: _ClassVar[int]
    BLOCK_NBYTES_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    NUM_REFUSED_PEERS_FIELD_NUMBER: _ClassVar[int]
    num_completed: int
    num_bytes: int
    num_failed: _containers.ScalarMap[str, int]
    block_nbytes: int
    links: _containers.RepeatedCompositeFieldContainer[LinkStats]
    num_refused_peers: int
    def __init__(self, num_completed: _Optional[int] = ..., num_bytes: _Optional[int] = ..., num_failed: _Optional[_Mapping[str, int]] = ..., block_nbytes: _Optional[int] = ..., links: _Optional[_Iterable[_Union[LinkStats, _Mapping]]] = ..., num_refused_peers: _Optional[int] = ...) -> None: ...

class LinkStats(_message.Message):
    __slots__ = ("worker_id", "transport", "num_bytes", "busy_s", "num_queued", "num_failures")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    BUSY_S_FIELD_NUMBER: _ClassVar[int]
    NUM_QUEUED_FIELD_NUMBER: _ClassVar[int]
    NUM_FAILURES_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    transport: str
    num_bytes: int
    busy_s: float
    num_queued: int
    num_failures: int
    def __init__(self, worker_id: _Optional[str] = ..., transport: _Optional[str] = ..., num_bytes: _Optional[int] = ..., busy_s: _Optional[float] = ..., num_queued: _Optional[int] = ..., num_failures: _Optional[int] = ...) -> None: ...

class StepMoments(_message.Message):
    __slots__ = ("kind", "sums")
    KIND_FIELD_NUMBER: _ClassVar[int]
    SUMS_FIELD_NUMBER: _ClassVar[int]
    kind: str
    sums: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, kind: _Optional[str] = ..., sums: _Optional[_Iterable[float]] = ...) -> None: ...

class PrefillCost(_message.Message):
    __slots__ = ("base_s", "s_per_token", "s_per_token_pair")
    BASE_S_FIELD_NUMBER: _ClassVar[int]
    S_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    S_PER_TOKEN_PAIR_FIELD_NUMBER: _ClassVar[int]
    base_s: float
    s_per_token: float
    s_per_token_pair: float
    def __init__(self, base_s: _Optional[float] = ..., s_per_token: _Optional[float] = ..., s_per_token_pair: _Optional[float] = ...) -> None: ...

class PullCost(_message.Message):
    __slots__ = ("s_per_token", "base_s")
    S_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    BASE_S_FIELD_NUMBER: _ClassVar[int]
    s_per_token: float
    base_s: float
    def __init__(self, s_per_token: _Optional[float] = ..., base_s: _Optional[float] = ...) -> None: ...

class PullStats(_message.Message):
    __slots__ = ("num_by_outcome", "num_tokens")
    class NumByOutcomeEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    NUM_BY_OUTCOME_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    num_by_outcome: _containers.ScalarMap[str, int]
    num_tokens: int
    def __init__(self, num_by_outcome: _Optional[_Mapping[str, int]] = ..., num_tokens: _Optional[int] = ...) -> None: ...

class WorkerStats(_message.Message):
    __slots__ = ("num_running", "num_waiting", "num_blocks", "num_free_blocks", "num_cached_blocks", "num_held_blocks", "num_leased_blocks", "ledger_balanced", "num_pending_prefill_tokens", "prefill_s_per_token", "warm_links", "num_steps", "transfers", "num_host_blocks", "num_cached_host_blocks", "num_host_loaded_tokens", "step_moments", "prefill_cost", "pull_cost", "pulls", "max_num_seqs")
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_HELD_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_LEASED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LEDGER_BALANCED_FIELD_NUMBER: _ClassVar[int]
    NUM_PENDING_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    WARM_LINKS_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    NUM_HOST_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_HOST_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_HOST_LOADED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STEP_MOMENTS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_COST_FIELD_NUMBER: _ClassVar[int]
    PULL_COST_FIELD_NUMBER: _ClassVar[int]
    PULLS_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    num_cached_blocks: int
    num_held_blocks: int
    num_leased_blocks: int
    ledger_balanced: bool
    num_pending_prefill_tokens: int
    prefill_s_per_token: float
    warm_links: _containers.RepeatedScalarFieldContainer[str]
    num_steps: int
    transfers: TransferStats
    num_host_blocks: int
    num_cached_host_blocks: int
    num_host_loaded_tokens: int
    step_moments: _containers.RepeatedCompositeFieldContainer[StepMoments]
    prefill_cost: PrefillCost
    pull_cost: PullCost
    pulls: PullStats
    max_num_seqs: int
    def __init__(self, num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., num_blocks: _Optional[int] = ..., num_free_blocks: _Optional[int] = ..., num_cached_blocks: _Optional[int] = ..., num_held_blocks: _Optional[int] = ..., num_leased_blocks: _Optional[int] = ..., ledger_balanced: _Optional[bool] = ..., num_pending_prefill_tokens: _Optional[int] = ..., prefill_s_per_token: _Optional[float] = ..., warm_links: _Optional[_Iterable[str]] = ..., num_steps: _Optional[int] = ..., transfers: _Optional[_Union[TransferStats, _Mapping]] = ..., num_host_blocks: _Optional[int] = ..., num_cached_host_blocks: _Optional[int] = ..., num_host_loaded_tokens: _Optional[int] = ..., step_moments: _Optional[_Iterable[_Union[StepMoments, _Mapping]]] = ..., prefill_cost: _Optional[_Union[PrefillCost, _Mapping]] = ..., pull_cost: _Optional[_Union[PullCost, _Mapping]] = ..., pulls: _Optional[_Union[PullStats, _Mapping]] = ..., max_num_seqs: _Optional[int] = ...) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LeaveResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerFrame(_message.Message):
    __slots__ = ("hello", "heartbeat", "outputs", "refusals", "stats", "failed_migrations", "is_leaving")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    REFUSALS_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    FAILED_MIGRATIONS_FIELD_NUMBER: _ClassVar[int]
    IS_LEAVING_FIELD_NUMBER: _ClassVar[int]
    hello: WorkerHello
    heartbeat: int
    outputs: _containers.RepeatedCompositeFieldContainer[TokenOutput]
    refusals: _containers.RepeatedCompositeFieldContainer[HandoffRefused]
    stats: WorkerStats
    failed_migrations: _containers.RepeatedCompositeFieldContainer[MigrationFailed]
    is_leaving: bool
    def __init__(self, hello: _Optional[_Union[WorkerHello, _Mapping]] = ..., heartbeat: _Optional[int] = ..., outputs: _Optional[_Iterable[_Union[TokenOutput, _Mapping]]] = ..., refusals: _Optional[_Iterable[_Union[HandoffRefused, _Mapping]]] = ..., stats: _Optional[_Union[WorkerStats, _Mapping]] = ..., failed_migrations: _Optional[_Iterable[_Union[MigrationFailed, _Mapping]]] = ..., is_leaving: _Optional[bool] = ...) -> None: ...
