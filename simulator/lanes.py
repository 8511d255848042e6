"""The two ends of one link between workers: staging slots, and the order of operations on the link. The live
counterparts are kvtransfer/source_lane.py and destination_lane.py; gathers and scatters take settable time here and
move nothing. Decides nothing about transfers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from simulator.clock import Clock
from simulator.network import Network

OnGathered = Callable[[bytes, int], None]  # transfer_id, seq
OnSent = Callable[[bytes, int], None]  # transfer_id, num_bytes
OnPosted = Callable[[bytes, int, int, int], None]  # transfer_id, seq, number, num_bytes
OnArrived = Callable[[int], None]  # number
OnEnded = Callable[[bytes, int], None]  # transfer_id, seq


@dataclass(slots=True, eq=False)
class _Chunk:
    transfer_id: bytes
    seq: int
    num_bytes: int
    has_begun: bool = False  # its blocks are being read or written
    is_staged: bool = False
    is_dropped: bool = False  # its transfer was cancelled


class SourceLane:
    """Gathers into staging, sends in the order that the other end asks for. Invariant: `_num_free` slots are free, the
    others belong to one chunk each, from before its gather until it was sent or dropped."""

    def __init__(
        self,
        clock: Clock,
        num_slots: int,
        gather_s_per_byte: float,
        on_gathered: OnGathered,
        on_sent: OnSent,
        put: Callable[..., None],
    ) -> None:
        """put(num_bytes, on_done): bytes onto the link, one operation at a time."""
        self._clock = clock
        self._num_free = num_slots
        self._gather_s_per_byte = gather_s_per_byte
        self._on_gathered = on_gathered
        self._on_sent = on_sent
        self._put = put
        self._waiting: deque[_Chunk] = deque()
        self._chunks: dict[tuple[bytes, int], _Chunk] = {}  # not yet handed to the wire
        self._wire: deque[tuple[int, _Chunk | None, OnArrived, int]] = deque()  # head is under way
        self.is_lost = False

    def gather(self, transfer_id: bytes, seq: int, num_bytes: int) -> None:
        chunk = _Chunk(transfer_id, seq, num_bytes)
        self._chunks[transfer_id, seq] = chunk
        self._waiting.append(chunk)
        self._fill_slots()

    def send(self, transfer_id: bytes, seq: int, number: int, on_arrived: OnArrived) -> None:
        chunk = self._chunks.pop((transfer_id, seq))
        assert chunk.is_staged
        self._enqueue(number, chunk, on_arrived, chunk.num_bytes)

    def send_filler(self, number: int, num_bytes: int, on_arrived: OnArrived) -> None:
        self._enqueue(number, None, on_arrived, num_bytes)

    def cancel(self, transfer_id: bytes) -> list[int]:
        """Drop what is not on the wire. Answers the chunks whose gather has not begun and never will."""
        cancelled = []
        for chunk in [chunk for chunk in self._chunks.values() if chunk.transfer_id == transfer_id]:
            if chunk.has_begun and not chunk.is_staged:
                chunk.is_dropped = True
                continue
            del self._chunks[transfer_id, chunk.seq]
            if chunk.is_staged:
                self._free()
            else:
                self._waiting.remove(chunk)
                cancelled.append(chunk.seq)
        return cancelled

    def _fill_slots(self) -> None:
        while self._waiting and self._num_free:
            self._num_free -= 1
            chunk = self._waiting.popleft()
            chunk.has_begun = True
            self._clock.after(chunk.num_bytes * self._gather_s_per_byte, self._gathered, chunk)

    def _gathered(self, chunk: _Chunk) -> None:
        chunk.is_staged = True
        if chunk.is_dropped:
            del self._chunks[chunk.transfer_id, chunk.seq]
            self._free()
        self._on_gathered(chunk.transfer_id, chunk.seq)

    def _free(self) -> None:
        self._num_free += 1
        self._fill_slots()

    def _enqueue(self, number: int, chunk: _Chunk | None, on_arrived: OnArrived, num_bytes: int) -> None:
        """chunk: None for filler, which has no slot."""
        self._wire.append((number, chunk, on_arrived, num_bytes))
        if len(self._wire) == 1:
            self._put(num_bytes, self._sent)

    def _sent(self) -> None:
        if self.is_lost:
            return
        number, chunk, on_arrived, _ = self._wire.popleft()
        if self._wire:
            self._put(self._wire[0][3], self._sent)
        if chunk is not None:
            self._free()
            self._on_sent(chunk.transfer_id, chunk.num_bytes)
        on_arrived(number)


class DestinationLane:
    """Posts receives, numbered without gaps, as slots are free; writes what has come. Invariant: as in SourceLane."""

    def __init__(
        self, clock: Clock, num_slots: int, scatter_s_per_byte: float, on_posted: OnPosted, on_ended: OnEnded
    ) -> None:
        self._clock = clock
        self._num_free = num_slots
        self._scatter_s_per_byte = scatter_s_per_byte
        self._on_posted = on_posted
        self._on_ended = on_ended
        self._waiting: deque[_Chunk] = deque()
        self._posted: dict[int, _Chunk] = {}
        self._next_number = 0
        self.is_lost = False

    def receive(self, transfer_id: bytes, seq: int, num_bytes: int) -> None:
        self._waiting.append(_Chunk(transfer_id, seq, num_bytes))
        self._post_waiting()

    def arrived(self, number: int) -> None:
        """The bytes of a receive have come; filler, where its transfer was cancelled."""
        if self.is_lost:
            return
        chunk = self._posted[number]
        if chunk.is_dropped:
            self._finished(number)
        else:
            chunk.has_begun = True
            self._clock.after(chunk.num_bytes * self._scatter_s_per_byte, self._finished, number)

    def cancel(self, transfer_id: bytes) -> list[int]:
        """Answers the chunks whose scatter has not begun and never will. Their bytes may still come, into staging."""
        dropped = [chunk for chunk in self._waiting if chunk.transfer_id == transfer_id]
        self._waiting = deque(chunk for chunk in self._waiting if chunk.transfer_id != transfer_id)
        for chunk in self._posted.values():
            if chunk.transfer_id == transfer_id and not (chunk.has_begun or chunk.is_dropped):
                chunk.is_dropped = True
                dropped.append(chunk)
        return [chunk.seq for chunk in dropped]

    def _post_waiting(self) -> None:
        while self._waiting and self._num_free:
            self._num_free -= 1
            chunk, number = self._waiting.popleft(), self._next_number
            self._next_number += 1
            self._posted[number] = chunk
            self._on_posted(chunk.transfer_id, chunk.seq, number, chunk.num_bytes)

    def _finished(self, number: int) -> None:
        chunk = self._posted.pop(number)
        self._num_free += 1
        if not chunk.is_dropped:
            self._on_ended(chunk.transfer_id, chunk.seq)
        self._post_waiting()


def put_on(network: Network, source: str, destination: str) -> Callable[..., None]:
    """A lane's way onto the link between two workers."""
    return partial(network.start, source, destination)
