"""Whose chunk goes next: every chunk once, the urgent first, nobody behind a long transfer for long."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.config import TransportName
from kvtransfer.turns import Turns
from protos.types import Role
from tests.kvtransfer.workers import CONFIG, TensorStore, Worker, membership, until

NUM_SLOTS = 4


@dataclass(frozen=True)
class Waiting:
    transfer_id: bytes
    seq: int
    urgency: int


def waiting(transfer: int, num_chunks: int, urgency: int = 0) -> list[Waiting]:
    return [Waiting(bytes([transfer]), seq, urgency) for seq in range(num_chunks)]


@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from(["wait", "take", "give back", "drop"])), max_size=80))
def test_every_chunk_is_taken_once_in_order_or_dropped(steps: list[tuple[int, str]]) -> None:
    turns: Turns[Waiting] = Turns()
    held: list[Waiting] = []
    queued: list[Waiting] = []
    for seq, (transfer, step) in enumerate(steps):
        if step == "wait":
            queued.append(Waiting(bytes([transfer]), seq, transfer % 2))
            turns.wait(queued[-1])
        elif step == "drop":
            dropped = [chunk for chunk in queued if chunk.transfer_id == bytes([transfer])]
            assert turns.drop(bytes([transfer])) == dropped
            queued = [chunk for chunk in queued if chunk not in dropped]
        elif step == "give back" and held:
            turns.give_back(held.pop(0))
        elif step == "take":
            num_free = NUM_SLOTS - len(held)
            chunk = turns.take(num_free)
            if chunk is None:
                owners = {each.transfer_id for each in held}
                urgent = [each for each in queued if each.urgency == min(other.urgency for other in queued)]
                assert not queued or not num_free or (num_free == 1 and owners >= {c.transfer_id for c in urgent})
                continue
            assert chunk == next(each for each in queued if each.transfer_id == chunk.transfer_id), "in order"
            assert chunk.urgency == min(each.urgency for each in queued)
            queued.remove(chunk)
            held.append(chunk)


def test_equals_take_turns() -> None:
    turns: Turns[Waiting] = Turns()
    for chunk in waiting(1, 20):
        turns.wait(chunk)
    held = [turns.take(num_free) for num_free in (4, 3, 2)]
    assert turns.take(1) is None, "the last slot is for another transfer"
    for chunk in waiting(2, 2):
        turns.wait(chunk)
    order = []
    num_free = 1
    for _ in range(5):
        if (taken := turns.take(num_free)) is not None:
            order.append(taken.transfer_id[0])
            held.append(taken)
            num_free -= 1
        oldest = held.pop(0)
        assert oldest is not None
        turns.give_back(oldest)
        num_free += 1
    assert order[:3] == [2, 1, 2]


class CountingStore(TensorStore):
    """Remembers which blocks were written, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[tuple[int, ...]] = []

    def scatter(self, block_ids: Sequence[int], staged: torch.Tensor) -> None:
        super().scatter(block_ids, staged)
        self.written.append(tuple(block_ids))


@pytest.mark.parametrize("transport", ["gloo", "shared_memory"])
async def test_a_short_handoff_overtakes_a_long_one(transport: TransportName) -> None:
    """Both are handoffs, over one link; the long one came first and has it all, as far as one transfer may."""
    half = CONFIG.chunk_nbytes // 2
    config = replace(CONFIG, chunk_nbytes=half, num_staging_chunks=NUM_SLOTS, transport=transport)
    source = await Worker(Role.PREFILL, "p0", config, seed=1).start()
    destination = Worker(Role.DECODE, "d0", config)
    destination.store = store = CountingStore()
    await destination.start()
    membership(1, source, destination)
    await source.warm("d0")
    store.gate.clear()
    long_one = await handoff(source, destination, tuple(range(50)))
    await until(lambda: store.num_inside > 0)
    short_one = await handoff(source, destination, (60,))
    await asyncio.sleep(0.1)  # as much of both is at the destination as can be
    store.gate.set()
    await destination.host.next("arrived", short_one)
    await destination.host.next("arrived", long_one)
    assert sorted(store.written) == [(block,) for block in [*range(50), 60]]
    assert store.written.index((60,)) <= 2, "it waits for what was being written, and the one behind that"
    await source.stop()
    await destination.stop()


async def handoff(source: Worker, destination: Worker, block_ids: tuple[int, ...]) -> bytes:
    """Between the same blocks of either pool."""
    transfer_id = secrets.token_bytes(16)
    destination.grants(block_ids)
    destination.agent.expect(transfer_id, source.me, "r", 1)
    source.agent.open(transfer_id, destination.me, "r", 1, len(block_ids))
    source.agent.send_blocks(transfer_id, 0, block_ids)
    source.agent.commit(transfer_id, 0, (1,))
    await destination.host.next("offered", transfer_id)
    return transfer_id
