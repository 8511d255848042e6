"""The wire form of control frames: everything that was encoded comes back, nothing else gets through."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.messages import (
    MAX_ASK_NBYTES,
    MAX_FRAME_NBYTES,
    MAX_NUM_HASHES,
    MAX_TEXT_LENGTH,
    Abort,
    Accept,
    Ack,
    Answer,
    Challenge,
    Chunk,
    Commit,
    Hello,
    HelloRefused,
    LinkOffer,
    Message,
    Offer,
    Ping,
    Proof,
    PullAsk,
    Ready,
    Refuse,
    ReturnAsk,
    Stamp,
    Terms,
    decode,
    encode,
    pack_hashes,
    unpack_hashes,
)
from protos.types import PROTOCOL_VERSION, PeerRef, Role, TransferKind
from tests.kvtransfer.workers import LAYOUT

STAMP = Stamp(bytes(range(16)), 3, "life-of-source", "life-of-destination")
PEER = PeerRef("p0", "life", "10.0.0.1:5000", Role.PREFILL)
HELLO = Hello(PEER, "other-life", Terms(PROTOCOL_VERSION, LAYOUT, "xxh3_64", 4 << 20), "beacon", bytes(32))
MESSAGES: list[Message] = [
    HELLO,
    HelloRefused("dtype differs", True),
    Challenge(bytes(range(32)), bytes(32)),
    Proof(bytes(32)),
    LinkOffer("127.0.0.1", 40000, "ab" * 16, "gloo"),
    Ping(),
    Offer(STAMP, TransferKind.HANDOFF, "request", 9),
    Accept(STAMP, 2),
    Refuse(STAMP, "no room"),
    Chunk(STAMP, 1, 4, 2, 2048, 2**64 - 1),
    Ready(STAMP, 1, 77, 2048),
    Commit(STAMP, 12, (1, 2, 3), 4),
    Ack(STAMP),
    Abort(STAMP, "client left"),
    PullAsk(bytes(range(16)), TransferKind.RETURN, "request", 2, bytes(48)),
    ReturnAsk("request", 2, bytes(16)),
    Answer("the first block asked for is not here"),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_round_trip(message: Message) -> None:
    assert decode(encode(message)) == message


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_field_of_the_wrong_type_is_refused(message: Message) -> None:
    plain = msgpack.unpackb(encode(message))
    for position in range(1, len(plain)):
        for wrong in (None, 1.5, -1, ["text"], b"bytes of no field"):
            forged = [*plain]
            forged[position] = wrong
            with pytest.raises(ValueError, match=r"."):
                decode(msgpack.packb(forged))
    with pytest.raises(ValueError, match="fields"):
        decode(msgpack.packb([*plain, 1]))


def test_unknown_kinds_and_long_frames_are_refused() -> None:
    with pytest.raises(ValueError, match="known kind"):
        decode(msgpack.packb(["pickle", 1]))
    with pytest.raises(ValueError, match="longer"):
        decode(b"\xc0" * (MAX_FRAME_NBYTES + 1))
    with pytest.raises(ValueError, match="longer"):
        decode(msgpack.packb(["refuse", *[[bytes(16), 1, "a", "b"]], "x" * (MAX_TEXT_LENGTH + 1)]))
    with pytest.raises(ValueError, match="32 bytes"):
        decode(msgpack.packb(["challenge", bytes(31), bytes(32)]))
    with pytest.raises(ValueError, match="16 bytes"):
        decode(msgpack.packb(["ack", [bytes(15), 1, "a", "b"]]))


def test_a_flag_is_not_a_number() -> None:
    with pytest.raises(ValueError, match="int"):
        decode(msgpack.packb(["accept", [bytes(16), 1, "a", "b"], True]))


@given(st.binary(max_size=200))
def test_noise_is_refused_by_ValueError_only(body: bytes) -> None:
    try:
        message = decode(body)
    except ValueError:
        return
    assert decode(encode(message)) == message


@given(st.sampled_from(MESSAGES), st.integers(0, 500), st.integers(1, 255))
def test_damaged_frames_never_crash(message: Message, position: int, flip: int) -> None:
    body = bytearray(encode(message))
    body[position % len(body)] ^= flip
    try:
        decode(bytes(body))
    except ValueError:
        return


@given(st.lists(st.binary(min_size=16, max_size=16), min_size=1, max_size=5))
def test_hashes_come_back(hashes: list[bytes]) -> None:
    assert unpack_hashes(pack_hashes(hashes)) == tuple(hashes)


def test_a_prefix_that_is_too_long_is_asked_for_in_part() -> None:
    hashes = [number.to_bytes(16) for number in range(MAX_NUM_HASHES + 1)]
    ask = ReturnAsk("x" * MAX_TEXT_LENGTH, 2, pack_hashes(hashes))
    body = encode(ask)
    assert decode(body, MAX_ASK_NBYTES) == ask
    assert unpack_hashes(ask.block_hashes) == tuple(hashes[:MAX_NUM_HASHES])
    with pytest.raises(ValueError, match="longer"):
        decode(body)  # as on a stream, where nobody asks


@pytest.mark.parametrize("packed", [b"", bytes(15), bytes(16 * (MAX_NUM_HASHES + 1))])
def test_what_are_no_hashes_is_refused(packed: bytes) -> None:
    with pytest.raises(ValueError, match="hashes"):
        ReturnAsk("request", 2, packed)


@pytest.mark.parametrize("kind", [TransferKind.HANDOFF, TransferKind.MIGRATE])
def test_only_pulls_and_returns_are_asked_for(kind: TransferKind) -> None:
    with pytest.raises(ValueError, match=kind):
        PullAsk(bytes(16), kind, "request", 2, bytes(16))
