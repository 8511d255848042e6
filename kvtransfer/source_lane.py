"""The sending end of one link at work: gather, checksum, send. Decides when a chunk's staging slot is free again; whose
chunk gets it, turns.py. Knows nothing about transfers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto

import torch

from kvtransfer.block_store import BlockStore
from kvtransfer.config import TransferConfig
from kvtransfer.lane_thread import LaneThread, Ticket
from kvtransfer.link_meter import LinkMeter
from kvtransfer.staging import StagingRing, as_bytes, checksum_of
from kvtransfer.transfer import URGENCY
from kvtransfer.transport import LinkFailed, SenderLink
from kvtransfer.turns import Turns
from protos.types import TransferKind

OnGathered = Callable[[bytes, int, int], None]  # transfer_id, seq, checksum
OnSent = Callable[[bytes, int], None]  # transfer_id, num_blocks


class _Phase(Enum):
    GATHERING = auto()  # waiting for a slot, for the thread, or being gathered
    STAGED = auto()


@dataclass(eq=False)
class _Chunk:
    transfer_id: bytes
    seq: int
    block_ids: tuple[int, ...]
    urgency: int  # less is more
    slot: int | None = None
    phase: _Phase = _Phase.GATHERING
    is_dropped: bool = False  # cancelled during its gather
    ticket: Ticket = field(default_factory=Ticket)


class SourceLane:
    """Methods run on the event loop, gathers and posts on the lane's thread; a second thread waits for sends, so that
    neither the next gather nor the next post waits for the wire. Invariant: a slot is free, or belongs to one chunk
    from before its gather until it was sent or dropped; blocks are read only between begin of a chunk's ticket and its
    on_gathered."""

    def __init__(
        self,
        name: str,
        link: SenderLink,
        store: BlockStore,
        config: TransferConfig,
        meter: LinkMeter,
        on_gathered: OnGathered,
        on_sent: OnSent,
    ) -> None:
        self.transport = link.transport
        self._link = link
        self._meter = meter
        self._store = store
        num_slot_blocks = config.num_chunk_blocks(store.layout.block_nbytes)
        self._slot_nbytes = num_slot_blocks * store.layout.block_nbytes
        self._ring = StagingRing(store.layout, config.num_staging_chunks, num_slot_blocks, link.allocate)
        self._checksum = checksum_of(config.checksum)
        self._on_gathered = on_gathered
        self._on_sent = on_sent
        self._loop = asyncio.get_running_loop()
        self._thread = LaneThread(name, store.device)
        self._waiter = LaneThread(f"{name}-wait", store.device)
        self._join_timeout_s = config.connect_timeout_s + config.chunk_timeout_s
        self._turns: Turns[_Chunk] = Turns()
        self._chunks: dict[tuple[bytes, int], _Chunk] = {}  # not yet handed to the wire
        self._next_number = 0

    @property
    def num_queued(self) -> int:
        """Chunks that are not on the wire yet."""
        return len(self._chunks)

    async def connect(self) -> None:
        await self._thread.run(self._link.connect)

    def gather(self, transfer_id: bytes, seq: int, block_ids: tuple[int, ...], kind: TransferKind) -> None:
        chunk = _Chunk(transfer_id, seq, block_ids, URGENCY.index(kind))
        self._chunks[transfer_id, seq] = chunk
        self._turns.wait(chunk)
        self._fill_slots()

    def send(self, transfer_id: bytes, seq: int, number: int) -> None:
        """Send a staged chunk as operation `number`; its slot is free again once it is gone."""
        chunk = self._chunks.pop((transfer_id, seq))
        assert chunk.phase is _Phase.STAGED and chunk.slot is not None
        if self._take_number(number):
            staged = self._staged(chunk)
            self._thread.submit(lambda: self._send(number, as_bytes(staged), chunk))
        else:
            self._free(chunk)

    def send_filler(self, number: int, num_bytes: int) -> None:
        if not 0 < num_bytes <= self._slot_nbytes:
            self._link.fail(f"{num_bytes} bytes asked for, a chunk has at most {self._slot_nbytes}")
        elif self._take_number(number):
            self._thread.submit(lambda: self._send(number, torch.zeros(num_bytes, dtype=torch.uint8), None))

    def cancel(self, transfer_id: bytes) -> list[int]:
        """Drop what is not on the wire. Answers the chunks whose gather has not begun and never will."""
        cancelled = []
        for chunk in [chunk for chunk in self._chunks.values() if chunk.transfer_id == transfer_id]:
            if chunk.phase is _Phase.STAGED:
                del self._chunks[transfer_id, chunk.seq]
                self._free(chunk)
            elif chunk.ticket.cancel():
                del self._chunks[transfer_id, chunk.seq]
                cancelled.append(chunk.seq)
            else:
                chunk.is_dropped = True
        self._turns.drop(transfer_id)
        return cancelled

    async def close(self) -> None:
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        """In this order: the link's end wakes the waiter, and the first thread may still give it work."""
        self._link.close()
        self._thread.close(self._join_timeout_s)
        self._waiter.close(self._join_timeout_s)

    def _take_number(self, number: int) -> bool:
        """False for one that was sent before. A gap means that a `ready` was lost: the link cannot go on."""
        if number == self._next_number:
            self._next_number += 1
            return True
        if number > self._next_number:
            self._link.fail(f"operation {number} asked for, {self._next_number} is next")
        return False

    def _fill_slots(self) -> None:
        while (chunk := self._turns.take(self._ring.num_free)) is not None:
            chunk.slot = self._ring.take()
            self._thread.submit(lambda chunk=chunk: self._gather(chunk))  # type: ignore[misc]

    def _free(self, chunk: _Chunk) -> None:
        assert chunk.slot is not None
        self._ring.release(chunk.slot)
        self._turns.give_back(chunk)
        self._fill_slots()

    def _sent(self, chunk: _Chunk) -> None:
        self._free(chunk)
        self._on_sent(chunk.transfer_id, len(chunk.block_ids))

    def _staged(self, chunk: _Chunk) -> torch.Tensor:
        assert chunk.slot is not None
        return self._ring.blocks(chunk.slot, len(chunk.block_ids))

    # --- on the threads ---------------------------------------------------------------------------------------------

    def _gather(self, chunk: _Chunk) -> None:
        if not chunk.ticket.begin():
            self._loop.call_soon_threadsafe(self._free, chunk)
        else:
            staged = self._staged(chunk)
            self._store.gather(chunk.block_ids, staged)
            digest = self._checksum(as_bytes(staged))
            self._loop.call_soon_threadsafe(self._gathered, chunk, digest)

    def _gathered(self, chunk: _Chunk, digest: int) -> None:
        """On the event loop, unlike its neighbours."""
        chunk.phase = _Phase.STAGED
        if chunk.is_dropped:
            del self._chunks[chunk.transfer_id, chunk.seq]
            self._free(chunk)
        self._on_gathered(chunk.transfer_id, chunk.seq, digest)

    def _send(self, number: int, data: torch.Tensor, chunk: _Chunk | None) -> None:
        try:
            self._link.post(number, data)
        except LinkFailed:
            return  # it has said so itself; the ring goes with the link
        began_at = time.monotonic()
        self._waiter.submit(lambda: self._await_sent(number, chunk, began_at))

    def _await_sent(self, number: int, chunk: _Chunk | None, began_at: float) -> None:
        try:
            sent = self._link.wait(number)
        except LinkFailed:
            return
        self._meter.count(sent.numel(), began_at, time.monotonic())
        if chunk is not None:
            self._loop.call_soon_threadsafe(self._sent, chunk)
