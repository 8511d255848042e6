"""What goes into a Router and what comes out of it: plain values, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from protos.types import Abort, FinishReason, GenerateRequest, Logprobs, Migrate, PeerRef, Retarget, WorkerReport
from router.account import RequestAccount
from router.key_depth import DepthSnapshot

# --- events -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Arrived:
    """A valid request: attempt 0, no handoff; token_ids are the prompt and what output the caller has.
    `links` are the chain of the prompt's hash blocks."""

    request: GenerateRequest
    links: tuple[bytes, ...]
    beside: tuple[str, ...] = ()  # workers that another choice of the same call runs on: prefill, then decode
    arrived_at: float | None = None  # when its call came, where that was earlier


@dataclass(frozen=True, slots=True)
class ClientCancelled:
    """Nobody waits for the request any more."""

    request_id: str


@dataclass(frozen=True, slots=True)
class AbortRequested:
    """The caller asked to end the request; its call still waits for the last word."""

    request_id: str


@dataclass(frozen=True, slots=True)
class StopMatched:
    """The text layer found a stop string in what was delivered."""

    request_id: str


@dataclass(frozen=True, slots=True)
class WorkerUp:
    ref: PeerRef


@dataclass(frozen=True, slots=True)
class WorkerDown:
    worker_id: str
    incarnation: str
    reason: str


@dataclass(frozen=True, slots=True)
class WorkerDraining:
    """It is to leave when it has finished what it has: nothing new goes there."""

    worker_id: str
    incarnation: str


@dataclass(frozen=True, slots=True)
class Reported:
    worker_id: str
    incarnation: str
    report: WorkerReport


@dataclass(frozen=True, slots=True)
class MigrationWanted:
    """A request that decodes is to go on at another worker. Nothing happens where it cannot: it does not decode (yet,
    or any more), migrates already, or that worker is not up."""

    request_id: str
    to_worker_id: str
    reason: str  # goes into the placement of the reply


@dataclass(frozen=True, slots=True)
class DepthsPublished:
    """What is decided on key depths for all routers; from the first of these on, nothing is decided here."""

    depths: DepthSnapshot


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = (
    Arrived
    | ClientCancelled
    | AbortRequested
    | StopMatched
    | WorkerUp
    | WorkerDown
    | WorkerDraining
    | Reported
    | MigrationWanted
    | DepthsPublished
    | Tick
)

# --- effects ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    """To one live worker. A worker takes submits before retargets before migrates before aborts, whichever share a
    frame."""

    worker_id: str
    submits: tuple[GenerateRequest, ...] = ()
    retargets: tuple[Retarget, ...] = ()
    aborts: tuple[Abort, ...] = ()
    migrates: tuple[Migrate, ...] = ()


@dataclass(frozen=True, slots=True)
class Deliver:
    """Output tokens [first_index, first_index + len(token_ids)), each index once and in order. The last Deliver of a
    request has a finish reason and the account."""

    request_id: str
    first_index: int
    token_ids: tuple[int, ...]
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    account: RequestAccount | None = None
    logprobs: tuple[Logprobs, ...] = ()  # one for each token, where asked for
    workers: tuple[str, ...] = ()  # that the request runs on: prefill, then decode


class RefusedFor(StrEnum):
    """Why a request was not taken: a small closed set, for metrics."""

    INVALID = "invalid"
    UNAUTHENTICATED = "unauthenticated"
    NOT_READY = "not_ready"  # or stopping
    TOKENIZER_BUSY = "tokenizer_busy"
    TENANT_LIMIT = "tenant_limit"
    DUPLICATE_ID = "duplicate_id"
    MAX_IN_FLIGHT = "max_in_flight"
    WORKERS_FULL = "workers_full"
    SLO = "slo"  # its first token would come too late


@dataclass(frozen=True, slots=True)
class Fail:
    """The request ends without a result. `code` is the name of a gRPC status code."""

    request_id: str
    code: str
    message: str
    retry_after_s: float | None = None
    refused_for: RefusedFor | None = None  # None: it had been taken


Effect = Send | Deliver | Fail
