"""The frames of transfer control, typed, and their msgpack form. Decides what a well-formed frame is and nothing else:
whether a frame is welcome is for the transfer's state machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from functools import cache
from typing import Any, get_type_hints

import msgpack  # type: ignore[import-untyped]

from protos.block_hash import DIGEST_SIZE
from protos.types import KVLayout, PeerRef, TransferKind

MAX_FRAME_NBYTES = 64 << 10
MAX_NUM_HASHES = 8192  # in one ask: half a million tokens of 64-token blocks
MAX_ASK_NBYTES = MAX_NUM_HASHES * DIGEST_SIZE + (16 << 10)
MAX_TEXT_LENGTH = 1024  # characters of one string
MAX_NUM_TOKENS = 4096  # in one commit
TRANSFER_ID_NBYTES = 16
NONCE_NBYTES = PROOF_NBYTES = 32


@dataclass(frozen=True, slots=True)
class Stamp:
    """Names one transfer and the two lives it runs between. Equal stamps, or the message is not for this transfer."""

    transfer_id: bytes
    attempt: int
    source_incarnation: str
    destination_incarnation: str

    def __post_init__(self) -> None:
        if len(self.transfer_id) != TRANSFER_ID_NBYTES:
            raise ValueError(f"a transfer id has {TRANSFER_ID_NBYTES} bytes, not {len(self.transfer_id)}")


# --- about the link: first frames of a stream -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Terms:
    """What must be equal at both ends before a byte moves."""

    protocol_version: int
    layout: KVLayout
    checksum: str
    chunk_nbytes: int


@dataclass(frozen=True, slots=True)
class Hello:
    """Who dials whom. What follows on the stream, both ends prove over these very words (handshake.py)."""

    sender: PeerRef
    receiver_incarnation: str  # the life that the sender means to talk to
    terms: Terms
    beacon: str  # what a worker of the same machine can find the sender by (local_socket.py); empty: nothing
    nonce: bytes

    def __post_init__(self) -> None:
        _check_nonce(self.nonce)


@dataclass(frozen=True, slots=True)
class Challenge:
    """Answers a hello: the dialled end proves itself, and names what the dialling end is to prove itself by."""

    nonce: bytes
    proof: bytes

    def __post_init__(self) -> None:
        _check_nonce(self.nonce)
        _check_proof(self.proof)


@dataclass(frozen=True, slots=True)
class Proof:
    """Answers a challenge. Before it nothing else is heard."""

    proof: bytes

    def __post_init__(self) -> None:
        _check_proof(self.proof)


@dataclass(frozen=True, slots=True)
class HelloRefused:
    reason: str
    is_final: bool  # the same two lives will never agree: do not dial again


@dataclass(frozen=True, slots=True)
class LinkOffer:
    """Where the receiver listens for this one link."""

    host: str
    port: int
    prefix: str
    transport: str  # gloo, shared_memory, nccl, cuda_ipc


@dataclass(frozen=True, slots=True)
class Ping:
    """Sent when there is nothing else to send, so that silence means loss."""


# --- about one transfer ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Offer:
    stamp: Stamp
    kind: TransferKind
    request_id: str
    num_blocks: int


@dataclass(frozen=True, slots=True)
class Accept:
    """Blocks [num_held_blocks, num_blocks) may be written; the ones before are at the destination already."""

    stamp: Stamp
    num_held_blocks: int


@dataclass(frozen=True, slots=True)
class Refuse:
    stamp: Stamp
    reason: str


@dataclass(frozen=True, slots=True)
class Chunk:
    """Blocks [first_block, first_block + num_blocks) of the request wait in the source's staging."""

    stamp: Stamp
    seq: int  # counts the transfer's chunks from 0
    first_block: int
    num_blocks: int
    num_bytes: int
    checksum: int


@dataclass(frozen=True, slots=True)
class Ready:
    """Receive `number` of the link is posted for chunk seq. The source must send it, whatever became of the transfer:
    operations of a link have no gaps."""

    stamp: Stamp
    seq: int
    number: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Commit:
    """Every block has been computed; the destination goes on at output index first_index."""

    stamp: Stamp
    first_index: int
    token_ids: tuple[int, ...]
    num_blocks: int  # that there are: those offered, but for a migration, which may have needed fewer


@dataclass(frozen=True, slots=True)
class Ack:
    stamp: Stamp


@dataclass(frozen=True, slots=True)
class Abort:
    stamp: Stamp
    reason: str


TransferMessage = Offer | Accept | Refuse | Chunk | Ready | Commit | Ack | Abort


# --- asked and answered beside the stream, once each ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PullAsk:
    """Send me these blocks of a prefix, from the first one on as many as there are, in a transfer by this id."""

    pull_id: bytes
    kind: TransferKind  # pull or return
    request_id: str
    attempt: int
    block_hashes: bytes  # see pack_hashes

    def __post_init__(self) -> None:
        if len(self.pull_id) != TRANSFER_ID_NBYTES:
            raise ValueError(f"a pull id has {TRANSFER_ID_NBYTES} bytes, not {len(self.pull_id)}")
        if self.kind not in (TransferKind.PULL, TransferKind.RETURN):
            raise ValueError(f"nobody asks for a {self.kind}")
        _check_hashes(self.block_hashes)


@dataclass(frozen=True, slots=True)
class ReturnAsk:
    """These blocks of a prefix of yours are here: ask for them, or do not."""

    request_id: str
    attempt: int
    block_hashes: bytes  # see pack_hashes

    def __post_init__(self) -> None:
        _check_hashes(self.block_hashes)


@dataclass(frozen=True, slots=True)
class Answer:
    """Empty: what was asked for is offered, or was heard."""

    refusal: str


Ask = PullAsk | ReturnAsk
Message = Hello | Challenge | Proof | HelloRefused | LinkOffer | Ping | TransferMessage | Ask | Answer

_KINDS: dict[str, type[Any]] = {
    "hello": Hello,
    "challenge": Challenge,
    "proof": Proof,
    "hello_refused": HelloRefused,
    "link": LinkOffer,
    "ping": Ping,
    "offer": Offer,
    "accept": Accept,
    "refuse": Refuse,
    "chunk": Chunk,
    "ready": Ready,
    "commit": Commit,
    "ack": Ack,
    "abort": Abort,
    "pull": PullAsk,
    "return": ReturnAsk,
    "answer": Answer,
}
_NAMES = {message_type: name for name, message_type in _KINDS.items()}


def encode(message: Message) -> bytes:
    body: bytes = msgpack.packb([_NAMES[type(message)], *_to_plain(message)])
    assert len(body) <= (MAX_ASK_NBYTES if isinstance(message, Ask) else MAX_FRAME_NBYTES)
    return body


def decode(body: bytes, max_nbytes: int = MAX_FRAME_NBYTES) -> Message:
    """Raises ValueError, and says why, for anything that `encode` would not have made."""
    if len(body) > max_nbytes:
        raise ValueError(f"a frame of {len(body)} bytes is longer than {max_nbytes}")
    plain = msgpack.unpackb(
        body,
        max_str_len=4 * MAX_TEXT_LENGTH,
        max_bin_len=MAX_NUM_HASHES * DIGEST_SIZE,
        max_array_len=MAX_NUM_TOKENS,
        max_map_len=0,
        max_ext_len=0,
    )
    if not isinstance(plain, list) or not plain or not isinstance(plain[0], str) or plain[0] not in _KINDS:
        raise ValueError(f"not a frame of a known kind: {str(plain)[:80]}")
    message: Message = _to_typed(_KINDS[plain[0]], plain[1:])
    return message


def clip(reason: str) -> str:
    """A reason that fits into a frame."""
    return reason[:MAX_TEXT_LENGTH]


def pack_hashes(block_hashes: Sequence[bytes]) -> bytes:
    """The first MAX_NUM_HASHES of them, one behind the other: whoever asks for a longer prefix gets less of it."""
    return b"".join(block_hashes[:MAX_NUM_HASHES])


def unpack_hashes(packed: bytes) -> tuple[bytes, ...]:
    return tuple(packed[start : start + DIGEST_SIZE] for start in range(0, len(packed), DIGEST_SIZE))


def _check_nonce(nonce: bytes) -> None:
    if len(nonce) != NONCE_NBYTES:
        raise ValueError(f"a nonce has {NONCE_NBYTES} bytes, not {len(nonce)}")


def _check_proof(proof: bytes) -> None:
    if len(proof) != PROOF_NBYTES:
        raise ValueError(f"a proof has {PROOF_NBYTES} bytes, not {len(proof)}")


def _check_hashes(packed: bytes) -> None:
    if not packed or len(packed) % DIGEST_SIZE or len(packed) > MAX_NUM_HASHES * DIGEST_SIZE:
        raise ValueError(f"{len(packed)} bytes are not 1 to {MAX_NUM_HASHES} hashes of {DIGEST_SIZE} bytes")


def _to_plain(value: Any) -> Any:
    if is_dataclass(value):
        return [_to_plain(getattr(value, field.name)) for field in fields(value)]
    return str(value) if isinstance(value, StrEnum) else value


def _to_typed(expected: type[Any], value: Any) -> Any:
    """`value` as `expected`, or ValueError: one case per type that a message field has."""
    if is_dataclass(expected):
        hints = _field_types(expected)
        if not isinstance(value, list) or len(value) != len(hints):
            raise ValueError(f"{expected.__name__} has {len(hints)} fields, not {str(value)[:80]}")
        return expected(*map(_to_typed, hints, value))
    if expected == tuple[int, ...]:
        if not isinstance(value, list):
            raise ValueError(f"not a list: {str(value)[:80]}")
        return tuple(_to_typed(int, item) for item in value)
    if issubclass(expected, StrEnum):
        return expected(value)
    if type(value) is not expected or (expected is int and value < 0):
        raise ValueError(f"not a valid {expected.__name__}: {str(value)[:80]}")
    if expected is str and len(value) > MAX_TEXT_LENGTH:
        raise ValueError(f"a text of {len(value)} characters is longer than {MAX_TEXT_LENGTH}")
    return value


@cache
def _field_types(message_type: type[Any]) -> tuple[type[Any], ...]:
    return tuple(get_type_hints(message_type)[field.name] for field in fields(message_type))
