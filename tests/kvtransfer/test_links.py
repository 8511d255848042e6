"""What every link must do, run by each implementation."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from kvtransfer.config import TransferConfig
from kvtransfer.gloo_link import GlooTransport
from kvtransfer.memory_link import MemoryTransport
from kvtransfer.messages import LinkOffer
from kvtransfer.shared_memory_link import SharedMemoryTransport
from kvtransfer.transport import LinkFailed, ReceiverLink, SenderLink, Transport

CONFIG = TransferConfig(chunk_timeout_s=0.3, connect_timeout_s=1.0)


class Ends:
    """A connected link, and what its ends said about failure."""

    def __init__(self, transport: Transport) -> None:
        self.failures: dict[str, list[str]] = {"receiver": [], "sender": []}
        self.receiver: ReceiverLink = transport.listen(transport.beacon, self.failures["receiver"].append)
        self.sender: SenderLink = transport.dial(self.receiver.offer, self.failures["sender"].append)
        self.memory = self.sender.allocate(8 << 20)
        thread = threading.Thread(target=self.receiver.connect)
        thread.start()
        self.sender.connect()
        thread.join()

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()

    def both_failed(self) -> bool:
        return all(self.failures.values())

    def fill(self, value: int, num_bytes: int = 1000) -> torch.Tensor:
        """To be sent: in memory of its own for each value."""
        return self.memory[value << 12 :][:num_bytes].fill_(value)


MAKERS: dict[str, Callable[[TransferConfig], Transport]] = {
    "memory": MemoryTransport,
    "gloo": GlooTransport,
    "shared_memory": SharedMemoryTransport,
}


@pytest.fixture(params=MAKERS)
def transport(request: pytest.FixtureRequest) -> Iterator[Transport]:
    made = MAKERS[request.param](CONFIG)
    yield made
    made.close()


@pytest.fixture
def ends(transport: Transport) -> Iterator[Ends]:
    made = Ends(transport)
    yield made
    made.close()


def data(fill: int, num_bytes: int = 1000) -> torch.Tensor:
    return torch.full((num_bytes,), fill, dtype=torch.uint8)


def soon(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_operations_pair_by_number(ends: Ends) -> None:
    buffers = [data(0) for _ in range(3)]
    for number, buffer in enumerate(buffers):
        ends.receiver.post(number, buffer)
    for number in range(3):
        ends.sender.post(number, ends.fill(number + 1))
    for number in range(3):
        assert ends.receiver.wait(number).tolist() == [number + 1] * 1000
        ends.receiver.release(number)
        ends.sender.wait(number)
    assert not ends.failures["receiver"]
    assert not ends.failures["sender"]


def test_a_large_operation(ends: Ends) -> None:
    sent = ends.memory.random_(0, 256)
    buffer = torch.zeros_like(sent)
    ends.receiver.post(0, buffer)
    ends.sender.post(0, sent)
    assert torch.equal(ends.receiver.wait(0), sent)
    ends.receiver.release(0)
    ends.sender.wait(0)


def test_filler_has_its_length_and_its_number(ends: Ends) -> None:
    for number in range(2):
        ends.receiver.post(number, data(0))
    ends.sender.post(0, torch.zeros(1000, dtype=torch.uint8))
    ends.sender.post(1, ends.fill(7))
    for number in range(2):
        assert ends.receiver.wait(number).numel() == 1000
        ends.receiver.release(number)
        ends.sender.wait(number)


def test_the_sender_waits_until_its_bytes_were_read(ends: Ends) -> None:
    """Or have left for good: in either case they may be written over then."""
    ends.receiver.post(0, data(0))
    ends.sender.post(0, ends.fill(5))
    received = ends.receiver.wait(0)
    writes_over = threading.Thread(target=lambda: (ends.sender.wait(0), ends.fill(6)))
    writes_over.start()
    time.sleep(0.02)
    assert received.eq(5).all()
    ends.receiver.release(0)
    writes_over.join()


def test_numbers_have_no_gaps(ends: Ends) -> None:
    ends.receiver.post(0, data(0))
    with pytest.raises(AssertionError):
        ends.receiver.post(2, data(0))


def test_a_missed_deadline_fails_both_ends_for_good(ends: Ends) -> None:
    ends.receiver.post(0, data(0))
    with pytest.raises(LinkFailed):
        ends.receiver.wait(0)
    soon(ends.both_failed)
    with pytest.raises(LinkFailed):
        ends.receiver.post(1, data(0))
    with pytest.raises(LinkFailed):
        ends.sender.post(0, data(0))
    assert len(ends.failures["receiver"]) == len(ends.failures["sender"]) == 1


@pytest.mark.parametrize("closing", ["sender", "receiver"])
def test_close_wakes_waiters_at_both_ends(transport: Transport, closing: str) -> None:
    patient = with_config(transport, chunk_timeout_s=30.0)
    ends = Ends(patient)
    ends.receiver.post(0, data(0))
    woken = threading.Event()

    def wait() -> None:
        try:
            ends.receiver.wait(0)
        except LinkFailed:
            woken.set()

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.05)
    getattr(ends, closing).close()
    thread.join(5)
    assert woken.is_set()
    other = "receiver" if closing == "sender" else "sender"
    soon(lambda: ends.failures[other])
    assert not ends.failures[closing], "an end does not report its own closing"
    ends.close()
    patient.close()


def with_config(transport: Transport, **changes: float) -> Transport:
    """The same kind of transport under another config."""
    (make,) = [make for make in MAKERS.values() if type(transport) is make]
    return make(replace(CONFIG, **changes))


def test_breaking_the_rules_fails_the_link(ends: Ends) -> None:
    ends.sender.fail("operation 7 asked for, 0 is next")
    assert ends.failures["sender"] == ["operation 7 asked for, 0 is next"]
    with pytest.raises(LinkFailed, match="operation 7"):
        ends.sender.post(0, data(0))


def test_nobody_at_the_other_end(transport: Transport) -> None:
    failures: list[str] = []
    link = transport.listen("", failures.append)
    with pytest.raises(LinkFailed):
        link.connect()
    assert len(failures) == 1
    link.close()


def test_close_is_repeatable_and_possible_before_connect(transport: Transport) -> None:
    link = transport.listen("", lambda reason: None)
    link.close()
    link.close()
    with pytest.raises(LinkFailed):
        link.connect()


def test_every_link_has_a_prefix_of_its_own(transport: Transport) -> None:
    links = [transport.listen("", lambda reason: None) for _ in range(5)]
    assert len({link.offer.prefix for link in links}) == 5
    for link in links:
        link.close()


def test_links_leave_nothing_behind(transport: Transport) -> None:
    def count() -> tuple[int, int]:
        gc.collect()
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    Ends(transport).close()
    soon(lambda: not canaries())
    before = count()
    for index in range(20):
        ends = Ends(transport)
        if index % 2:  # broken rather than closed
            ends.receiver.post(0, data(0))
            ends.sender.close()
            with pytest.raises(LinkFailed):
                ends.receiver.wait(0)
        ends.close()
        del ends
    soon(lambda: count() <= before)


def canaries() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "kv-canary"]


def test_gloo_listens_where_it_is_told() -> None:
    """A TCPStore left to itself listens on every interface."""
    transport = GlooTransport(CONFIG)
    offer = transport.listen("", lambda reason: None).offer
    assert isinstance(offer, LinkOffer)
    assert offer.host == "127.0.0.1"
    with open("/proc/net/tcp") as tcp, open("/proc/net/tcp6") as tcp6:
        listening = [line.split()[1] for line in [*tcp, *tcp6] if f":{offer.port:04X} " in line.split("rem")[0][:60]]
    addresses = {address.split(":")[0] for address in listening if address.endswith(f":{offer.port:04X}")}
    assert addresses == {"0100007F"}
    transport.close()
