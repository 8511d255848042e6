"""The destination process of bench/transfer.py, and what both of its processes share. Moves what it is told to; times
nothing but its own stages."""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import grpc
import torch
import torch.distributed as dist

from bench.harness import median_of, time_of
from engine.paged_kv_cache import PagedKVCache
from kvtransfer.agent import TransferAgent
from kvtransfer.block_store import BlockStore
from kvtransfer.config import TransferConfig, TransportName
from kvtransfer.staging import as_bytes, checksum_of
from kvtransfer.transport import ReceiverLink, SenderLink
from kvtransfer.transports import LocalFirst
from protos.types import KVLayout, PeerRef, Role, TransferFailure

LAYOUT = KVLayout("bench", "float32", 4, 2, 32, 32, 32)  # 64 KiB a block, so that the smallest chunk is one block
DEPTH = TransferConfig().num_staging_chunks  # operations in flight, on every path alike
BIND_HOST = "127.0.0.1"
TIMEOUT_S = 60.0
TRANSPORTS: tuple[TransportName, ...] = ("gloo", "shared_memory")
SECRET = bytes(32)


def config_of(chunk_nbytes: int, transport: TransportName, is_bare: bool) -> TransferConfig:
    """The shipping settings; is_bare leaves only staging and wire. Between runs nobody pings, so silence is long."""
    return TransferConfig(
        chunk_nbytes=chunk_nbytes,
        checksum="none" if is_bare else "xxh3_64",
        silence_timeout_s=60,
        chunk_timeout_s=30,
        transport=transport,
    )


class NoCopies:
    """A store whose blocks are never touched: what remains of a transfer is the wire and the agreement on it."""

    layout = LAYOUT
    device = torch.device("cpu")

    def gather(self, block_ids: Sequence[int], out: torch.Tensor) -> None:
        pass

    def scatter(self, block_ids: Sequence[int], staged: torch.Tensor) -> None:
        pass


def make_pool(num_bytes: int) -> PagedKVCache:
    pool = PagedKVCache(LAYOUT, num_bytes // LAYOUT.block_nbytes)
    pool.tensor.normal_()
    return pool


def shuffled_ids(pool: PagedKVCache) -> tuple[int, ...]:
    """As of a pool that has served for a while."""
    return tuple(random.Random(0).sample(range(pool.num_blocks), pool.num_blocks))


def join_raw(rank: int, port: int) -> None:
    """torch.distributed's own gloo group, on loopback as the links are."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"tcp://{BIND_HOST}:{port}", rank=rank, world_size=2)


def stage_rates(pool: PagedKVCache, chunk_nbytes: int, runs: int) -> dict[str, float]:
    """Seconds that each copy and each sum takes for one chunk."""
    num_blocks = chunk_nbytes // LAYOUT.block_nbytes
    ids = shuffled_ids(pool)
    chunks = [ids[i : i + num_blocks] for i in range(0, len(ids) - num_blocks + 1, num_blocks)]
    slots = [torch.empty(num_blocks, pool.block_numel) for _ in range(DEPTH)]
    checksum = checksum_of("xxh3_64")

    def timed(stage: Callable[[tuple[int, ...], torch.Tensor], object]) -> float:
        def over_all() -> None:
            for index, chunk in enumerate(chunks):
                stage(chunk, slots[index % DEPTH])

        return median_of(runs, lambda: time_of(over_all)) / len(chunks)

    return {
        "gather": timed(pool.gather),
        "sum": timed(lambda chunk, slot: checksum(as_bytes(slot))),
        "scatter": timed(pool.scatter),
    }


def pipeline(num: int, post: Callable[[int], None], wait: Callable[[int], object]) -> None:
    """num operations, DEPTH of them in flight."""
    for index in range(min(DEPTH, num)):
        post(index)
    for index in range(num):
        wait(index)
        if index + DEPTH < num:
            post(index + DEPTH)


class RawPath:
    def __init__(self, is_sender: bool, slots: list[torch.Tensor]) -> None:
        self._start: Any = dist.isend if is_sender else dist.irecv
        self._other = 0 if is_sender else 1
        self._slots = slots

    def move(self, num: int) -> None:
        works: dict[int, Any] = {}

        def post(index: int) -> None:
            works[index] = self._start(self._slots[index % DEPTH], self._other, tag=index)

        pipeline(num, post, lambda index: works.pop(index).wait())


class SendingPath:
    """The shipping link, without lanes."""

    def __init__(self, link: SenderLink, chunk_nbytes: int) -> None:
        self.link = link
        self._slots = link.allocate(DEPTH * chunk_nbytes).fill_(1).view(DEPTH, chunk_nbytes)
        self._first = 0

    def move(self, num: int) -> None:
        first, self._first = self._first, self._first + num
        pipeline(
            num,
            lambda index: self.link.post(first + index, self._slots[index % DEPTH]),
            lambda index: self.link.wait(first + index),
        )


class ReceivingPath:
    """Its other end, from which each chunk comes to lie in memory of our own: gloo leaves it there, what lies in shared
    memory is copied."""

    def __init__(self, link: ReceiverLink, slots: list[torch.Tensor]) -> None:
        self.link = link
        self._slots = slots
        self._first = 0

    def move(self, num: int) -> None:
        first, self._first = self._first, self._first + num

        def take(index: int) -> None:
            slot = self._slots[index % DEPTH]
            received = self.link.wait(first + index)
            if received.data_ptr() != slot.data_ptr():
                slot.copy_(received)
            self.link.release(first + index)

        pipeline(num, lambda index: self.link.post(first + index, self._slots[index % DEPTH]), take)


class GrantingHost:
    """Grants every offer the blocks it asks for, and says how each transfer ended, and when."""

    def __init__(self, block_ids: tuple[int, ...], tell: Callable[[tuple[str, float]], None]) -> None:
        self.agent: TransferAgent
        self._block_ids = block_ids
        self._tell = tell

    def on_offered(self, transfer_id: bytes, request_id: str, attempt: int, num_blocks: int) -> None:
        self.agent.grant(transfer_id, 0, self._block_ids[:num_blocks])

    def on_arrived(self, transfer_id: bytes, *account: object) -> None:
        self._tell(("arrived", time.perf_counter()))

    def on_lost(self, transfer_id: bytes, reason: str) -> None:
        self._tell((f"lost: {reason}", time.perf_counter()))

    def on_refused(self, transfer_id: bytes, reason: str) -> None:
        self._tell((f"refused: {reason}", time.perf_counter()))

    def on_sent(self, transfer_id: bytes, num_blocks: int) -> None:
        pass  # nothing migrates here

    def on_closed(self, transfer_id: bytes, failure: TransferFailure | None) -> None:
        self._tell(("closed", time.perf_counter()))

    def on_pull_asked(self, pull_id: bytes, *ask: object) -> None:
        self.agent.refuse_pull(pull_id, "nobody pulls here")

    def on_pull_refused(self, pull_id: bytes, reason: str) -> None:
        self._tell((f"pull refused: {reason}", time.perf_counter()))

    def on_return_offered(self, source_worker_id: str, *offer: object) -> None:
        self._tell(("return offered", time.perf_counter()))


async def start_agent(
    role: Role, store: BlockStore, host: GrantingHost, config: TransferConfig
) -> tuple[PeerRef, TransferAgent, grpc.aio.Server]:
    server = grpc.aio.server()
    port = server.add_insecure_port(f"{BIND_HOST}:0")
    me = PeerRef(role.value, secrets.token_hex(8), f"{BIND_HOST}:{port}", role)
    host.agent = TransferAgent(me, store, host, config, SECRET)
    host.agent.add_to_server(server)
    await host.agent.start()
    await server.start()
    return me, host.agent, server


# --- the destination process --------------------------------------------------------------------------------------


def main(pipe: Connection, raw_port: int, pool_nbytes: int) -> None:
    torch.set_num_threads(1)
    pool = make_pool(pool_nbytes)
    join_raw(0, raw_port)
    while (chunk_nbytes := pipe.recv()) is not None:
        asyncio.run(Destination(pipe, pool, chunk_nbytes).serve())
    dist.destroy_process_group()


class Destination:
    """Everything for one size of chunk."""

    def __init__(self, pipe: Connection, pool: PagedKVCache, chunk_nbytes: int) -> None:
        self._pipe = pipe
        self._pool = pool
        self._chunk_nbytes = chunk_nbytes

    async def serve(self) -> None:
        paths: dict[str, RawPath | ReceivingPath] = {}
        agents: dict[str, tuple[PeerRef, TransferAgent, grpc.aio.Server]] = {}
        slots = [torch.zeros(self._chunk_nbytes, dtype=torch.uint8) for _ in range(DEPTH)]
        paths["raw"] = RawPath(False, slots)
        links = []
        for transport in TRANSPORTS:
            links.append(LocalFirst(config_of(self._chunk_nbytes, transport, is_bare=True)))
            link = links[-1].listen(await asyncio.to_thread(self._pipe.recv), lambda reason: None)
            self._pipe.send(link.offer)
            await asyncio.to_thread(link.connect)
            paths[f"wire_{transport}"] = ReceivingPath(link, slots)
            agents[f"lanes_{transport}"] = await self._agent(NoCopies(), transport, is_bare=True)
            agents[f"end_to_end_{transport}"] = await self._agent(self._pool, transport, is_bare=False)
        while (order := await asyncio.to_thread(self._pipe.recv)) != "close":
            kind, argument = order
            if kind == "stages":
                self._pipe.send(stage_rates(self._pool, self._chunk_nbytes, argument))
            elif kind in paths:
                await asyncio.to_thread(self._move, paths[kind], argument)
            else:
                source, agent, _ = agents[kind]
                agent.expect(argument, source, "r", 1)
        for _, agent, server in agents.values():
            await agent.close()
            await server.stop(None)
        for path in paths.values():
            if isinstance(path, ReceivingPath):
                await asyncio.to_thread(path.link.close)
        for each in links:
            each.close()

    def _move(self, path: RawPath | ReceivingPath, num: int) -> None:
        self._pipe.send("ready")
        path.move(num)
        self._pipe.send(("arrived", time.perf_counter()))

    async def _agent(
        self, store: BlockStore, transport: TransportName, is_bare: bool
    ) -> tuple[PeerRef, TransferAgent, grpc.aio.Server]:
        host = GrantingHost(shuffled_ids(self._pool), self._pipe.send)
        config = config_of(self._chunk_nbytes, transport, is_bare)
        me, agent, server = await start_agent(Role.DECODE, store, host, config)
        self._pipe.send(me)
        source: PeerRef = await asyncio.to_thread(self._pipe.recv)
        agent.set_members(1, (me, source))
        return source, agent, server
