"""Links that are polled: deadlines, aborts that hang, killed peers, and making them anew, over real process groups."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection

import pytest
import torch

from kvtransfer import polled_link
from kvtransfer.config import TransferConfig
from kvtransfer.cuda_ipc_link import read_note, write_note
from kvtransfer.messages import LinkOffer
from kvtransfer.transport import LinkFailed
from kvtransfer.transports import transport_for
from protos.types import Role
from tests.kvtransfer.gloo_wire import GlooWireTransport
from tests.kvtransfer.test_agent import start
from tests.kvtransfer.test_links import Ends, data, soon
from tests.kvtransfer.workers import CONFIG as AGENTS
from tests.kvtransfer.workers import LAYOUT, Worker, membership, until

CONFIG = TransferConfig(chunk_timeout_s=0.3, connect_timeout_s=2.0)


@pytest.fixture
def transport() -> Iterator[GlooWireTransport]:
    made = GlooWireTransport(CONFIG)
    yield made
    made.close()


@pytest.fixture
def ends(transport: GlooWireTransport) -> Iterator[Ends]:
    made = Ends(transport)
    yield made
    made.close()


def test_operations_pair_by_number(ends: Ends) -> None:
    buffers = [data(0) for _ in range(3)]
    for number, buffer in enumerate(buffers):
        ends.receiver.post(number, buffer)
    for number in range(3):
        ends.sender.post(number, ends.fill(number + 1))
    for number in range(3):
        assert ends.receiver.wait(number).tolist() == [number + 1] * 1000
        ends.sender.wait(number)
    with pytest.raises(AssertionError):
        ends.receiver.post(5, data(0))


def test_a_missed_deadline_aborts_once_and_is_told_once(ends: Ends, transport: GlooWireTransport) -> None:
    ends.receiver.post(0, data(0))
    ends.receiver.post(1, data(0))
    began_at = time.monotonic()
    with pytest.raises(LinkFailed, match="operation 0 missed its deadline"):
        ends.receiver.wait(0)
    assert 0.3 <= time.monotonic() - began_at < 2.0
    for late in (lambda: ends.receiver.wait(1), lambda: ends.receiver.post(2, data(0)), ends.receiver.connect):
        with pytest.raises(LinkFailed, match="operation 0 missed"):
            late()
    ends.receiver.close()
    assert ends.failures["receiver"] == ["operation 0 missed its deadline"]
    assert transport.wires[0].num_aborts == 1


def test_the_other_end_hears_of_it_by_its_own_next_operation(ends: Ends) -> None:
    ends.receiver.close()

    def send() -> None:
        ends.sender.post(0, ends.fill(1, 8 << 18))
        ends.sender.wait(0)

    with pytest.raises(LinkFailed):  # of either
        send()
    assert len(ends.failures["sender"]) == 1
    assert ends.failures["receiver"] == []


def test_an_abort_that_hangs_holds_nobody_up(
    ends: Ends, transport: GlooWireTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polled_link, "_MAX_ABORT_S", 0.2)
    hangs, abort = threading.Event(), transport.wires[0].abort
    monkeypatch.setattr(transport.wires[0], "abort", lambda: (hangs.wait(10), abort()))
    ends.receiver.post(0, data(0))
    began_at = time.monotonic()
    with pytest.raises(LinkFailed):
        ends.receiver.wait(0)
    ends.receiver.close()
    assert time.monotonic() - began_at < 2.0
    anew = Ends(transport)
    anew.receiver.post(0, data(0))
    anew.sender.post(0, anew.fill(9))
    assert anew.receiver.wait(0).eq(9).all()
    anew.close()
    hangs.set()


def test_what_connects_after_it_was_closed_is_given_up(transport: GlooWireTransport) -> None:
    link = transport.listen("", lambda reason: None)
    raised: list[LinkFailed] = []

    def connect() -> None:
        try:
            link.connect()
        except LinkFailed as failure:
            raised.append(failure)

    connecting = threading.Thread(target=connect)
    connecting.start()
    time.sleep(0.05)
    link.close()
    other = transport.dial(link.offer, lambda reason: None)
    other.connect()
    connecting.join(5)
    assert str(raised[0]) == "closed"
    soon(lambda: transport.wires[0].num_aborts == 2)
    assert transport.wires[0].group is None
    other.close()


def test_nobody_at_the_other_end() -> None:
    transport = GlooWireTransport(replace(CONFIG, connect_timeout_s=0.5))
    failures: list[str] = []
    link = transport.listen("", failures.append)
    with pytest.raises(LinkFailed):
        link.connect()
    assert len(failures) == 1
    link.close()
    transport.close()


def be_killed(offer: LinkOffer, pipe: Connection) -> None:
    link = GlooWireTransport(CONFIG).dial(offer, lambda reason: None)
    link.connect()
    pipe.send("connected")
    time.sleep(60)


def test_a_killed_peer_costs_one_link(transport: GlooWireTransport) -> None:
    link = transport.listen("", lambda reason: None)
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    patient = GlooWireTransport(replace(CONFIG, connect_timeout_s=30.0))
    link = patient.listen("", lambda reason: None)
    peer = spawn.Process(target=be_killed, args=(link.offer, theirs), daemon=True)
    peer.start()
    link.connect()
    assert ours.poll(30)
    link.post(0, data(0))
    peer.kill()
    began_at = time.monotonic()
    with pytest.raises(LinkFailed):
        link.wait(0)
    assert time.monotonic() - began_at < 1.0
    link.close()
    anew = Ends(transport)
    anew.close()
    peer.join()
    patient.close()


async def test_transfers_run_over_it_and_over_a_new_one_when_it_failed() -> None:
    config = replace(AGENTS, checksum="sum64")
    transports = [GlooWireTransport(config), GlooWireTransport(config)]
    source = await Worker(Role.PREFILL, "p0", config, seed=1, transport=transports[0]).start()
    destination = await Worker(Role.DECODE, "d0", config, transport=transports[1]).start()
    membership(1, source, destination)
    target = (40, 41, 42, 43, 44)
    destination.grants(target)
    for life in range(2):
        await source.warm("d0")
        transfer_id = start(source, destination, 5, request_id=f"r{life}")
        source.agent.send_blocks(transfer_id, 0, (3, 1, 4, 15, 9))
        source.agent.commit(transfer_id, 0, (17,))
        arrived = await destination.host.next("arrived", transfer_id)
        assert arrived[4] == 5 * LAYOUT.block_nbytes
        assert destination.store.pool[list(target)].equal(source.store.pool[[3, 1, 4, 15, 9]])
        await source.host.next("closed", transfer_id)
        destination.store.pool.zero_()
        (stats,) = source.agent.stats.links
        assert stats.transport == "polled"
        if life == 0:
            wire = transports[0].wires[-1]
            wire.abort()  # as when the device's side of it breaks
            broken = start(source, destination, 5, request_id="broken")
            source.agent.send_blocks(broken, 0, (3, 1, 4, 15, 9))
            source.agent.commit(broken, 0, (17,))
            await destination.host.next("lost", broken)
            await until(lambda: len(transports[0].wires) > 1)
    await source.stop()
    await destination.stop()
    assert source.agent.open_transfers == destination.agent.open_transfers == 0


def test_a_transport_between_gpus_needs_kv_on_one() -> None:
    for name in ("nccl", "cuda_ipc"):
        config = TransferConfig(transport=name, checksum="sum64")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="moves KV between GPUs, and it is on cpu"):
            transport_for(config, torch.device("cpu"))
        with pytest.raises(ValueError, match=f"checksum must be sum64 or none with transport {name}"):
            TransferConfig(transport=name)  # type: ignore[arg-type]


def test_a_note_is_read_as_it_was_written_and_nothing_else_is_one() -> None:
    memory = torch.zeros(4096, dtype=torch.uint8)
    handle = [0, 1000, 0, b"\x01" * 66, 2 << 20, 512, b"ref", 3, b"\x02" * 64, True]
    write_note(memory, handle)
    assert read_note(memory) == handle
    for broken in (torch.zeros(4096), torch.full((4096,), 255), torch.tensor([1] + [0] * 7 + [5] * 100)):
        with pytest.raises(ValueError, match="note"):
            read_note(broken.to(torch.uint8))
