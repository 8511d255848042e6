"""What goes into a WorkerCore and what comes out of it: plain values, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass

from protos.types import Abort, GenerateRequest, Handoff, HandoffRefused, Retarget, TokenOutput

# --- events -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Submitted:
    request: GenerateRequest


@dataclass(frozen=True, slots=True)
class TransferOffered:
    """Destination: the source has begun to prefill and asks for room for the first num_blocks blocks of the request."""

    transfer_id: bytes
    request_id: str
    attempt: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class TransferArrived:
    """Destination: every granted block is written and verified; the request goes on at output index first_index."""

    transfer_id: bytes
    first_index: int
    token_ids: tuple[int, ...]
    num_bytes: int
    transfer_s: float
    exposed_s: float


@dataclass(frozen=True, slots=True)
class TransferLost:
    """Destination: the KV will not come and nothing writes to the granted blocks any more; recompute."""

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


Event = (
    Submitted | Abort | Retarget | TransferOffered | TransferArrived | TransferLost | TransferRefused | TransferClosed
)

# --- effects ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpenTransfer:
    """Source: prefill has started; offer num_blocks blocks (the whole prompt, its partial tail included)."""

    handoff: Handoff
    request_id: str
    attempt: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class SendBlocks:
    """Source: blocks [first_block, first_block + len(block_ids)) of the request are computed and leased."""

    transfer_id: bytes
    first_block: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CommitTransfer:
    """Source: every block has been handed to SendBlocks; the destination goes on at first_index."""

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
    """Destination: blocks [num_held_blocks, num_held_blocks + len(block_ids)) of the request may be written to
    block_ids; the ones before are already here."""

    transfer_id: bytes
    num_held_blocks: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RefuseTransfer:
    transfer_id: bytes
    reason: str


Effect = (
    TokenOutput
    | HandoffRefused
    | OpenTransfer
    | SendBlocks
    | CommitTransfer
    | AbortTransfer
    | ExpectTransfer
    | GrantTransfer
    | RefuseTransfer
)
