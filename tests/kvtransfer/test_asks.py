"""Workers that ask each other for prefixes: over real gRPC and gloo, links made when they are needed, and nobody served
who is no member."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import AsyncIterator
from dataclasses import replace

import grpc
import pytest
import pytest_asyncio
import torch

from kvtransfer import asks
from kvtransfer.counters import TransferCounters
from kvtransfer.greeter import Greeter
from kvtransfer.handshake import terms_of
from kvtransfer.memory_link import MemoryTransport
from kvtransfer.messages import MAX_ASK_NBYTES, MAX_NUM_HASHES, Answer, HelloRefused, Message, Ping, PullAsk
from kvtransfer.peer_channel import ChannelLost, PeerChannel
from protos import worker_pb2, worker_pb2_grpc
from protos.types import PeerRef, Role, TransferKind
from tests.kvtransfer.workers import CONFIG, LAYOUT, SECRET, Worker, membership, until

HASHES = tuple(bytes([number]) * 16 for number in range(1, 4))
PULL = TransferKind.PULL


@pytest_asyncio.fixture
async def pair() -> AsyncIterator[tuple[Worker, Worker]]:
    """Two prefill workers, of which the first has KV: neither dials the other of itself."""
    home = await Worker(Role.PREFILL, "p0", CONFIG, seed=1).start()
    asker = await Worker(Role.PREFILL, "p1", CONFIG).start()
    membership(1, home, asker)
    yield home, asker
    await home.stop()
    await asker.stop()
    assert home.agent.open_transfers == asker.agent.open_transfers == 0


def serves(worker: Worker, block_ids: tuple[int, ...], kind: TransferKind = PULL) -> None:
    """Answer every ask so."""

    def send(pull_id: bytes, destination: PeerRef) -> None:
        worker.agent.open(pull_id, destination, "r", 1, len(block_ids), kind)
        worker.agent.send_blocks(pull_id, 0, block_ids)
        worker.agent.commit(pull_id, 0, ())

    worker.host.answer_pull = send


def ask(asker: Worker, worker_id: str = "p0", kind: TransferKind = PULL) -> bytes:
    pull_id = secrets.token_bytes(16)
    asker.agent.request_pull(pull_id, worker_id, "r", 1, HASHES, kind)
    return pull_id


@pytest.mark.parametrize("kind", [TransferKind.PULL, TransferKind.RETURN])
async def test_what_is_asked_for_comes_over_a_link_made_for_it(pair: tuple[Worker, Worker], kind: TransferKind) -> None:
    home, asker = pair
    assert home.agent.warm_links == ()
    serves(home, (5, 6, 7), kind)
    asker.grants((20, 21, 22))
    pull_id = ask(asker, kind=kind)
    assert (await home.host.next("asked", pull_id))[2:] == (asker.me, "r", 1, HASHES, kind)
    await asker.host.next("arrived", pull_id)
    await home.host.next("closed", pull_id)
    assert torch.equal(asker.store.pool[20:23], home.store.pool[5:8])
    assert (home.agent.warm_links, asker.agent.warm_links) == (("p1",), ())
    assert asker.host.ends(pull_id) == ["arrived"]


async def test_a_refusal_is_heard_and_nothing_is_awaited_any_more(pair: tuple[Worker, Worker]) -> None:
    home, asker = pair
    home.host.answer_pull = lambda pull_id, destination: home.agent.refuse_pull(pull_id, "the first block is not here")
    pull_id = ask(asker)
    assert (await asker.host.next("pull refused", pull_id))[2] == "the first block is not here"
    assert asker.agent.open_transfers == 0


async def test_another_kind_than_was_asked_for_is_refused(pair: tuple[Worker, Worker]) -> None:
    home, asker = pair
    serves(home, (5,), TransferKind.RETURN)
    pull_id = ask(asker)
    await home.host.next("refused", pull_id)
    assert asker.host.of(pull_id) == []
    asker.agent.abort(pull_id, "late")
    assert (await asker.host.next("lost", pull_id))[2] == "late"


async def test_who_is_not_there_or_has_died_is_not_waited_for(pair: tuple[Worker, Worker]) -> None:
    home, asker = pair
    nobody = ask(asker, "p7")
    assert "p7 is not a member" in (await asker.host.next("pull refused", nobody))[2]
    await home.server.stop(None)
    dead = ask(asker)
    assert "no answer" in (await asker.host.next("pull refused", dead, timeout_s=3.0))[2]


async def test_a_former_life_is_not_asked(pair: tuple[Worker, Worker]) -> None:
    home, asker = pair
    former = PeerRef("p0", "a-former-life", home.me.address, Role.PREFILL)
    asker.agent.set_members(2, (former, asker.me))
    pull_id = ask(asker)
    assert "not a-former-life" in (await asker.host.next("pull refused", pull_id))[2]
    assert home.host.events == []


async def test_who_leaves_while_it_is_asked_is_not_waited_for(pair: tuple[Worker, Worker]) -> None:
    home, asker = pair
    pull_id = ask(asker)  # home does not answer
    await home.host.next("asked", pull_id)
    membership(2, asker)
    assert (await asker.host.next("lost", pull_id))[2] == "the source left"
    assert asker.host.ends(pull_id) == ["lost"]


async def test_who_leaves_before_it_is_asked_is_not_dialled(pair: tuple[Worker, Worker]) -> None:
    home, asker = pair
    pull_id = ask(asker)
    membership(2, asker)
    await asker.host.next("lost", pull_id)
    await asyncio.sleep(0.1)
    assert home.host.events == []
    assert asker.host.ends(pull_id) == ["lost"]


async def test_a_return_is_offered_to_a_home(pair: tuple[Worker, Worker]) -> None:
    home, asker = pair
    asker.agent.offer_return("p0", "r", 1, HASHES)
    assert await home.host.next("return offered", "p1") == ("return offered", "p1", "r", 1, HASHES)
    asker.agent.offer_return("p7", "r", 1, HASHES)  # nobody: nothing happens


async def test_a_long_prefix_is_offered_in_part(pair: tuple[Worker, Worker]) -> None:
    home, asker = pair
    hashes = tuple(number.to_bytes(16) for number in range(MAX_NUM_HASHES + 5))
    asker.agent.offer_return("p0", "r", 1, hashes)
    assert (await home.host.next("return offered", "p1"))[4] == hashes[:MAX_NUM_HASHES]


async def test_an_answer_that_comes_late_changes_nothing(pair: tuple[Worker, Worker]) -> None:
    """The asker has given up meanwhile: what is offered then is refused at once, so that nobody keeps it in memory."""
    home, asker = pair
    pull_id = ask(asker)
    await home.host.next("asked", pull_id)
    asker.agent.abort(pull_id, "late")
    await asker.host.next("lost", pull_id)
    home.agent.open(pull_id, asker.me, "r", 1, 1, PULL)
    home.agent.send_blocks(pull_id, 0, (5,))
    home.agent.commit(pull_id, 0, ())
    refused = await home.host.next("refused", pull_id, timeout_s=CONFIG.expect_timeout_s / 2)
    assert refused[2] == "nobody here waits for it any more"
    home.agent.refuse_pull(pull_id, "twice")
    assert asker.host.ends(pull_id) == ["lost"]


@pytest.mark.parametrize("who", [0, 1])
async def test_closing_in_mid_ask_waits_for_nobody_and_leaves_nothing(who: int) -> None:
    home = await Worker(Role.PREFILL, "p0", CONFIG, seed=1).start()
    asker = await Worker(Role.PREFILL, "p1", CONFIG).start()
    membership(1, home, asker)
    pull_id = ask(asker)
    await home.host.next("asked", pull_id)
    first, second = (home, asker) if who == 0 else (asker, home)
    async with asyncio.timeout(4.0):
        await first.stop()
        if first is home:
            await asker.host.next("pull refused", pull_id)
        await second.stop()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kv-")]
    assert home.agent.open_transfers == asker.agent.open_transfers == 0
    assert len(asker.host.ends(pull_id)) == 1


async def test_too_many_unanswered_asks_are_refused_at_once(
    pair: tuple[Worker, Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    home, asker = pair
    monkeypatch.setattr(asks, "MAX_NUM_ASKING", 2)
    first, second, third = ask(asker), ask(asker), ask(asker)
    assert "2 asks are unanswered" in (await asker.host.next("pull refused", third))[2]
    for pull_id in (first, second):
        await home.host.next("asked", pull_id)
        home.agent.refuse_pull(pull_id, "no")
        await asker.host.next("pull refused", pull_id)
    await home.host.next("asked", ask(asker))
    assert home.host.of(third) == []
    membership(2, asker)  # so that nobody waits for the last one


async def test_the_link_that_was_unused_for_longest_makes_way_unless_it_is_busy() -> None:
    config = replace(CONFIG, max_lazy_links=2)
    home = await Worker(Role.PREFILL, "p0", config, seed=1).start()
    askers = [await Worker(Role.PREFILL, f"p{number}", config).start() for number in range(1, 5)]
    decode = await Worker(Role.DECODE, "d0", config).start()
    membership(1, home, *askers, decode)
    await home.warm("d0")
    serves(home, (5,))
    for asker in askers:
        asker.grants((20,))

    async def pulls(number: int) -> None:
        await askers[number - 1].host.next("arrived", ask(askers[number - 1]))

    for number in (1, 2, 1, 3):
        await pulls(number)
    await home.warm("d0", "p1", "p3")
    askers[0].grants((20,) * 5)
    busy = secrets.token_bytes(16)
    askers[0].agent.expect(busy, home.me, "r", 1)
    home.agent.open(busy, askers[0].me, "r", 1, 5)
    await pulls(2)
    await home.warm("d0", "p1", "p2", "p3")  # p3 is the younger one, p1 moves something
    await pulls(4)
    await home.warm("d0", "p1", "p2", "p4")
    home.agent.abort(busy, "enough")
    for worker in (home, *askers, decode):
        await worker.stop()
        assert worker.agent.open_transfers == 0


async def test_a_link_that_is_waited_for_does_not_make_way() -> None:
    config = replace(CONFIG, max_lazy_links=1)
    home = await Worker(Role.DECODE, "d0", config, seed=1).start()
    others = [await Worker(Role.DECODE, f"d{number}", config).start() for number in (1, 2)]
    membership(1, home, *others)
    moving = [secrets.token_bytes(16) for _ in others]
    for other, transfer_id in zip(others, moving, strict=True):
        other.grants((20,))
        other.agent.expect(transfer_id, home.me, "r", 1, TransferKind.MIGRATE)
        home.agent.open(transfer_id, other.me, "r", 1, 1, TransferKind.MIGRATE)
    for transfer_id in moving:
        await home.host.next("sent", transfer_id)
        home.agent.abort(transfer_id, "enough")
    for worker in (home, *others):
        await worker.stop()
        assert worker.agent.open_transfers == 0


class Stranger:
    """Asks by hand, and knows the secret."""

    def __init__(self, home: Worker, me: PeerRef) -> None:
        self.home = home
        terms = terms_of(LAYOUT, CONFIG)
        self._greeter = Greeter(me, terms, SECRET, CONFIG, lambda hello: None, TransferCounters())

    async def pull(self, pull_id: bytes = bytes(16)) -> str:
        return await self.answer(PullAsk(pull_id, PULL, "r", 1, HASHES[0]))

    async def answer(self, ask: Message | bytes) -> str:
        """ChannelLost where there is none."""
        async with grpc.aio.insecure_channel(self.home.me.address) as rpc:
            call = worker_pb2_grpc.PeerStub(rpc).Ask()
            channel = PeerChannel(call, CONFIG)
            await self._greeter.greet(channel, self.home.me)
            await (call.write(worker_pb2.PeerFrame(body=ask)) if isinstance(ask, bytes) else channel.write(ask))
            match await channel.read(5):
                case Answer(refusal=refusal) | HelloRefused(reason=refusal):
                    return refusal
        raise AssertionError("neither answered nor refused")


async def test_a_stranger_gets_nothing(pair: tuple[Worker, Worker]) -> None:
    home, asker = pair
    for me in (
        PeerRef("p1", "another-life", asker.me.address, Role.PREFILL),
        PeerRef("p9", "life", asker.me.address, Role.PREFILL),
    ):
        assert "not a member" in await Stranger(home, me).pull()
    assert home.agent.counters.num_refused_hellos == 2
    assert home.host.events == []
    assert home.agent.warm_links == ()


async def test_nobody_is_served_before_members_are_known() -> None:
    home = await Worker(Role.PREFILL, "p0", CONFIG, transport=MemoryTransport(CONFIG)).start()
    stranger = Stranger(home, PeerRef("p1", "life", "127.0.0.1:1", Role.PREFILL))
    assert "not known yet" in await stranger.pull()
    assert home.host.events == []
    await home.stop()


async def test_an_id_is_asked_for_once(pair: tuple[Worker, Worker]) -> None:
    home, asker = pair
    stranger = Stranger(home, asker.me)
    first = asyncio.create_task(stranger.pull())
    await home.host.next("asked", bytes(16))
    assert "before" in await stranger.pull()
    home.agent.refuse_pull(bytes(16), "no")
    assert await first == "no"
    assert len(home.host.of(bytes(16))) == 1


async def test_an_id_that_is_being_sent_or_thought_about_is_not_asked_for_again(pair: tuple[Worker, Worker]) -> None:
    home, asker = pair
    stranger = Stranger(home, asker.me)
    asker.agent._destination.expect(bytes(16), home.me, "r", 1, PULL)
    opened: list[PeerRef] = []
    home.host.answer_pull = lambda pull_id, destination: opened.append(destination)
    thinking = asyncio.create_task(stranger.pull())
    await home.host.next("asked", bytes(16))
    thinking.cancel()  # who asked has left; the host thinks on
    await asyncio.gather(thinking, return_exceptions=True)
    assert "before" in await stranger.pull()
    home.agent.open(bytes(16), opened[0], "r", 1, 2, PULL)
    assert "before" in await stranger.pull()
    assert len(home.host.of(bytes(16))) == 1
    home.agent.abort(bytes(16), "enough")
    await home.host.next("closed", bytes(16))


@pytest.mark.parametrize("ask", [b"\x80\x04\x95 pickled", Ping(), bytes(MAX_ASK_NBYTES + 1)])
async def test_what_asks_nothing_is_not_answered(pair: tuple[Worker, Worker], ask: Message | bytes) -> None:
    home, asker = pair
    with pytest.raises(ChannelLost, match="ended"):
        await Stranger(home, asker.me).answer(ask)
    assert home.host.events == []


async def test_the_more_urgent_chunks_go_first() -> None:
    """A long return is under way, and a pull of the same link overtakes it."""
    transport = MemoryTransport(CONFIG)
    home = await Worker(Role.PREFILL, "p0", CONFIG, seed=1, transport=transport).start()
    asker = await Worker(Role.PREFILL, "p1", CONFIG, transport=transport).start()
    membership(1, home, asker)
    home.store.gate.clear()
    serves(home, tuple(range(32)), TransferKind.RETURN)
    asker.grants(tuple(range(32)))
    returned = ask(asker, kind=TransferKind.RETURN)
    await until(lambda: home.store.num_inside > 0)
    serves(home, (40, 41))
    asker.grants((40, 41))
    pulled = ask(asker)
    await asker.host.next("offered", pulled)
    await asyncio.sleep(0.1)  # its grant is on its way
    home.store.gate.set()
    await asker.host.next("arrived", returned)
    ends = [event[1] for event in asker.host.events if event[0] == "arrived"]
    assert ends == [pulled, returned]
    assert torch.equal(asker.store.pool[[*range(32), 40, 41]], home.store.pool[[*range(32), 40, 41]])
    await home.stop()
    await asker.stop()
    assert home.agent.open_transfers == asker.agent.open_transfers == 0


async def test_an_offer_that_nobody_asked_for_is_refused(pair: tuple[Worker, Worker]) -> None:
    home, asker = pair
    assert await home.agent._source.warm(asker.me) == ""
    pull_id = secrets.token_bytes(16)
    home.agent.open(pull_id, asker.me, "r", 1, 2, PULL)
    assert (await home.host.next("refused", pull_id))[2] == "nobody here waits for it any more"
    assert asker.host.events == []
