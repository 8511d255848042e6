"""How long a small transfer waits beside a long one of the same link, in virtual time: wherever the chunks queue, on
the wire or for being written, one whole chunk of the long one goes before it, and what is left of one under way."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random

import grpc
import pytest
import torch

from kvtransfer import memory_link
from kvtransfer.agent import TransferAgent
from kvtransfer.config import TransferConfig
from kvtransfer.memory_link import MemoryTransport, MemoryWire
from kvtransfer.messages import Chunk, decode
from protos.types import PeerRef, Role
from tests.kvtransfer.virtual_network import DELAY_S, Network
from tests.kvtransfer.virtual_time import Turns, VirtualCondition, VirtualLoop, taking_turns
from tests.kvtransfer.workers import LAYOUT, SECRET, RecordingHost, TensorStore, until

CONFIG = TransferConfig(chunk_nbytes=2 * LAYOUT.block_nbytes)
CHUNK_S = 0.010  # ten messages' time
LONG, SMALL = tuple(range(50)), (60,)  # 25 chunks, and one that is known by its length


@dataclass
class Log:
    """When what takes CHUNK_S began, and whether it was the small one's; when that one was announced."""

    begun: list[tuple[float, bool]] = field(default_factory=list)
    announced_at: float = 0.0

    @property
    def num_before_the_small_one(self) -> int:
        """Of the long one's, begun since."""
        (small_at,) = (at for at, is_small in self.begun if is_small)
        return sum(self.announced_at < at < small_at for at, _ in self.begun)


class SlowWire(MemoryWire):
    """One operation at a time, CHUNK_S each."""

    def __init__(self, loop: VirtualLoop, log: Log) -> None:
        super().__init__(changed=VirtualCondition())  # type: ignore[arg-type]
        self._loop, self._log = loop, log
        self._is_moving = False

    def move(self) -> None:
        if not self._is_moving and self.num_done in self.sent and self.num_done in self.posted:
            self._is_moving = True
            is_small = self.sent[self.num_done].numel() == LAYOUT.block_nbytes
            self._log.begun.append((self._loop.time(), is_small))
            self._loop.call_later(CHUNK_S, self._moved)
        self.changed.notify_all()

    def _moved(self) -> None:
        self._is_moving = False
        self.posted.pop(self.num_done).copy_(self.sent.pop(self.num_done))
        self.num_done += 1
        self.move()


class SlowStore(TensorStore):
    """Writing a chunk takes CHUNK_S."""

    def __init__(self, turns: Turns, log: Log) -> None:
        super().__init__()
        self._turns, self._log = turns, log

    def scatter(self, block_ids: Sequence[int], staged: torch.Tensor) -> None:
        self._log.begun.append((self._turns.loop.time(), tuple(block_ids) == SMALL))
        self._turns.sleep(CHUNK_S)
        super().scatter(block_ids, staged)


class Listening:
    """A network that loses nothing, and notes when the small one's chunk is announced."""

    def __init__(self, loop: VirtualLoop, log: Log) -> None:
        self._loop, self._log = loop, log

    def fates(self, sender: str, receiver: str, body: bytes, to_dialler: bool) -> list[tuple[float, bytes]]:
        message = decode(body)
        if isinstance(message, Chunk) and message.num_blocks == len(SMALL):
            self._log.announced_at = self._loop.time() + DELAY_S
        return [(DELAY_S, body)]


@dataclass
class Side:
    me: PeerRef
    agent: TransferAgent
    host: RecordingHost


class Pair:
    """Two agents and a link, in virtual time."""

    def __init__(self, turns: Turns, log: Log, is_slow_to_write: bool) -> None:
        self.network = Network(Listening(turns.loop, log))
        self._transport = MemoryTransport(CONFIG)
        self.source = self._side("p0", "d0", Role.PREFILL, TensorStore(seed=1))
        store = SlowStore(turns, log) if is_slow_to_write else TensorStore()
        self.destination = self._side("d0", "p0", Role.DECODE, store)

    def _side(self, name: str, other: str, role: Role, store: TensorStore) -> Side:
        me, host = PeerRef(name, name, f"{other}>{name}", role), RecordingHost()
        agent = TransferAgent(me, store, host, CONFIG, SECRET, self._transport)
        agent.add_to_server(self.network.join(name))  # type: ignore[arg-type]
        return Side(me, agent, host)

    async def start(self) -> None:
        for side in (self.source, self.destination):
            await side.agent.start()
            side.agent.set_members(1, (self.source.me, self.destination.me))
        await until(lambda: self.source.agent.warm_links == ("d0",))

    def hand_over(self, block_ids: tuple[int, ...]) -> bytes:
        source, destination = self.source, self.destination
        destination.host.answer = lambda transfer_id, _: destination.agent.grant(transfer_id, 0, block_ids)
        transfer_id = secrets.token_bytes(16)
        destination.agent.expect(transfer_id, source.me, "r", 1)
        source.agent.open(transfer_id, destination.me, "r", 1, len(block_ids))
        source.agent.send_blocks(transfer_id, 0, block_ids)
        source.agent.commit(transfer_id, 0, (1,))
        return transfer_id

    async def close(self) -> None:
        await self.source.agent.close()
        await self.destination.agent.close()


@pytest.mark.parametrize("phase", range(10))
@pytest.mark.parametrize("slow", ["wire", "writing"])
def test_one_chunk_of_a_long_transfer_goes_before_a_small_one(slow: str, phase: int) -> None:
    """The wire is what takes longest over gloo, writing over shared memory. The small one comes at any time."""
    loop, log = VirtualLoop(), Log()
    with taking_turns(loop, Random(phase)) as turns, pytest.MonkeyPatch.context() as patch:
        slow_wire = partial(SlowWire, loop, log)
        fast_wire = partial(MemoryWire, changed=VirtualCondition())  # type: ignore[arg-type]
        patch.setattr(memory_link, "MemoryWire", slow_wire if slow == "wire" else fast_wire)

        async def both() -> None:
            pair = Pair(turns, log, slow == "writing")
            patch.setattr(grpc.aio, "insecure_channel", pair.network.channel)
            await pair.start()
            long_one = pair.hand_over(LONG)
            await until(lambda: len(log.begun) == 5)
            await asyncio.sleep(phase * CHUNK_S / 10)
            small_one = pair.hand_over(SMALL)
            await pair.destination.host.next("arrived", small_one)
            await pair.destination.host.next("arrived", long_one)
            await pair.close()

        loop.run_until_complete(both())
        loop.close()
        assert not turns.bugs
    assert len(log.begun) == len(LONG) // 2 + 1
    assert log.num_before_the_small_one <= 1
