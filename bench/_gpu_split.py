"""Prefill and decode as two processes on one card against one process that does both: real schedulers, engine threads,
runners and links, the same arrivals. Between the two stands a plain shim in place of the transfer protocol: it grants
what is offered and moves blocks in order; nothing is lost here, so nothing is recovered."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from bench._gpu_actor import DRAIN_S, Actor, Load, Setting, Times, note_tokens, served
from bench._gpu_links import NUM_SLOTS, Plan
from engine.events import (
    CommitTransfer,
    Effect,
    ExpectTransfer,
    GrantTransfer,
    OpenTransfer,
    SendBlocks,
    TransferArrived,
    TransferClosed,
    TransferOffered,
)
from engine.paged_kv_cache import PagedKVCache
from kvtransfer.config import TransportName
from kvtransfer.lane_thread import LaneThread
from kvtransfer.messages import LinkOffer
from kvtransfer.staging import StagingRing, as_bytes
from protos.types import Handoff, PeerRef, Role, TokenOutput

NOBODY = PeerRef("peer", "life", "", Role.DECODE)
START_S = 300.0  # for a process to make its model


# --- the prefill process ------------------------------------------------------------------------------------------


def prefill_process(pipe: Connection, setting: Setting, plan: Plan) -> None:
    """Words in: ("submit", index, load), ("closed", transfer_id), "end". Out: ("token", output, at), ("offer", ...),
    ("chunk", transfer_id, first_block, num_blocks), ("commit", ...), in the order of the link's operations."""
    said = threading.Lock()

    def say(*word: Any) -> None:
        with said:
            pipe.send(word)

    sender: _BlockSender

    def on_effects(effects: Sequence[Effect]) -> None:
        at = time.monotonic()
        for effect in effects:
            match effect:
                case TokenOutput():
                    say("token", effect, at)
                case OpenTransfer(handoff, request_id, attempt, num_blocks):
                    say("offer", handoff.transfer_id, request_id, attempt, num_blocks)
                case SendBlocks() | CommitTransfer():
                    sender.put(effect)

    actor = Actor(setting, on_effects)  # takes longer than the other end would wait for a link
    transport = plan.make_transport()
    say("beacon", transport.beacon)
    link = transport.dial(LinkOffer(*pipe.recv()), lambda reason: None)
    sender = _BlockSender(link, actor.cache, plan, say)
    link.connect()
    say("ready")
    while (word := pipe.recv()) != "end":
        match word:
            case ("submit", index, load):
                actor.submit(index, load, to=Handoff(_transfer_id(index), NOBODY))
            case ("closed", transfer_id):
                actor.engine.post(TransferClosed(transfer_id))
    actor.engine.stop(5.0)
    link.close()
    transport.close()


class _BlockSender:
    """Gathers and posts on one thread; a slot is used again once its operation is over."""

    def __init__(self, link: Any, cache: PagedKVCache, plan: Plan, say: Callable[..., None]) -> None:
        self._link, self._cache, self._plan, self._say = link, cache, plan, say
        self._ring = StagingRing(plan.layout, NUM_SLOTS, plan.chunk_blocks, link.allocate)
        self._thread = LaneThread("bench-send", cache.device)
        self._next = 0

    def put(self, effect: SendBlocks | CommitTransfer) -> None:
        self._thread.submit(lambda: self._send(effect))

    def _send(self, effect: SendBlocks | CommitTransfer) -> None:
        if isinstance(effect, CommitTransfer):
            self._say("commit", effect.transfer_id, effect.first_index, effect.token_ids)
            return
        size = self._plan.chunk_blocks
        for first in range(0, len(effect.block_ids), size):
            block_ids = effect.block_ids[first : first + size]
            if self._next >= NUM_SLOTS:
                self._link.wait(self._next - NUM_SLOTS)
            staged = self._ring.blocks(self._next % NUM_SLOTS, len(block_ids))
            self._cache.gather(block_ids, staged)
            self._say("chunk", effect.transfer_id, effect.first_block + first, len(block_ids))
            self._link.post(self._next, as_bytes(staged))
            self._next += 1


# --- this process decodes -----------------------------------------------------------------------------------------


class _BlockReceiver:
    """Invariant: `grants` has what the engine has granted and nobody has committed yet."""

    def __init__(self, link: Any, actor: Actor, plan: Plan, tell: Callable[[Any], None]) -> None:
        self._link, self._actor, self._plan, self._tell = link, actor, plan, tell
        self._ring = StagingRing(plan.layout, NUM_SLOTS, plan.chunk_blocks, link.allocate)
        self._thread = LaneThread("bench-receive", actor.cache.device)
        self._granted: SimpleQueue[GrantTransfer] = SimpleQueue()
        self._grants: dict[bytes, GrantTransfer] = {}
        self._next = 0

    def granted(self, grant: GrantTransfer) -> None:
        self._granted.put(grant)

    def chunk(self, transfer_id: bytes, first_block: int, num_blocks: int) -> None:
        self._thread.submit(lambda: self._take(transfer_id, first_block, num_blocks))

    def commit(self, transfer_id: bytes, first_index: int, token_ids: tuple[int, ...]) -> None:
        self._thread.submit(lambda: self._commit(transfer_id, first_index, token_ids))

    def _grant_of(self, transfer_id: bytes) -> GrantTransfer:
        while transfer_id not in self._grants:
            grant = self._granted.get(timeout=DRAIN_S)
            self._grants[grant.transfer_id] = grant
        return self._grants[transfer_id]

    def _take(self, transfer_id: bytes, first_block: int, num_blocks: int) -> None:
        number, self._next = self._next, self._next + 1
        staged = self._ring.blocks(number % NUM_SLOTS, num_blocks)
        self._link.post(number, as_bytes(staged))
        received = self._link.wait(number)
        block_ids = self._grant_of(transfer_id).block_ids[first_block : first_block + num_blocks]
        self._actor.cache.scatter(block_ids, received.view(staged.dtype).view(staged.shape))
        self._link.release(number)

    def _commit(self, transfer_id: bytes, first_index: int, token_ids: tuple[int, ...]) -> None:
        self._grant_of(transfer_id)
        del self._grants[transfer_id]
        self._actor.engine.post(TransferArrived(transfer_id, first_index, token_ids, 0, 0.0, 0.0))
        self._tell(("closed", transfer_id))


@contextmanager
def split(
    prefill: Setting, decode: Setting, transport_name: TransportName, chunk_blocks: int
) -> Iterator[Callable[[Load], float]]:
    layout = decode.shape.facts(decode.dtype).kv_layout(decode.dtype, decode.block_size, decode.block_size)
    plan = Plan(transport_name, decode.device, layout, 1, chunk_blocks, chunk_timeout_s=60.0)
    spawn = multiprocessing.get_context("spawn")
    pipe, theirs = spawn.Pipe()
    process = spawn.Process(target=prefill_process, args=(theirs, prefill, plan), daemon=True)
    process.start()
    theirs.close()
    pair = None
    try:
        pair = _Split(pipe, decode, plan)
        yield pair.serve
    finally:
        if pair is not None:
            pair.close()
        process.kill()
        process.join()


class _Split:
    def __init__(self, pipe: Connection, decode: Setting, plan: Plan) -> None:
        self._pipe = pipe
        self._said = threading.Lock()
        self._times = Times()
        self._transport = plan.make_transport()
        self._link = self._transport.listen(self._hear("beacon"), self._times.errors.append)
        offer = self._link.offer
        self._actor = Actor(decode, self._on_effects)
        self._receiver = _BlockReceiver(self._link, self._actor, plan, self._tell)
        pipe.send((offer.host, offer.port, offer.prefix, offer.transport))
        self._link.connect()
        self._hear("ready")
        self._reading = threading.Thread(target=self._read, name="bench-read", daemon=True)
        self._reading.start()

    def serve(self, load: Load) -> float:
        self._times.clear()

        def submit(index: int) -> None:
            self._actor.submit(index, load, source=Handoff(_transfer_id(index), NOBODY))
            self._tell(("submit", index, load))

        return served(load, self._times, submit, self._actor.crashed)

    def close(self) -> None:
        self._tell("end")
        self._link.close()
        self._actor.engine.stop(5.0)
        self._transport.close()

    def _tell(self, word: Any) -> None:
        with self._said:
            self._pipe.send(word)

    def _hear(self, expected: str) -> Any:
        if not self._pipe.poll(START_S):
            raise RuntimeError(f"the prefill process did not say {expected} within {START_S:.0f} s")
        word = self._pipe.recv()
        assert word[0] == expected, word
        return word[-1]

    def _on_effects(self, effects: Sequence[Effect]) -> None:
        note_tokens(self._times, effects)
        for effect in effects:
            if isinstance(effect, GrantTransfer):
                assert effect.num_held_blocks == 0
                self._receiver.granted(effect)
            elif not isinstance(effect, TokenOutput | ExpectTransfer):
                self._times.errors.append(f"{effect}")

    def _read(self) -> None:
        while True:
            try:
                word = self._pipe.recv()
            except (EOFError, OSError):
                self._times.errors.append("the prefill process is gone")
                return
            match word:
                case ("token", output, at):
                    self._times.note(output, at)
                case ("offer", *offered):
                    self._actor.engine.post(TransferOffered(*offered))
                case ("chunk", *chunk):
                    self._receiver.chunk(*chunk)
                case ("commit", *commit):
                    self._receiver.commit(*commit)


def _transfer_id(index: int) -> bytes:
    return index.to_bytes(16, "little")
