"""What goes into a WorkerCore and what comes out of it: plain values, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from protos.types import (
    Abort,
    GenerateRequest,
    Handoff,
    HandoffRefused,
    Migrate,
    MigrationFailed,
    PeerRef,
    Retarget,
    TokenOutput,
    TransferFailure,
    TransferKind,
)

# --- events -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Submitted:
    request: GenerateRequest


@dataclass(frozen=True, slots=True)
class TransferOffered:
    """Destination: the source has begun to prefill, or to migrate, and asks for room for the first num_blocks blocks of
    the request."""

    transfer_id: bytes
    request_id: str
    attempt: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class TransferArrived:
    """Destination: of the granted blocks the first num_blocks, held ones included, are written and verified; the
    request goes on at output index first_index. Only a migration may have had fewer in the end than it offered."""

    transfer_id: bytes
    first_index: int
    token_ids: tuple[int, ...]
    num_bytes: int
    transfer_s: float
    exposed_s: float
    num_blocks: int = 0  # looked at for a migration


@dataclass(frozen=True, slots=True)
class TransferLost:
    """Destination: the KV will not come and nothing writes to the granted blocks any more. A handoff is recomputed
    here, a migration stays where it was."""

    transfer_id: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class TransferRefused:
    """Source: the destination took nothing. The source keeps its blocks until the router says where to go."""

    transfer_id: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class TransferClosed:
    """Source: acknowledged, aborted or expired, and nothing reads the leased blocks any more."""

    transfer_id: bytes
    failure: TransferFailure | None = None  # None: acknowledged


@dataclass(frozen=True, slots=True)
class BlocksSent:
    """Source of a migration, many times: the destination has granted its blocks, and so many of the request's blocks
    have been sent or were there."""

    transfer_id: bytes
    num_blocks: int


@dataclass(frozen=True, slots=True)
class PullRequested:
    """Source: another worker asks for these blocks of a prefix. Answered by OpenTransfer or RefusePull."""

    pull_id: bytes
    destination: PeerRef
    request_id: str
    attempt: int
    block_hashes: tuple[bytes, ...]
    kind: TransferKind = TransferKind.PULL


@dataclass(frozen=True, slots=True)
class PullRefused:
    """Destination: the other has none of the blocks, serves no more pulls now, or is not there."""

    pull_id: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class ReturnOffered:
    """Home: another worker has computed a prefix of ours, and it has these blocks now. Nobody waits for an answer."""

    source_worker_id: str
    request_id: str
    attempt: int
    block_hashes: tuple[bytes, ...]  # from the first block on


@dataclass(frozen=True, slots=True)
class Copied:
    """All blocks of a CopyBlocks are where they were to go."""

    copy_id: bytes


@dataclass(frozen=True, slots=True)
class CopyLost:
    """A CopyBlocks has failed, and nothing reads or writes its blocks any more."""

    copy_id: bytes
    reason: str


Event = (
    Submitted
    | Abort
    | Retarget
    | Migrate
    | TransferOffered
    | TransferArrived
    | TransferLost
    | TransferRefused
    | TransferClosed
    | BlocksSent
    | PullRequested
    | PullRefused
    | ReturnOffered
    | Copied
    | CopyLost
)

# --- effects ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpenTransfer:
    """Source: offer num_blocks blocks. A handoff has the whole prompt, its partial tail included, and begins with the
    prefill; a pull has the first of the blocks that were asked for, and all of them are there; a migration has what the
    request may grow to meanwhile, and nothing is sent before the first BlocksSent."""

    handoff: Handoff
    request_id: str
    attempt: int
    num_blocks: int
    kind: TransferKind = TransferKind.HANDOFF


@dataclass(frozen=True, slots=True)
class SendBlocks:
    """Source: blocks [first_block, first_block + len(block_ids)) of the transfer are computed and leased.

    Ids of a pull or a return may be num_blocks of the device and above: id - num_blocks is a block of host memory."""

    transfer_id: bytes
    first_block: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CommitTransfer:
    """Source: every block has been handed to SendBlocks; the destination goes on at first_index. A handoff has all
    tokens since the attempt began, a migration the latest ones."""

    transfer_id: bytes
    first_index: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AbortTransfer:
    """Either side: the request ended or was moved; TransferClosed or TransferLost follows when the blocks are quiet."""

    transfer_id: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class ExpectTransfer:
    """Destination: the router announced this transfer; an offer by any other peer or id is refused."""

    handoff: Handoff
    request_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class GrantTransfer:
    """Destination: blocks [num_held_blocks, num_held_blocks + len(block_ids)) of the transfer may be written to
    block_ids; the ones before are already here."""

    transfer_id: bytes
    num_held_blocks: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RefuseTransfer:
    transfer_id: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class RequestPull:
    """Destination: ask a home for these blocks of a prefix (or, to bring them home, whoever offered them), and expect a
    transfer by this id from it. It ends in one of PullRefused, TransferArrived, TransferLost, or in our own
    RefuseTransfer."""

    pull_id: bytes
    source_worker_id: str
    request_id: str  # of whoever asked first; others may wait for the same pull
    attempt: int
    block_hashes: tuple[bytes, ...]
    kind: TransferKind = TransferKind.PULL


@dataclass(frozen=True, slots=True)
class RefusePull:
    """Source: nothing comes, and nothing is leased."""

    pull_id: bytes
    destination: PeerRef
    reason: str


@dataclass(frozen=True, slots=True)
class OfferReturn:
    """Source: tell a home that these blocks of its prefix are here. It asks for those it lacks, or does nothing."""

    home_worker_id: str
    request_id: str
    attempt: int
    block_hashes: tuple[bytes, ...]


class CopyDirection(StrEnum):
    TO_HOST = "to host"
    TO_DEVICE = "to device"


@dataclass(frozen=True, slots=True)
class CopyBlocks:
    """Copy blocks between the device and host memory, beside the steps; Copied or CopyLost follows. Nobody writes to
    from_block_ids, nobody reads or writes to_block_ids until then. Both are numbered in their own memory, from 0."""

    copy_id: bytes
    direction: CopyDirection
    from_block_ids: tuple[int, ...]
    to_block_ids: tuple[int, ...]


Effect = (
    TokenOutput
    | HandoffRefused
    | MigrationFailed
    | OpenTransfer
    | SendBlocks
    | CommitTransfer
    | AbortTransfer
    | ExpectTransfer
    | GrantTransfer
    | RefuseTransfer
    | RequestPull
    | RefusePull
    | OfferReturn
    | CopyBlocks
)
