"""KV moved between two processes of this machine: each stage alone, the shipping path end to end, and raw gloo beside
them, all in one run. The other process is bench/_transfer_peer.py."""

from __future__ import annotations

import asyncio
import multiprocessing
import secrets
import socket
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

from bench._transfer_peer import (
    BIND_HOST,
    DEPTH,
    LAYOUT,
    TIMEOUT_S,
    GrantingHost,
    LinkPath,
    NoCopies,
    RawPath,
    config_of,
    join_raw,
    main,
    make_pool,
    shuffled_ids,
    stage_rates,
    start_agent,
)
from bench.harness import Figure, interleave
from engine.paged_kv_cache import PagedKVCache
from kvtransfer.agent import TransferAgent
from kvtransfer.block_store import BlockStore
from kvtransfer.gloo_link import GlooTransport
from protos.types import PeerRef, Role

DESCRIPTION = "KV between two processes: each stage, the wire against raw gloo, end to end against its bounds"

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
CHUNKS = (64 * KIB, 256 * KIB, MIB, 4 * MIB)
PATHS = ("raw", "link", "lanes", "end_to_end")
NUM_BYTES = 128 * MIB  # of one run of one path
TARGET_RATIO = 0.9


def run(quick: bool) -> list[Figure]:
    torch.set_num_threads(1)
    num_bytes, runs = (16 * MIB, 2) if quick else (NUM_BYTES, 9)
    pool = make_pool(num_bytes)
    figures: list[Figure] = []
    with destination_process(num_bytes) as pipe:
        for chunk_nbytes in CHUNKS[2:] if quick else CHUNKS:
            figures += measure(pipe, pool, chunk_nbytes, runs)
    worst = min(figure.value for figure in figures if figure.key.startswith(("link_ratio_1M", "link_ratio_4M")))
    note = f"the link, staging to staging, {DEPTH} chunks in flight: the worse of 1 MiB and 4 MiB"
    return [Figure("wire_ratio_to_raw_gloo", worst, "x", TARGET_RATIO, note=note), *figures]


@contextmanager
def destination_process(num_bytes: int) -> Iterator[Connection]:
    """Its pipe. The group of raw gloo spans both processes."""
    with socket.create_server((BIND_HOST, 0)) as listener:
        raw_port = listener.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    pipe, theirs = spawn.Pipe()
    process = spawn.Process(target=main, args=(theirs, raw_port, num_bytes), daemon=True)
    process.start()
    join_raw(1, raw_port)
    try:
        yield pipe
        pipe.send(None)
        dist.destroy_process_group()
        process.join(TIMEOUT_S)
    finally:
        process.kill()
        process.join()


def measure(pipe: Connection, pool: PagedKVCache, chunk_nbytes: int, runs: int) -> list[Figure]:
    pipe.send(chunk_nbytes)
    source = Source(pipe, pool, chunk_nbytes)
    try:
        for path in PATHS:
            source.time_of(path)  # warm-up
        seconds = interleave(runs, {path: lambda path=path: source.time_of(path) for path in PATHS})  # type: ignore[misc]
        stages = source.stage_seconds(runs)
    finally:
        source.close()
    return figures_of(chunk_nbytes, pool.num_blocks * LAYOUT.block_nbytes, seconds, stages)


def figures_of(
    chunk_nbytes: int, num_bytes: int, seconds: dict[str, list[float]], stages: dict[str, float]
) -> list[Figure]:
    """Ratios are medians of the ratios of each turn. `stages` are seconds of one chunk."""
    size = f"{chunk_nbytes // MIB}M" if chunk_nbytes >= MIB else f"{chunk_nbytes // KIB}K"
    raw_s = statistics.median(seconds["raw"]) / (num_bytes / chunk_nbytes)
    one_by_one_s = raw_s + sum(stages.values())
    overlapped_s = max(raw_s, stages["gather"] + stages["checksum"], stages["verify"] + stages["scatter"])
    end_to_end_s = statistics.median(seconds["end_to_end"]) / (num_bytes / chunk_nbytes)
    figures = [Figure(f"{path}_{size}", num_bytes / GIB / statistics.median(seconds[path]), "GiB/s") for path in PATHS]
    figures += [Figure(f"{stage}_{size}", chunk_nbytes / GIB / duration, "GiB/s") for stage, duration in stages.items()]
    for path in ("link", "lanes"):
        ratio = statistics.median(raw / ours for raw, ours in zip(seconds["raw"], seconds[path], strict=True))
        figures.append(Figure(f"{path}_ratio_{size}", ratio, "x"))
    figures.append(Figure(f"end_to_end_ratio_to_one_by_one_{size}", one_by_one_s / end_to_end_s, "x"))
    figures.append(Figure(f"end_to_end_ratio_to_overlapped_{size}", overlapped_s / end_to_end_s, "x"))
    return figures


class Source:
    """This process's ends of all paths, for one size of chunk."""

    def __init__(self, pipe: Connection, pool: PagedKVCache, chunk_nbytes: int) -> None:
        self._pipe = pipe
        self._pool = pool
        self._chunk_nbytes = chunk_nbytes
        self._num_chunks = pool.num_blocks * LAYOUT.block_nbytes // chunk_nbytes
        self._block_ids = shuffled_ids(pool)
        self._loop = asyncio.Runner()
        slots = [torch.zeros(chunk_nbytes, dtype=torch.uint8) for _ in range(DEPTH)]
        self._transport = GlooTransport(config_of(chunk_nbytes, is_bare=True))
        self._link = LinkPath(self._transport.dial(pipe.recv(), lambda reason: None), slots)
        self._link.link.connect()
        self._paths: dict[str, RawPath | LinkPath] = {"raw": RawPath(True, slots), "link": self._link}
        self._agents = {"lanes": self._agent(NoCopies(), True), "end_to_end": self._agent(pool, False)}

    def time_of(self, path: str) -> float:
        if path in self._agents:
            return self._loop.run(self._time_of_transfer(path))
        self._pipe.send((path, self._num_chunks))
        started_at = time.perf_counter()
        self._paths[path].move(self._num_chunks)
        self._expect_arrival()
        return time.perf_counter() - started_at

    def stage_seconds(self, runs: int) -> dict[str, float]:
        """Of one chunk: what the source does measured here, what the destination does measured there."""
        ours = stage_rates(self._pool, self._chunk_nbytes, runs)
        self._pipe.send(("stages", runs))
        theirs = self._pipe.recv()
        return {
            "gather": ours["gather"],
            "checksum": ours["sum"],
            "verify": theirs["sum"],
            "scatter": theirs["scatter"],
        }

    def close(self) -> None:
        self._pipe.send("close")
        for _, agent, _ in self._agents.values():
            self._loop.run(agent.close())
        self._link.link.close()
        self._transport.close()
        self._loop.close()

    async def _time_of_transfer(self, path: str) -> float:
        """From the offer to the acknowledgement that every block is verified and written."""
        destination, agent, ends = self._agents[path]
        transfer_id = secrets.token_bytes(16)
        self._pipe.send((path, transfer_id))
        started_at = time.perf_counter()
        agent.open(transfer_id, destination, "r", 1, self._pool.num_blocks)
        agent.send_blocks(transfer_id, 0, self._block_ids)
        agent.commit(transfer_id, 0, (1,))
        async with asyncio.timeout(TIMEOUT_S):
            end = await ends.get()
        seconds = time.perf_counter() - started_at
        assert end == "closed", end
        self._expect_arrival()
        return seconds

    def _expect_arrival(self) -> None:
        assert self._pipe.poll(TIMEOUT_S), "the other process does not answer"
        answer = self._pipe.recv()
        assert answer == "arrived", answer

    def _agent(self, store: BlockStore, is_bare: bool) -> tuple[PeerRef, TransferAgent, asyncio.Queue[str]]:
        return self._loop.run(self._start_agent(store, is_bare))

    async def _start_agent(self, store: BlockStore, is_bare: bool) -> tuple[PeerRef, TransferAgent, asyncio.Queue[str]]:
        destination: PeerRef = self._pipe.recv()
        ends: asyncio.Queue[str] = asyncio.Queue()
        host = GrantingHost(self._block_ids, ends.put_nowait)
        config = config_of(self._chunk_nbytes, is_bare)
        me, agent, _ = await start_agent(Role.PREFILL, store, host, config)
        self._pipe.send(me)
        agent.set_members(1, (me, destination))
        async with asyncio.timeout(TIMEOUT_S):
            while not agent.warm_links:  # noqa: ASYNC110 (has no event)
                await asyncio.sleep(0.01)
        return destination, agent, ends
