"""KV moved between two processes that share a card: are the bytes right, how fast is it, what hides behind compute,
what does a link take of the card's memory, what does a killed peer cost. The other process sends; this one receives.

Without NVIDIA's process sharing (MPS) the kernels of two processes take turns on a card and never overlap."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from bench._gpu_card import Card
from engine.paged_kv_cache import PagedKVCache
from kvtransfer.config import TransferConfig, TransportName
from kvtransfer.messages import LinkOffer
from kvtransfer.staging import StagingRing, as_bytes, checksum_of
from kvtransfer.transport import LinkFailed, ReceiverLink, SenderLink, Transport
from kvtransfer.transports import transport_for
from protos.types import KVLayout

LAYOUT_8B = KVLayout("random", "bfloat16", 32, 8, 128, 64, 64, itemsize=2)  # 8 MiB a block
NUM_SLOTS = 4
DEADLINE_S = 120.0  # of the other process, for anything
COMPUTE_SIZE = 4096
CHECKSUM = checksum_of("sum64")


@dataclass(frozen=True, slots=True)
class Plan:
    """What both processes agree on."""

    transport: TransportName
    device: str
    layout: KVLayout
    num_blocks: int  # that move, of as many in each pool
    chunk_blocks: int
    chunk_timeout_s: float = 5.0

    @property
    def config(self) -> TransferConfig:
        return TransferConfig(
            transport=self.transport,
            checksum="sum64",
            chunk_nbytes=self.chunk_blocks * self.layout.block_nbytes,
            chunk_timeout_s=self.chunk_timeout_s,
            connect_timeout_s=20.0,
        )

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.layout.block_nbytes

    def chunks(self) -> list[list[int]]:
        """Blocks in an order that is no order of memory."""
        ids = torch.randperm(self.num_blocks, generator=torch.Generator().manual_seed(5)).tolist()
        return [ids[first : first + self.chunk_blocks] for first in range(0, len(ids), self.chunk_blocks)]

    def make_pool(self) -> PagedKVCache:
        return PagedKVCache(self.layout, self.num_blocks, self.device)

    def make_transport(self) -> Transport:
        return transport_for(self.config, torch.device(self.device))


class Sender:
    """Invariant: operation n uses slot n % NUM_SLOTS, and no slot is used again before its last operation is over."""

    def __init__(self, link: SenderLink, pool: PagedKVCache, plan: Plan) -> None:
        self._link = link
        self._pool = pool
        self._plan = plan
        self._ring = StagingRing(plan.layout, NUM_SLOTS, plan.chunk_blocks, link.allocate)
        self._next = 0

    def send(self) -> int:
        """All of the plan's blocks; the sum over them."""
        first, total = self._next, 0
        for chunk in self._plan.chunks():
            if self._next - first >= NUM_SLOTS:
                self._link.wait(self._next - NUM_SLOTS)
            staged = self._ring.blocks(self._next % NUM_SLOTS, len(chunk))
            self._pool.gather(chunk, staged)
            total += CHECKSUM(as_bytes(staged))
            self._link.post(self._next, as_bytes(staged))
            self._next += 1
        for number in range(max(first, self._next - NUM_SLOTS), self._next):
            self._link.wait(number)
        return total & (1 << 64) - 1


class Receiver:
    """Invariant: as Sender's."""

    def __init__(self, link: ReceiverLink, pool: PagedKVCache, plan: Plan) -> None:
        self._link = link
        self._pool = pool
        self._plan = plan
        self._ring = StagingRing(plan.layout, NUM_SLOTS, plan.chunk_blocks, link.allocate)
        self._next = 0

    def receive(self) -> int:
        """All of the plan's blocks; the sum over them."""
        chunks, total, first = self._plan.chunks(), 0, self._next
        for index in range(len(chunks) + 1):
            if index < len(chunks):
                self._post(first + index, len(chunks[index]))
            if index > 0:
                total += self._take(first + index - 1, chunks[index - 1])
        self._next = first + len(chunks)
        return total & (1 << 64) - 1

    def _post(self, number: int, num_blocks: int) -> None:
        self._link.post(number, as_bytes(self._ring.blocks(number % NUM_SLOTS, num_blocks)))

    def _take(self, number: int, chunk: list[int]) -> int:
        received = self._link.wait(number)
        digest = CHECKSUM(received)
        staged = self._ring.blocks(number % NUM_SLOTS, len(chunk))
        self._pool.scatter(chunk, received.view(staged.dtype).view(staged.shape))
        self._link.release(number)
        return digest


# --- the other process --------------------------------------------------------------------------------------------


def be_the_sender(pipe: Connection, plan: Plan) -> None:
    """Answers: beacon; then to an offer, "connected"; then to each word what came of it."""
    card = Card(torch.device(plan.device))
    transport = plan.make_transport()
    pool = plan.make_pool()
    torch.manual_seed(9)
    for block in pool.tensor:
        block.normal_()
    pipe.send(transport.beacon)
    link: SenderLink = transport.dial(LinkOffer(*pipe.recv()), lambda reason: None)
    mover = Sender(link, pool, plan)
    link.connect()
    pipe.send("connected")
    left = torch.randn(COMPUTE_SIZE if card.is_gpu else 64, COMPUTE_SIZE if card.is_gpu else 64, device=card.device)
    while (word := pipe.recv()) != "end":
        began_at = time.perf_counter()
        if word == "compute":
            compute(card, left)
            settle(card)
            pipe.send(time.perf_counter() - began_at)
        else:
            if word == "send and compute":
                compute(card, left)  # launched, not awaited
            with beside(card):
                total = mover.send()
            settle(card)
            pipe.send((time.perf_counter() - began_at, total))
    link.close()
    transport.close()


def compute(card: Card, left: torch.Tensor, rounds: int = 8) -> None:
    """Stands for a chunk of a prompt: products, one after the other, on the engine's stream."""
    right = left
    for _ in range(rounds):
        right = (left @ right).clamp_(-1, 1)


def settle(card: Card) -> None:
    if card.is_gpu:
        torch.cuda.synchronize(card.device)


def beside(card: Card) -> Any:
    """A stream beside the engine's."""
    return torch.cuda.stream(torch.cuda.Stream(card.device)) if card.is_gpu else nullcontext()  # type: ignore[no-untyped-call]


# --- this process -------------------------------------------------------------------------------------------------


class Pair:
    """Two processes with a link between them. Invariant: `ask` and `receive` alternate as the plan needs it."""

    def __init__(self, plan: Plan, card: Card, pipe: Connection, process: Any, transport: Transport) -> None:
        self.process = process
        self._pipe = pipe
        self._card = card
        self.pool = plan.make_pool()
        self.pool.tensor.fill_(torch.nan)
        self.link = transport.listen(self.hear(), lambda reason: None)
        free = card.free_nbytes()
        self._mover = Receiver(self.link, self.pool, plan)
        offer = self.link.offer
        pipe.send((offer.host, offer.port, offer.prefix, offer.transport))
        self.link.connect()
        assert self.hear() == "connected"
        self.link_nbytes = free - card.free_nbytes()  # of both ends, staging included: one card shows both

    def hear(self) -> Any:
        if not self._pipe.poll(DEADLINE_S):
            raise RuntimeError(f"the other process says nothing for {DEADLINE_S:.0f} s")
        try:
            return self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"the other process ended, exit code {self.process.exitcode}") from None

    def ask(self, word: str) -> Any:
        self._pipe.send(word)
        return self.hear()

    def move(self, word: str = "send") -> tuple[float, bool]:
        """Seconds, as the sender had them, and whether the bytes were the same."""
        self._pipe.send(word)
        received = self.receive()
        seconds, sent = self.hear()
        return seconds, sent == received

    def receive(self) -> int:
        with beside(self._card):
            return self._mover.receive()

    def close(self) -> None:
        with suppress(OSError):
            self._pipe.send("end")
        self.link.close()
        self.process.join(5)
        self.process.kill()
        self.process.join()


@contextmanager
def linked(plan: Plan, card: Card) -> Iterator[Pair]:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=be_the_sender, args=(theirs, plan), daemon=True)
    process.start()
    theirs.close()
    transport = plan.make_transport()
    pair = None
    try:
        pair = Pair(plan, card, ours, process, transport)
        yield pair
    finally:
        if pair is not None:
            pair.close()
        process.kill()
        process.join()
        transport.close()


def link_values(plan: Plan, card: Card, runs: int) -> dict[str, float]:
    """seconds: of moving all; wrong: runs whose bytes differ; nbytes: of card memory; hidden: the share of a move that
    does not make compute longer."""
    with linked(plan, card) as pair:
        moves = [pair.move() for _ in range(runs + 1)]
        wrong = sum(not same for _, same in moves) + bool(pair.pool.tensor.isnan().any())
        seconds = statistics.median(each for each, _ in moves[1:])
        pair.ask("compute")
        compute_s = statistics.median(pair.ask("compute") for _ in range(runs))
        both_s = statistics.median(pair.move("send and compute")[0] for _ in range(runs))
        hidden = 1 - (both_s - compute_s) / seconds
        return {"seconds": seconds, "wrong": float(wrong), "nbytes": float(pair.link_nbytes), "hidden": hidden}


def killed_peer_s(plan: Plan, card: Card) -> float:
    """From the kill to the receive's end."""
    with linked(plan, card) as pair:
        pair.move()
        pair.process.kill()
        killed_at = time.perf_counter()
        try:
            pair.receive()
        except LinkFailed:
            return time.perf_counter() - killed_at
        raise AssertionError("bytes that nobody has sent")


def nccl_refusal(version: tuple[int, ...]) -> str:
    """Why two processes on one card cannot have NCCL between them; empty where they can."""
    if version >= (2, 30):
        return ""
    return f"NCCL {'.'.join(map(str, version))} refuses two ranks on one card, 2.30 and later take them"
