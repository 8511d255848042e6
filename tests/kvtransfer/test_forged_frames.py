"""A peer that passed the handshake and then says what it must not: a raw client against a real agent."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio

from kvtransfer.handshake import DIALLED, DIALLING, proof_of, proves, terms_of
from kvtransfer.memory_link import MemoryTransport
from kvtransfer.messages import (
    Abort,
    Ack,
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
    Ready,
    Refuse,
    Stamp,
    decode,
    encode,
)
from protos import worker_pb2, worker_pb2_grpc
from protos.types import PeerRef, Role, TransferKind
from tests.kvtransfer.workers import CONFIG, LAYOUT, SECRET, Worker, membership, until

ME = PeerRef("p0", "life-of-p0", "127.0.0.1:1", Role.PREFILL)


class RawPeer:
    """The dialling end, by hand."""

    def __init__(self, destination: Worker, call: Any) -> None:
        self.destination, self.call = destination, call

    async def say(self, message: Message | bytes) -> None:
        body = message if isinstance(message, bytes) else encode(message)
        await self.call.write(worker_pb2.PeerFrame(body=body))

    async def hear(self) -> Message | None:
        async with asyncio.timeout(5):
            while (frame := await self.call.read()) is not grpc.aio.EOF:
                if not isinstance(message := decode(frame.body), Ping):
                    return message
        return None

    def hello(self, me: PeerRef = ME) -> Hello:
        return Hello(me, self.destination.me.incarnation, terms_of(LAYOUT, CONFIG), "", secrets.token_bytes(32))

    async def prove(self, hello: Hello, secret: bytes = SECRET) -> None:
        """As far as knowing the secret goes."""
        await self.say(hello)
        challenge = await self.hear()
        assert isinstance(challenge, Challenge)
        assert proves(challenge.proof, SECRET, DIALLED, hello, challenge.nonce)
        await self.say(Proof(proof_of(secret, DIALLING, hello, challenge.nonce)))

    async def shake_hands(self, transport: MemoryTransport) -> None:
        await self.prove(self.hello())
        offer = await self.hear()
        assert isinstance(offer, LinkOffer)
        self.link = transport.dial(offer, lambda reason: None)
        await asyncio.to_thread(self.link.connect)

    def stamp(self, transfer_id: bytes | None = None, attempt: int = 1, source: str = ME.incarnation) -> Stamp:
        return Stamp(transfer_id or secrets.token_bytes(16), attempt, source, self.destination.me.incarnation)


@pytest_asyncio.fixture
async def raw() -> AsyncIterator[RawPeer]:
    transport = MemoryTransport(CONFIG)
    destination = await Worker(Role.DECODE, "d0", CONFIG, transport=transport).start()
    async with grpc.aio.insecure_channel(destination.me.address) as channel:
        peer = RawPeer(destination, worker_pb2_grpc.PeerStub(channel).Control())
        await peer.shake_hands(transport)
        yield peer
        await asyncio.to_thread(peer.link.close)
    await destination.stop()
    assert destination.agent.open_transfers == 0


async def test_chunks_and_commits_of_unknown_transfers_are_refused_and_counted(raw: RawPeer) -> None:
    for number, forged in enumerate((Chunk(raw.stamp(), 0, 0, 1, 1024, 0), Commit(raw.stamp(), 0, (1,), 1)), start=1):
        await raw.say(forged)
        assert await raw.hear() == Abort(forged.stamp, "unknown transfer")
        assert raw.destination.agent.counters.num_unknown_transfers == number
    assert not raw.destination.store.pool.any()


async def test_messages_of_another_life_or_attempt_are_refused_and_counted(raw: RawPeer) -> None:
    transfer_id = secrets.token_bytes(16)
    raw.destination.grants((3,))
    raw.destination.agent.expect(transfer_id, ME, "r", 1)
    of_another_life = raw.stamp(transfer_id, source="a-former-life")
    await raw.say(Offer(of_another_life, TransferKind.HANDOFF, "r", 1))
    assert await raw.hear() == Refuse(of_another_life, "another incarnation")
    await raw.say(Offer(raw.stamp(transfer_id), TransferKind.HANDOFF, "r", 1))
    await raw.hear()  # accepted
    of_another_attempt = raw.stamp(transfer_id, attempt=2)
    await raw.say(Commit(of_another_attempt, 0, (1,), 1))
    assert await raw.hear() == Abort(of_another_attempt, "another attempt")
    assert raw.destination.agent.counters.num_stale_messages == 2
    assert raw.destination.host.ends(transfer_id) == []


async def test_what_only_a_destination_says_is_ignored(raw: RawPeer) -> None:
    transfer_id = secrets.token_bytes(16)
    raw.destination.grants((3,))
    raw.destination.agent.expect(transfer_id, ME, "r", 1)
    stamp = raw.stamp(transfer_id)
    await raw.say(Offer(stamp, TransferKind.HANDOFF, "r", 1))
    await raw.hear()  # accepted
    for wrong_way in (Ack(stamp), Ready(stamp, 0, 0, 1024), Refuse(stamp, "no")):
        await raw.say(wrong_way)
    await raw.say(Commit(stamp, 0, (1,), 1))  # without its chunk
    await asyncio.sleep(0.1)
    assert raw.destination.host.ends(transfer_id) == []
    await raw.say(Abort(stamp, "enough"))
    assert (await raw.destination.host.next("lost", transfer_id))[2] == "enough"


async def test_a_malformed_frame_ends_the_stream_and_its_transfers(raw: RawPeer) -> None:
    transfer_id = secrets.token_bytes(16)
    raw.destination.grants((3,))
    raw.destination.agent.expect(transfer_id, ME, "r", 1)
    await raw.say(Offer(raw.stamp(transfer_id), TransferKind.HANDOFF, "r", 1))
    await raw.hear()  # accepted
    await raw.say(b"\x80\x04\x95 pickled")
    assert "malformed" in (await raw.destination.host.next("lost", transfer_id))[2]
    assert await raw.hear() is None


async def test_a_silent_peer_is_lost(raw: RawPeer) -> None:
    """This client never pings."""
    transfer_id = secrets.token_bytes(16)
    raw.destination.agent.expect(transfer_id, ME, "r", 1)
    await raw.say(Offer(raw.stamp(transfer_id), TransferKind.HANDOFF, "r", 1))
    assert "silent" in (await raw.destination.host.next("lost", transfer_id))[2]


async def test_streams_that_open_otherwise_than_by_hello_are_ended(raw: RawPeer) -> None:
    async with grpc.aio.insecure_channel(raw.destination.me.address) as channel:
        stranger = RawPeer(raw.destination, worker_pb2_grpc.PeerStub(channel).Control())
        await stranger.say(Ack(stranger.stamp()))
        assert await stranger.hear() is None


async def test_a_stranger_is_turned_away_once_members_are_known(raw: RawPeer) -> None:
    raw.destination.agent.set_members(1, (raw.destination.me, ME))
    async with grpc.aio.insecure_channel(raw.destination.me.address) as channel:
        stranger = RawPeer(raw.destination, worker_pb2_grpc.PeerStub(channel).Control())
        other = PeerRef("p0", "another-life", "127.0.0.1:1", Role.PREFILL)
        await stranger.prove(stranger.hello(other))
        refused = await stranger.hear()
        assert isinstance(refused, HelloRefused)
        assert not refused.is_final
    await until(lambda: raw.destination.agent.counters.num_refused_hellos == 1)


@pytest.mark.parametrize("method", ["Control", "Ask"])
async def test_who_does_not_know_the_secret_gets_nothing(raw: RawPeer, method: str) -> None:
    """Though it is a member by its own account, and answers with what the worker itself has just said."""
    async with grpc.aio.insecure_channel(raw.destination.me.address) as channel:

        def dials() -> RawPeer:
            return RawPeer(raw.destination, getattr(worker_pb2_grpc.PeerStub(channel), method)())

        guesses, echoes, replays = dials(), dials(), dials()
        await guesses.prove(guesses.hello(), secret=bytes(32))
        await echoes.say(hello := echoes.hello())
        challenge = await echoes.hear()
        assert isinstance(challenge, Challenge)
        await echoes.say(Proof(challenge.proof))
        await replays.say(hello)
        await replays.hear()
        await replays.say(Proof(proof_of(SECRET, DIALLING, hello, challenge.nonce)))  # good on the other stream
        for stranger in (guesses, echoes, replays):
            assert isinstance(await stranger.hear(), HelloRefused)
            assert await stranger.hear() is None
    assert raw.destination.agent.counters.num_refused_hellos == 3
    assert raw.destination.host.events == []


async def test_who_does_not_know_the_secret_is_told_nothing() -> None:
    """The worker dials; what answers holds the address of a member."""
    source = await Worker(Role.PREFILL, "p0", CONFIG, seed=1).start()
    impostor = await Worker(Role.DECODE, "d0", CONFIG, secret=bytes(32)).start()
    membership(1, source, impostor)
    await asyncio.sleep(0.3)
    assert (source.agent.warm_links, impostor.agent.warm_links) == ((), ())
    assert impostor.agent.counters.num_refused_hellos == 0, "it was not even asked"
    transfer_id = secrets.token_bytes(16)
    source.agent.open(transfer_id, impostor.me, "r", 1, 1)
    assert "secret" in (await source.host.next("refused", transfer_id))[2]
    source.agent.offer_return("d0", "r", 1, (bytes(16),))
    await asyncio.sleep(0.1)
    assert impostor.host.events == []
    await source.stop()
    await impostor.stop()


async def test_who_linked_before_members_were_known_and_is_none_is_dropped(raw: RawPeer) -> None:
    raw.destination.agent.set_members(1, (raw.destination.me,))
    assert await raw.hear() is None
