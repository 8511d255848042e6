"""Peers that die, stop, or stall in the middle of a transfer."""

from __future__ import annotations

import asyncio
import json
import secrets
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, replace

import pytest_asyncio
import torch

from kvtransfer.memory_link import MemoryTransport
from protos.types import PeerRef, Role, TransferFailure
from tests.kvtransfer.workers import CONFIG, Worker, membership, until

torch.set_num_threads(1)


class PeerProcess:
    """A worker in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process, me: PeerRef) -> None:
        self.process, self.me = process, me

    async def order(self, peer: PeerRef, transfer_id: bytes, hangs: bool) -> None:
        line = json.dumps({"peer": asdict(peer), "transfer_id": transfer_id.hex(), "hangs": hangs}) + "\n"
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode())
        await self.process.stdin.drain()

    async def hears(self, word: str) -> str:
        line = await read_line(self.process)
        assert line.startswith(word), line
        return line


async def read_line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(60):
        return (await process.stdout.readline()).decode().strip()


@asynccontextmanager
async def peer_process(role: Role) -> AsyncIterator[PeerProcess]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.kvtransfer.peer_process", role, stdin=pipe, stdout=pipe
    )
    try:
        me = json.loads(await read_line(process))
        yield PeerProcess(process, PeerRef(**{**me, "role": role}))
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@pytest_asyncio.fixture
async def source() -> AsyncIterator[Worker]:
    worker = await Worker(Role.PREFILL, "p", CONFIG, seed=1).start()
    yield worker
    await worker.stop()
    assert worker.agent.open_transfers == 0


async def test_destination_killed_or_stopped_in_mid_transfer(source: Worker) -> None:
    async with peer_process(Role.DECODE) as victim, peer_process(Role.DECODE) as heir:
        transfer_id = await half_a_transfer(source, victim)
        victim.process.send_signal(signal.SIGKILL)
        await source.host.next("closed", transfer_id, timeout_s=2)
        # A new incarnation under the same name takes over.
        source.agent.set_members(2, (source.me, heir.me))
        await source.warm("d")
        again = secrets.token_bytes(16)
        await heir.order(source.me, again, hangs=False)
        await heir.hears("ready")
        source.agent.open(again, heir.me, "r", 1, 8)
        source.agent.send_blocks(again, 0, tuple(range(8)))
        source.agent.commit(again, 0, (1,))
        arrived = await heir.hears("arrived")
        assert float(arrived.split()[1]) == float(source.store.pool[:8].double().sum())
        await source.host.next("closed", again)
        # And when that one is stopped, silence tells.
        heir.process.send_signal(signal.SIGSTOP)
        await until(lambda: source.agent.warm_links == (), timeout_s=5)
        heir.process.send_signal(signal.SIGCONT)
        await source.warm("d")


async def half_a_transfer(source: Worker, peer: PeerProcess) -> bytes:
    transfer_id = secrets.token_bytes(16)
    source.agent.set_members(1, (source.me, peer.me))
    await peer.order(source.me, transfer_id, hangs=True)
    await peer.hears("ready")
    await source.warm("d")
    source.agent.open(transfer_id, peer.me, "r", 1, 8)
    source.agent.send_blocks(transfer_id, 0, tuple(range(8)))
    await peer.hears("in the middle")
    assert source.host.ends(transfer_id) == []
    return transfer_id


async def test_source_killed_in_mid_transfer() -> None:
    destination = await Worker(Role.DECODE, "d", CONFIG).start()
    destination.grants(range(8))
    async with peer_process(Role.PREFILL) as victim:
        membership_of_both = (destination.me, victim.me)
        destination.agent.set_members(1, membership_of_both)
        transfer_id = secrets.token_bytes(16)
        destination.agent.expect(transfer_id, victim.me, "r", 1)
        await victim.order(destination.me, transfer_id, hangs=True)
        await victim.hears("in the middle")
        await until(lambda: bool(destination.store.pool[3].any()))
        assert destination.host.ends(transfer_id) == []
        victim.process.send_signal(signal.SIGKILL)
        await destination.host.next("lost", transfer_id, timeout_s=2)
    assert destination.agent.stats.num_failed == ((TransferFailure.LINK_LOST, 1),)
    await destination.stop()


async def test_bytes_that_stall_end_both_sides_and_the_link_heals() -> None:
    config = replace(CONFIG, chunk_timeout_s=0.3)
    transport = MemoryTransport(config)
    source = await Worker(Role.PREFILL, "p", config, seed=1, transport=transport).start()
    destination = await Worker(Role.DECODE, "d", config, transport=transport).start()
    membership(1, source, destination)
    await source.warm("d")
    destination.grants(range(8))
    (wire,) = transport.wires.values()
    wire.stall()
    for attempt in (1, 2):
        transfer_id = secrets.token_bytes(16)
        destination.agent.expect(transfer_id, source.me, "r", attempt)
        source.agent.open(transfer_id, destination.me, "r", attempt, 8)
        source.agent.send_blocks(transfer_id, 0, tuple(range(8)))
        source.agent.commit(transfer_id, 0, (1,))
        await source.host.next("closed", transfer_id)
        assert await destination.host.next("lost" if attempt == 1 else "arrived", transfer_id)
        if attempt == 1:
            assert not destination.store.pool.any()
            await until(lambda: len(transport.wires) > 1)  # a new link, on a new prefix
            await source.warm("d")
    assert torch.equal(destination.store.pool[:8], source.store.pool[:8])
    await source.stop()
    await destination.stop()


async def test_an_offer_that_the_host_never_answers_is_refused_in_time() -> None:
    config = replace(CONFIG, offer_timeout_s=0.3)
    source = await Worker(Role.PREFILL, "p", config, seed=1).start()
    destination = await Worker(Role.DECODE, "d", config).start()
    membership(1, source, destination)
    await source.warm("d")
    transfer_id = secrets.token_bytes(16)
    destination.agent.expect(transfer_id, source.me, "r", 1)
    source.agent.open(transfer_id, destination.me, "r", 1, 8)
    await source.host.next("refused", transfer_id)
    await destination.host.next("lost", transfer_id)
    destination.agent.grant(transfer_id, 0, tuple(range(8)))  # late: ignored
    ends = {*dict(source.agent.stats.num_failed), *dict(destination.agent.stats.num_failed)}
    assert TransferFailure.TIMEOUT in ends, "whichever of the two noticed first"
    await source.stop()
    await destination.stop()
