"""A worker's blocks and its host under fire. Every block's content follows from its hash, so that another request's KV,
or half of a block, is seen; whoever reads or writes a block that is not leased for it is seen, too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from random import Random

import torch

from engine.block_pool import BlockPool
from kvtransfer.agent import TransferAgent
from protos.block_hash import DIGEST_SIZE
from protos.types import KVLayout, PeerRef, TransferFailure, TransferKind
from tests.kvtransfer.virtual_time import Turns

LAYOUT = KVLayout("fuzzed", "float32", 1, 1, 4, 1, 1)  # 32 bytes a block
NUM_BLOCKS = 24
PATIENCE_S = 4.0  # with a transfer that was announced or asked for
_DIRT = torch.tensor([7.0] * 8)


def hashes_of(request: str, num_blocks: int) -> tuple[bytes, ...]:
    return tuple(blake2b(f"{request}/{i}".encode(), digest_size=DIGEST_SIZE).digest() for i in range(num_blocks))


def content_of(block_hash: bytes) -> torch.Tensor:  # [block_numel]
    return torch.frombuffer(
        bytearray(blake2b(block_hash, digest_size=LAYOUT.block_nbytes).digest()), dtype=torch.float32
    )


def is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit, NaN or not."""
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


class LeasedStore:
    """Satisfies BlockStore. Invariant: `leased` says who may read or write a block now."""

    def __init__(self, turns: Turns, slowness_s: float, violations: list[str]) -> None:
        self.layout = LAYOUT
        self.device = torch.device("cpu")
        self.pool = _DIRT.repeat(NUM_BLOCKS, 1)  # [num_blocks, block_numel]
        self.to_read: dict[int, int] = {}  # block -> by how many transfers
        self.to_write: set[int] = set()
        self._turns = turns
        self._slowness_s = slowness_s
        self._violations = violations

    def gather(self, block_ids: Sequence[int], out: torch.Tensor) -> None:
        for row, block_id in enumerate(block_ids):
            self._check(self.to_read.get(block_id, 0) > 0, f"block {block_id} was read without a lease")
            out[row] = self.pool[block_id]
            self._dawdle()
        self._check(all(self.to_read.get(block_id) for block_id in block_ids), f"{block_ids} were freed while read")

    def scatter(self, block_ids: Sequence[int], staged: torch.Tensor) -> None:
        for row, block_id in enumerate(block_ids):
            self._check(block_id in self.to_write, f"block {block_id} was written without a lease")
            self._dawdle()
            self.pool[block_id] = staged[row]
        self._check(self.to_write.issuperset(block_ids), f"{block_ids} were freed while written")

    def _dawdle(self) -> None:
        if self._slowness_s:
            self._turns.sleep(self._slowness_s)

    def _check(self, holds: bool, violation: str) -> None:
        if not holds:
            self._violations.append(violation)


@dataclass
class Sending:
    block_ids: list[int]
    end: str = ""


@dataclass
class Expecting:
    request: str
    attempt: int
    block_hashes: tuple[bytes, ...]
    token_ids: tuple[int, ...]
    kind: TransferKind
    is_offered: bool = False
    num_held: int = 0
    block_ids: list[int] = field(default_factory=list)  # granted
    held_ids: list[int] = field(default_factory=list)
    end: str = ""
    ended_at: float = 0.0


@dataclass(frozen=True)
class Manners:
    """How this host answers, by chance."""

    refuses: float = 0.05
    is_silent: float = 0.03
    is_late: float = 0.1
    lateness_s: float = 0.7
    abandons: float = 0.02  # a request, without a word, between two chunks


class FuzzHost:
    """Invariant: `sending` and `expecting` have every transfer that this host was ever told of or has opened; the pool
    counts one use for each block that one of them, unended, holds."""

    def __init__(self, turns: Turns, rng: Random, manners: Manners, slowness_s: float, violations: list[str]) -> None:
        self.agent: TransferAgent
        self.violations = violations
        self.store = LeasedStore(turns, slowness_s, violations)
        self.pool = BlockPool(NUM_BLOCKS)
        self.sending: dict[bytes, Sending] = {}
        self.expecting: dict[bytes, Expecting] = {}
        self.when_granted: dict[bytes, Callable[[], None]] = {}  # what the source of a migration does then
        self.num_arrived = 0
        self._rng = rng
        self._manners = manners
        self._loop = turns.loop

    # --- blocks -------------------------------------------------------------------------------------------------------

    def compute(self, block_hashes: Sequence[bytes]) -> list[int] | None:
        """Blocks with the content of these hashes, used once."""
        taken = self._take(len(block_hashes))
        for block_id, block_hash in zip(taken or (), block_hashes, strict=bool(taken)):
            self.store.pool[block_id] = content_of(block_hash)
            self.pool.name(block_id, block_hash)
        return taken

    def _take(self, num_blocks: int) -> list[int] | None:
        taken = self.pool.allocate(num_blocks)
        if taken:
            self.store.pool[taken] = _DIRT
        return taken

    def found(self, block_hashes: Sequence[bytes]) -> list[int]:
        """The cached blocks of a prefix, used once more."""
        ids = []
        for block_hash in block_hashes:
            if (block_id := self.pool.find(block_hash)) is None:
                break
            ids.append(block_id)
        self.pool.acquire(ids)
        return ids

    # --- source -------------------------------------------------------------------------------------------------------

    def lend(self, transfer_id: bytes, block_ids: list[int]) -> None:
        self.sending[transfer_id] = Sending(block_ids)
        for block_id in block_ids:
            self.store.to_read[block_id] = self.store.to_read.get(block_id, 0) + 1

    def on_refused(self, transfer_id: bytes, reason: str) -> None:
        self._end_sending(transfer_id, "refused")

    def on_sent(self, transfer_id: bytes, num_blocks: int) -> None:
        if (begin := self.when_granted.pop(transfer_id, None)) is not None:
            begin()

    def on_closed(self, transfer_id: bytes, failure: TransferFailure | None) -> None:
        self._end_sending(transfer_id, "closed")

    def _end_sending(self, transfer_id: bytes, end: str) -> None:
        sending = self.sending[transfer_id]
        self._check(not sending.end, f"{transfer_id.hex()} ended as {sending.end} and as {end}")
        sending.end = end
        for block_id in sending.block_ids:
            self.store.to_read[block_id] -= 1
        self.pool.release(sending.block_ids)

    def on_pull_asked(
        self,
        pull_id: bytes,
        destination: PeerRef,
        request_id: str,
        attempt: int,
        block_hashes: tuple[bytes, ...],
        kind: TransferKind,
    ) -> None:
        former = self.sending.get(pull_id)
        self._check(former is None or bool(former.end), f"{pull_id.hex()} was asked for twice")
        num_blocks = len(block_ids := self.found(block_hashes))
        if not block_ids:
            self.agent.refuse_pull(pull_id, "not here")
            return
        self.lend(pull_id, block_ids)

        def offer() -> None:
            self.agent.open(pull_id, destination, request_id, attempt, num_blocks, kind)
            self.agent.send_blocks(pull_id, 0, tuple(block_ids))
            self.agent.commit(pull_id, 0, ())

        self._loop.call_later(self._patience(), offer)

    # --- destination --------------------------------------------------------------------------------------------------

    def on_return_offered(
        self, source_worker_id: str, request_id: str, attempt: int, block_hashes: tuple[bytes, ...]
    ) -> None:
        self.pull(source_worker_id, request_id, attempt, block_hashes, TransferKind.RETURN)

    def pull(
        self, source_worker_id: str, request: str, attempt: int, block_hashes: tuple[bytes, ...], kind: TransferKind
    ) -> None:
        pull_id = self._rng.randbytes(16)
        self.expect(pull_id, Expecting(request, attempt, block_hashes, (), kind))
        self.agent.request_pull(pull_id, source_worker_id, request, attempt, block_hashes, kind)

    def expect(self, transfer_id: bytes, one: Expecting) -> None:
        """What is not offered is waited for as long as the host likes."""
        self.expecting[transfer_id] = one
        self._loop.call_later(PATIENCE_S, self._give_up, transfer_id, one)

    def _give_up(self, transfer_id: bytes, one: Expecting) -> None:
        if not one.end:
            self.agent.abort(transfer_id, "nobody waits for it any more")

    def on_offered(self, transfer_id: bytes, request_id: str, attempt: int, num_blocks: int) -> None:
        one = self.expecting.get(transfer_id)
        if one is None or one.is_offered or one.end or (request_id, attempt) != (one.request, one.attempt):
            self.violations.append(f"{transfer_id.hex()} of {request_id}, attempt {attempt}, was offered: {one}")
            return
        one.is_offered = True
        if self._rng.random() < self._manners.is_silent:
            return
        self._loop.call_later(self._patience(), self._answer, transfer_id, one, num_blocks)

    def _patience(self) -> float:
        return self._manners.lateness_s * self._rng.random() * (self._rng.random() < self._manners.is_late)

    def _answer(self, transfer_id: bytes, one: Expecting, num_blocks: int) -> None:
        if one.end:
            return
        asked = len(one.block_hashes)
        match one.kind:
            case TransferKind.HANDOFF:
                fits = num_blocks == asked
            case TransferKind.MIGRATE:
                fits = asked <= num_blocks <= NUM_BLOCKS
            case _:
                fits = 0 < num_blocks <= asked
        if not fits or self._rng.random() < self._manners.refuses:
            self._refuse(transfer_id, one)
            return
        held_ids = self.found(one.block_hashes[:num_blocks])
        if (block_ids := self._take(num_blocks - len(held_ids))) is None:
            self.pool.release(held_ids)
            self._refuse(transfer_id, one)
            return
        one.num_held, one.held_ids, one.block_ids = len(held_ids), held_ids, block_ids
        self.store.to_write.update(block_ids)
        self.agent.grant(transfer_id, len(held_ids), tuple(block_ids))

    def _refuse(self, transfer_id: bytes, one: Expecting) -> None:
        one.end, one.ended_at = "refused", self._loop.time()
        self.agent.refuse(transfer_id, "no")

    def on_arrived(
        self,
        transfer_id: bytes,
        first_index: int,
        token_ids: tuple[int, ...],
        num_bytes: int,
        transfer_s: float,
        exposed_s: float,
        num_blocks: int,
    ) -> None:
        one = self.expecting[transfer_id]
        self._end_expecting(transfer_id, "arrived")
        self.num_arrived += 1
        ids = [*one.held_ids, *one.block_ids]
        self._check(token_ids == one.token_ids and first_index == len(token_ids), f"{token_ids} were committed: {one}")
        migrates = one.kind is TransferKind.MIGRATE
        self._check(num_blocks == (len(one.block_hashes) if migrates else len(ids)), f"{num_blocks} blocks: {one}")
        num_written = num_blocks - one.num_held
        self._check(num_bytes == num_written * LAYOUT.block_nbytes, f"{num_bytes} bytes arrived: {one}")
        for block_id, block_hash in zip(ids, one.block_hashes, strict=False):
            self._check(is_same(self.store.pool[block_id], content_of(block_hash)), f"other KV than that of {one}")
        for block_id, block_hash in zip(one.block_ids, one.block_hashes[one.num_held :], strict=False):
            if self.pool.find(block_hash) is None:
                self.pool.name(block_id, block_hash)
        self.pool.release(ids)

    def on_lost(self, transfer_id: bytes, reason: str) -> None:
        one = self.expecting[transfer_id]
        if one.end == "refused" and one.ended_at == self._loop.time():
            return  # it was on its way when we refused
        self._end_expecting(transfer_id, "lost")
        self.pool.release([*one.held_ids, *one.block_ids])

    def on_pull_refused(self, pull_id: bytes, reason: str) -> None:
        one = self.expecting[pull_id]
        self._check(not one.is_offered, f"offered, then refused: {one}")
        self._end_expecting(pull_id, "pull refused")

    def _end_expecting(self, transfer_id: bytes, end: str) -> None:
        one = self.expecting[transfer_id]
        self._check(not one.end, f"{transfer_id.hex()} ended as {one.end} and as {end}")
        one.end, one.ended_at = end, self._loop.time()
        self.store.to_write.difference_update(one.block_ids)

    # --- what must hold -----------------------------------------------------------------------------------------------

    @property
    def num_open(self) -> int:
        ends = [one.end for one in self.sending.values()] + [one.end for one in self.expecting.values()]
        return ends.count("")

    def check_books(self) -> None:
        """Once everything has ended: nothing is leased or in use, and what is cached is what its hash says."""
        self._check(not any(self.store.to_read.values()) and not self.store.to_write, "leases are left")
        self._check(not any(self.pool.ref_cnt), f"blocks are in use: {self.pool.ref_cnt}")
        self._check(self.pool.num_available == NUM_BLOCKS, f"{self.pool.num_available} of {NUM_BLOCKS} blocks are left")

    def check_cache(self, block_hashes: Sequence[bytes]) -> None:
        for block_hash in block_hashes:
            if (block_id := self.pool.find(block_hash)) is not None:
                same = is_same(self.store.pool[block_id], content_of(block_hash))
                self._check(same, f"block {block_id} is not what its hash says")

    def _check(self, holds: bool, violation: str) -> None:
        if not holds:
            self.violations.append(violation)
