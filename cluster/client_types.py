"""What users of the client write and read: plain values, no messages. Field names are those of the public contract,
protos/inference.proto, which also says what each one means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from protos.types import FinishReason, Logprobs, ServingMode


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat. Roles: system, user, assistant, tool."""

    role: str
    content: str


Prompt = str | Sequence[int] | Sequence[Message]  # text, token ids, or a chat


@dataclass(frozen=True, slots=True)
class Sampling:
    """None: the server's default."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None  # None: the client draws one
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int | None = None
    include_stop: bool = False
    n: int = 1
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Access:
    """How a server that is not open to everybody is reached."""

    token: str | None = field(default=None, repr=False)  # of a tenant
    ca_file: str | None = None  # PEM file with the certificates to trust, over TLS
    tls: bool = False  # without ca_file: what the machine trusts


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long a client goes on when the server cannot be reached or has no room. The wait doubles from try to try."""

    give_up_after_s: float = 30.0  # without a new token; 0: the first failure is raised
    initial_wait_s: float = 0.1
    max_wait_s: float = 3.0


class CallFailed(Exception):
    """`code` is the name of a gRPC status code; the message names the field and the value that are wrong."""

    def __init__(self, code: str, message: str, pushback_s: float | None = None) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.pushback_s = pushback_s  # when the server wants the call again; negative: never; None: it does not say


# --- generation ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Call:
    """One generation as it goes out: the first time without output, later with what has come already."""

    prompt: Prompt
    sampling: Sampling
    request_id: str
    priority: int = 0
    output_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Placement:
    """Where it ran, why, and what it cost; after a resume, of the last stretch only."""

    prefill_worker: str = ""
    prefill_reason: str = ""
    decode_worker: str = ""
    decode_reason: str = ""
    mode: ServingMode | None = None
    mode_reason: str = ""
    attempts: int = 0
    kv_bytes_moved: int = 0
    transfer_s: float = 0.0
    transfer_exposed_s: float = 0.0
    predicted_cached_tokens: int = 0
    decode_held_tokens: int = 0
    preemptions: int = 0
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    e2e_s: float = 0.0
    predicted_pulled_tokens: int = 0
    pulled_tokens: int = 0  # whose KV came from another worker
    failed_pulls: int = 0  # refused, lost or late
    moves: int = 0  # from one of the router's queues to another
    queued_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Completion:
    """One whole choice."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    seed: int
    placement: Placement
    matched_stop: str | int | None = None  # the stop string or the stop token
    choice_index: int = 0
    logprobs: tuple[Logprobs, ...] = ()
    num_resumes: int = 0  # how often the connection was lost in mid-stream

    @property
    def completion_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Chunk:
    """What came since the last one. The last chunk of a choice has its completion; that one's text is the whole."""

    request_id: str
    choice_index: int
    first_index: int  # of token_ids[0] in the whole output
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[Logprobs, ...] = ()
    completion: Completion | None = None


# --- operators ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WarmLink:
    worker_id: str  # where to
    transport: str  # gloo, shared_memory


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    worker_id: str
    role: str
    incarnation: str
    state: str
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
    address: str
    warm_links: tuple[str, ...]
    pid: int
    num_queued: int
    links: tuple[WarmLink, ...]  # how KV goes to each of warm_links


@dataclass(frozen=True, slots=True)
class ClusterEvent:
    at_unix_s: float
    message: str


@dataclass(frozen=True, slots=True)
class Status:
    ready: bool
    message: str
    mode: str
    model: str
    version: str
    num_requests_in_flight: int
    num_requests_finished: int
    num_failovers: int
    view_version: int  # of the view that all routers share; 0: this router lacks a member of it
    workers: tuple[WorkerLoad, ...]
    events: tuple[ClusterEvent, ...]
    router_id: str


@dataclass(frozen=True, slots=True)
class ModelInfo:
    model: str
    architecture: str
    dtype: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    model_fingerprint: str
    block_size: int
    hash_block_size: int
    server_version: str


@dataclass(frozen=True, slots=True)
class ServerInfo:
    version: str
    mode: str
    uptime_s: float
    max_model_len: int
    max_in_flight: int
    max_message_bytes: int
    max_n: int
    max_logprobs: int
    max_stop_strings: int
    max_stop_len: int
    ttft_slo_s: float


@dataclass(frozen=True, slots=True)
class RouteCandidate:
    worker_id: str
    num_cached_tokens: int
    num_pending_tokens: int
    ttft_estimate_s: float
    num_free_blocks: int
    is_home: bool
    num_pulled_tokens: int
    num_queued: int


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request would go now, and why."""

    prompt_tokens: int
    prefill_candidates: tuple[RouteCandidate, ...]
    prefill_worker: str
    prefill_reason: str
    decode_candidates: tuple[RouteCandidate, ...]
    decode_worker: str
    decode_reason: str
    view_version: int  # as Status has it: equal ones name equal homes
