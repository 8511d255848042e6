"""The receiving end of one link at work: receive, verify, scatter. Decides when a chunk gets a staging slot and the
next number on the link; whose chunk it is, turns.py. Knows nothing about transfers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from kvtransfer.block_store import BlockStore
from kvtransfer.config import TransferConfig
from kvtransfer.lane_thread import LaneThread, Ticket
from kvtransfer.staging import StagingRing, as_bytes, checksum_of
from kvtransfer.transfer import URGENCY
from kvtransfer.transport import LinkFailed, ReceiverLink
from kvtransfer.turns import Turns
from protos.types import TransferFailure, TransferKind

OnPosted = Callable[[bytes, int, int, int], None]  # transfer_id, seq, number, num_bytes
OnEnded = Callable[[bytes, int, str, TransferFailure], None]  # transfer_id, seq, error, of what class


@dataclass(eq=False)
class _Chunk:
    transfer_id: bytes
    seq: int
    block_ids: tuple[int, ...]
    checksum: int
    urgency: int  # less is more
    slot: int = -1
    number: int = -1
    is_cancelled: bool = False  # on_ended has been or need not be called
    ticket: Ticket = field(default_factory=Ticket)


class DestinationLane:
    """Methods run on the event loop; waiting, verifying and scattering on the lane's thread. Invariant: a slot is free,
    or belongs to one chunk from before its receive is posted until the link and the scatter are done with it; blocks
    are written only between begin of a chunk's ticket and its on_ended."""

    def __init__(
        self,
        name: str,
        link: ReceiverLink,
        store: BlockStore,
        config: TransferConfig,
        on_posted: OnPosted,
        on_ended: OnEnded,
    ) -> None:
        self._link = link
        self._store = store
        num_slot_blocks = config.num_chunk_blocks(store.layout.block_nbytes)
        self._ring = StagingRing(store.layout, config.num_receives, num_slot_blocks, link.allocate)
        self._verifies = config.checksum != "none"
        self._checksum = checksum_of(config.checksum)
        self._corrupt = _flip_bytes if config.failpoint == "flip_received_bytes" else None
        self._on_posted = on_posted
        self._on_ended = on_ended
        self._loop = asyncio.get_running_loop()
        self._thread = LaneThread(name, store.device)
        self._join_timeout_s = config.connect_timeout_s + config.chunk_timeout_s
        self._turns: Turns[_Chunk] = Turns()
        self._posted: dict[tuple[bytes, int], _Chunk] = {}
        self._next_number = 0

    async def connect(self) -> None:
        await self._thread.run(self._link.connect)

    def receive(
        self, transfer_id: bytes, seq: int, block_ids: tuple[int, ...], checksum: int, kind: TransferKind
    ) -> None:
        chunk = _Chunk(transfer_id, seq, block_ids, checksum, URGENCY.index(kind))
        self._turns.wait(chunk)
        self._post_waiting()

    def cancel(self, transfer_id: bytes) -> list[int]:
        """Answers the chunks whose scatter has not begun and never will. Their bytes may still come, into staging."""
        dropped = self._turns.drop(transfer_id)
        for chunk in self._posted.values():
            if chunk.transfer_id == transfer_id and chunk.ticket.cancel():
                chunk.is_cancelled = True
                dropped.append(chunk)
        return [chunk.seq for chunk in dropped]

    async def close(self) -> None:
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        """In this order: the link's end wakes the thread."""
        self._link.close()
        self._thread.close(self._join_timeout_s)

    def _post_waiting(self) -> None:
        while (chunk := self._turns.take(self._ring.num_free, num_kept=0)) is not None:
            slot = self._ring.take()
            assert slot is not None
            chunk.slot, chunk.number = slot, self._next_number
            self._next_number += 1
            self._posted[chunk.transfer_id, chunk.seq] = chunk
            data = as_bytes(self._staged(chunk))
            try:
                self._link.post(chunk.number, data)
            except LinkFailed as failure:
                self._loop.call_soon(self._finished, chunk, str(failure), TransferFailure.LINK_LOST)
                continue
            self._thread.submit(lambda chunk=chunk: self._take_in(chunk))  # type: ignore[misc]
            self._on_posted(chunk.transfer_id, chunk.seq, chunk.number, data.numel())

    def _staged(self, chunk: _Chunk) -> torch.Tensor:
        return self._ring.blocks(chunk.slot, len(chunk.block_ids))

    def _finished(self, chunk: _Chunk, error: str, failure: TransferFailure) -> None:
        del self._posted[chunk.transfer_id, chunk.seq]
        self._ring.release(chunk.slot)
        self._turns.give_back(chunk)
        if not chunk.is_cancelled:
            self._on_ended(chunk.transfer_id, chunk.seq, error, failure)
        self._post_waiting()

    # --- on the thread ----------------------------------------------------------------------------------------------

    def _take_in(self, chunk: _Chunk) -> None:
        try:
            received = self._link.wait(chunk.number)
        except LinkFailed as failed:
            error, failure = f"link failed: {failed}", TransferFailure.LINK_LOST
        else:
            error, failure = self._verify_and_scatter(chunk, received), TransferFailure.CORRUPT
            with suppress(LinkFailed):  # what is written is written
                self._link.release(chunk.number)
        self._loop.call_soon_threadsafe(self._finished, chunk, error, failure)

    def _verify_and_scatter(self, chunk: _Chunk, received: torch.Tensor) -> str:
        if self._corrupt is not None:
            self._corrupt(received)
        if self._verifies and self._checksum(received) != chunk.checksum:
            return f"checksum mismatch in chunk {chunk.seq}"
        if not chunk.ticket.begin():
            return "cancelled"
        staged = self._staged(chunk)
        self._store.scatter(chunk.block_ids, received.view(staged.dtype).view(staged.shape))
        return ""


def _flip_bytes(data: torch.Tensor) -> None:
    data.bitwise_not_()  # all of them: one low bit of one value might change no token
