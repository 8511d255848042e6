"""Which transport a link gets, how its ends find each other on one machine, and what becomes of either without the
other."""

from __future__ import annotations

import errno
import os
import secrets
import socket
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch

from bench._killed_peer import noticed_s
from kvtransfer.config import TransferConfig, TransportName
from kvtransfer.life_mark import MARK_NBYTES, is_marked
from kvtransfer.local_socket import Beacon, MeetingPoint, go_to, is_here
from kvtransfer.segment import make_segment, map_segment, receive_segment, send_segment
from kvtransfer.shared_memory_link import SharedMemoryTransport
from kvtransfer.transport import LinkFailed
from kvtransfer.transports import LocalFirst
from protos.types import Role
from tests.kvtransfer.test_links import Ends
from tests.kvtransfer.workers import CONFIG, Worker, membership, until


@pytest.mark.parametrize(
    ("dialling", "dialled", "expected"),
    [
        ("auto", "auto", "shared_memory"),
        ("shared_memory", "auto", "shared_memory"),
        ("gloo", "auto", "gloo"),
        ("auto", "gloo", "gloo"),
        ("gloo", "shared_memory", ""),
        ("shared_memory", "gloo", ""),
    ],
)
async def test_each_end_can_rule_shared_memory_out_or_insist(
    dialling: TransportName, dialled: TransportName, expected: str
) -> None:
    source = await Worker(Role.PREFILL, "p0", replace(CONFIG, transport=dialling), seed=1).start()
    destination = await Worker(Role.DECODE, "d0", replace(CONFIG, transport=dialled)).start()
    membership(1, source, destination)
    if expected:
        await source.warm("d0")
    else:
        await until(lambda: source.agent.stats.links[0].num_failures > 0)
    (link,) = source.agent.stats.links
    assert (link.worker_id, link.transport) == ("d0", expected)
    assert (link.num_failures > 0) == (not expected)
    await source.stop()
    await destination.stop()


async def test_without_memory_to_share_the_link_is_made_over_gloo(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(name: str, flags: int) -> int:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(os, "memfd_create", refuse)
    source = await Worker(Role.PREFILL, "p0", CONFIG, seed=1).start()
    destination = await Worker(Role.DECODE, "d0", CONFIG).start()
    membership(1, source, destination)
    await source.warm("d0")
    assert source.agent.stats.links[0].transport == "gloo"
    assert "no shared memory for KV links" in caplog.text
    await source.stop()
    await destination.stop()


def test_a_beacon_is_seen_for_as_long_as_it_is_lit() -> None:
    beacon = Beacon()
    assert is_here(beacon.name)
    assert not is_here(secrets.token_hex(16))
    beacon.close()
    assert not is_here(beacon.name)


def test_who_knows_only_the_public_name_is_sent_away() -> None:
    point = MeetingPoint()
    met: list[socket.socket] = []
    waiting = threading.Thread(target=lambda: met.append(point.meet(5.0)))
    waiting.start()
    for wrong in (point.key[:16] + "0" * 64, point.key[:48] + "0" * 32):  # neither secret, and not the other's
        with pytest.raises(OSError, match=r"meant|reset|Broken|refused"):
            go_to(wrong, 1.0).close()
    waiting.join()
    (end,) = met  # who knew what the visitor has to say, though not the answer
    end.close()
    point.close()


def test_closing_wakes_who_waits() -> None:
    point = MeetingPoint()
    woken: list[OSError] = []

    def wait() -> None:
        try:
            point.meet(30.0)
        except OSError as error:
            woken.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    point.close()
    waiting.join(5.0)
    assert woken
    with pytest.raises(OSError, match="refused"):
        go_to(point.key, 1.0)


def test_memory_goes_from_one_to_the_other_and_has_no_name() -> None:
    before = set(os.listdir("/dev/shm"))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    descriptor = make_segment(1 << 16)
    send_segment(ours, descriptor)
    received = receive_segment(theirs)
    mine, other = map_segment(descriptor), map_segment(received)
    mine.random_(0, 256)
    assert torch.equal(mine, other)
    assert set(os.listdir("/dev/shm")) == before
    with pytest.raises(OSError, match="not permitted"):
        os.ftruncate(received, 0)
    unsealed = os.memfd_create("unsealed")
    send_segment(ours, unsealed)
    with pytest.raises(OSError, match="sealed"):
        receive_segment(theirs)
    for each in (descriptor, received, unsealed):
        os.close(each)
    ours.close()
    theirs.close()


@pytest.mark.parametrize(
    "word", [(0, 0, 999), (0, 8 << 20, 1000), (0, 3, 1000), (0, (1 << 64) - 8, 1000), (5, 0, 1000)], ids=str
)
def test_a_sender_that_points_elsewhere_fails_the_link(word: tuple[int, int, int]) -> None:
    transport = SharedMemoryTransport(TransferConfig(chunk_timeout_s=5.0))
    ends = Ends(transport)
    ends.receiver.post(0, torch.zeros(1000, dtype=torch.uint8))
    ends.sender._say(*word)  # type: ignore[attr-defined]
    with pytest.raises(LinkFailed):
        ends.receiver.wait(0)
    ends.close()  # and with it the thread that may be telling of it
    transport.close()
    assert ends.failures["receiver"]


def test_shared_memory_is_not_offered_to_who_is_elsewhere() -> None:
    links = LocalFirst(TransferConfig())
    link = links.listen(secrets.token_hex(16), lambda reason: None)
    assert link.transport == link.offer.transport == "gloo"
    link.close()
    links.close()


@pytest.mark.parametrize("transport", ["gloo", "shared_memory"])
def test_a_killed_peer_is_noticed_at_once(transport: TransportName) -> None:
    """Its own deadline would take a minute. 50 ms on a machine that has nothing else to do (docs/benchmarks.md)."""
    assert noticed_s(transport) < 1.0


_MARKED_CHILD = """
import os, sys, time, torch
from kvtransfer.life_mark import MARK_NBYTES, marking
from kvtransfer.segment import map_segment
left, killed = map_segment(int(sys.argv[1])).view(2, MARK_NBYTES)
with marking(left):
    pass
with marking(killed):
    print("in", flush=True)
    time.sleep(60)
"""


def test_a_mark_is_set_by_being_killed_and_not_by_leaving() -> None:
    descriptor = make_segment(2 * MARK_NBYTES)
    left, killed = map_segment(descriptor).view(2, MARK_NBYTES)
    arguments = [sys.executable, "-c", _MARKED_CHILD, str(descriptor)]
    with subprocess.Popen(arguments, pass_fds=[descriptor], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"in\n"
        assert not is_marked(left) and not is_marked(killed)
        child.kill()
    assert (is_marked(left), is_marked(killed)) == (False, True)
    os.close(descriptor)
