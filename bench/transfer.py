"""KV moved between two processes of this machine, over gloo and over shared memory: each stage alone, the shipping path
end to end, what of it prefill hides, what a small transfer loses beside a long one, how soon a killed peer is noticed,
and raw gloo and memcpy beside them, all in one run. The other process is bench/_transfer_peer.py."""

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

from bench._killed_peer import noticed_s
from bench._transfer_peer import (
    BIND_HOST,
    DEPTH,
    LAYOUT,
    TIMEOUT_S,
    TRANSPORTS,
    GrantingHost,
    NoCopies,
    RawPath,
    SendingPath,
    config_of,
    join_raw,
    main,
    make_pool,
    shuffled_ids,
    stage_rates,
    start_agent,
)
from bench.harness import Figure, interleave, median_of, time_of
from engine.paged_kv_cache import PagedKVCache
from kvtransfer.agent import TransferAgent
from kvtransfer.block_store import BlockStore
from kvtransfer.config import TransferConfig, TransportName
from kvtransfer.transports import LocalFirst
from protos.types import PeerRef, Role

DESCRIPTION = "KV between two processes, over gloo and shared memory: each stage, end to end, what prefill hides"

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
CHUNKS = (256 * KIB, MIB, 4 * MIB)
PATHS = ("memcpy", "raw", *(f"{path}_{each}" for each in TRANSPORTS for path in ("wire", "lanes", "end_to_end")))
NUM_BYTES = 128 * MIB  # of one run of one path
RAW_GLOO_TARGET, MEMCPY_TARGET, NOTICED_TARGET_MS = 0.9, 0.8, 50.0
NUM_PREFILL_CHUNKS = 8  # of the prompt whose transfer is to be hidden
COMPUTE_SHARE = 1.5  # a prefill chunk takes so much longer than its KV takes to move alone
RESIDENT_NBYTES = {"": 0, "_400M": 400 * MIB, "_2G": 2 * GIB}  # of a killed process, beside what it needs


def run(quick: bool) -> list[Figure]:
    torch.set_num_threads(1)
    num_bytes, runs = (16 * MIB, 2) if quick else (NUM_BYTES, 9)
    pool = make_pool(num_bytes)
    figures: list[Figure] = []
    with destination_process(num_bytes) as pipe:
        for chunk_nbytes in CHUNKS[1:] if quick else CHUNKS:
            figures += measure(pipe, pool, chunk_nbytes, runs)
    sizes = list(RESIDENT_NBYTES)[: 1 if quick else None]
    return [*verdicts(figures), *figures, *(killed_peer(each, size, runs) for each in TRANSPORTS for size in sizes)]


def verdicts(figures: list[Figure]) -> list[Figure]:
    """Of chunks of the default size."""
    values = {figure.key: figure.value for figure in figures}
    note = f"memory to memory, chunks of 4 MiB, {DEPTH} of them in flight"
    return [
        Figure("wire_ratio_to_raw_gloo", values["wire_gloo_to_raw_4M"], "x", RAW_GLOO_TARGET, note=note),
        Figure("wire_ratio_to_memcpy", values["wire_shared_memory_to_memcpy_4M"], "x", MEMCPY_TARGET, note=note),
    ]


def killed_peer(transport: TransportName, size: str, runs: int) -> Figure:
    noticed_ms = 1000 * median_of(min(runs, 5), lambda: noticed_s(transport, RESIDENT_NBYTES[size]))
    note = "from SIGKILL of the sender to the end of a receive that waits for it"
    return Figure(f"killed_peer_noticed_{transport}{size}", noticed_ms, "ms", NOTICED_TARGET_MS, "lower", note)


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
        hidden = {each: source.hidden_shares(each, runs) for each in TRANSPORTS}
        delays = {each: source.delays(each, runs) for each in TRANSPORTS}
    finally:
        source.close()
    size = f"{chunk_nbytes // MIB}M" if chunk_nbytes >= MIB else f"{chunk_nbytes // KIB}K"
    num_chunks = pool.num_blocks * LAYOUT.block_nbytes / chunk_nbytes
    rates = figures_of(size, pool.num_blocks * LAYOUT.block_nbytes, seconds)
    rates += stage_figures(size, chunk_nbytes, stages, seconds, num_chunks)
    return [*rates, *hidden_figures(size, hidden), *delay_figures(size, delays)]


def figures_of(size: str, num_bytes: int, seconds: dict[str, list[float]]) -> list[Figure]:
    """Ratios are medians of the ratios of each turn."""
    figures = [Figure(f"{path}_{size}", num_bytes / GIB / statistics.median(seconds[path]), "GiB/s") for path in PATHS]
    for transport, bound, name in (("gloo", "raw", "raw"), ("shared_memory", "memcpy", "memcpy")):
        for path in ("wire", "lanes"):
            pairs = zip(seconds[bound], seconds[f"{path}_{transport}"], strict=True)
            ratio = statistics.median(fastest / ours for fastest, ours in pairs)
            figures.append(Figure(f"{path}_{transport}_to_{name}_{size}", ratio, "x"))
    return figures


def stage_figures(
    size: str, chunk_nbytes: int, stages: dict[str, float], seconds: dict[str, list[float]], num_chunks: float
) -> list[Figure]:
    """`stages` are seconds of one chunk, each stage alone. Over shared memory nothing is copied on the way."""
    figures = [Figure(f"{stage}_{size}", chunk_nbytes / GIB / duration, "GiB/s") for stage, duration in stages.items()]
    for transport in TRANSPORTS:
        wire_s = statistics.median(seconds["raw"]) / num_chunks if transport == "gloo" else 0.0
        overlapped_s = max(wire_s, stages["gather"] + stages["checksum"], stages["verify"] + stages["scatter"])
        ours_s = statistics.median(seconds[f"end_to_end_{transport}"]) / num_chunks
        one_by_one = (wire_s + sum(stages.values())) / ours_s
        figures.append(Figure(f"end_to_end_{transport}_to_one_by_one_{size}", one_by_one, "x"))
        figures.append(Figure(f"end_to_end_{transport}_to_overlapped_{size}", overlapped_s / ours_s, "x"))
    return figures


def hidden_figures(size: str, hidden: dict[TransportName, list[float]]) -> list[Figure]:
    most = 1 - 1 / NUM_PREFILL_CHUNKS
    note = f"of {NUM_PREFILL_CHUNKS} equal chunks {most:.3f} can be hidden"
    return [
        Figure(f"hidden_share_{transport}_{size}", statistics.median(shares), "", note=note)
        for transport, shares in hidden.items()
    ]


def delay_figures(size: str, delays: dict[TransportName, list[float]]) -> list[Figure]:
    note = "what a transfer of one chunk takes longer while a long one is under way, in chunks of that one"
    return [
        Figure(f"small_beside_long_{transport}_{size}", statistics.median(times), "chunks", better="lower", note=note)
        for transport, times in delays.items()
    ]


class Source:
    """This process's ends of all paths, for one size of chunk."""

    def __init__(self, pipe: Connection, pool: PagedKVCache, chunk_nbytes: int) -> None:
        self._pipe = pipe
        self._pool = pool
        self._chunk_nbytes = chunk_nbytes
        self._num_chunks = pool.num_blocks * LAYOUT.block_nbytes // chunk_nbytes
        self._block_ids = shuffled_ids(pool)
        self._loop = asyncio.Runner()
        self._slots = [torch.ones(chunk_nbytes, dtype=torch.uint8) for _ in range(2 * DEPTH)]
        self._paths: dict[str, RawPath | SendingPath] = {"raw": RawPath(True, self._slots)}
        self._agents: dict[str, tuple[PeerRef, TransferAgent, asyncio.Queue[tuple[str, float]]]] = {}
        self._links: list[LocalFirst] = []
        for transport in TRANSPORTS:
            self._paths[f"wire_{transport}"] = self._sending_path(transport)
            self._agents[f"lanes_{transport}"] = self._agent(NoCopies(), transport, True)
            self._agents[f"end_to_end_{transport}"] = self._agent(pool, transport, False)

    def _sending_path(self, transport: TransportName) -> SendingPath:
        links = LocalFirst(config_of(self._chunk_nbytes, transport, is_bare=True))
        self._links.append(links)
        self._pipe.send(links.beacon)
        path = SendingPath(links.dial(self._pipe.recv(), lambda reason: None), self._chunk_nbytes)
        path.link.connect()
        return path

    def time_of(self, path: str) -> float:
        if path == "memcpy":
            return time_of(self._copy)
        if path in self._agents:
            return self._loop.run(self._time_of_transfer(path))
        self._pipe.send((path, self._num_chunks))
        assert self._pipe.recv() == "ready"
        started_at = time.perf_counter()
        self._paths[path].move(self._num_chunks)
        return self._arrival() - started_at

    def _copy(self) -> None:
        """As many bytes, by one thread, between as many buffers."""
        for index in range(self._num_chunks):
            self._slots[DEPTH + index % DEPTH].copy_(self._slots[index % DEPTH])

    def hidden_shares(self, transport: TransportName, runs: int) -> list[float]:
        """1 - (ready to decode - end of prefill) / time of the transfer alone. Both processes read one clock."""
        path = f"end_to_end_{transport}"
        shares = []
        for _ in range(runs):
            alone_s = self._loop.run(self._time_of_transfer(path))
            compute_s = COMPUTE_SHARE * alone_s / NUM_PREFILL_CHUNKS
            exposed_s = self._loop.run(self._time_of_transfer(path, NUM_PREFILL_CHUNKS, compute_s))
            shares.append(1 - exposed_s / alone_s)
        return shares

    def delays(self, transport: TransportName, runs: int) -> list[float]:
        """Of a transfer of one chunk that begins in the middle of a long one, in the time the long one alone takes for
        a chunk."""
        path = f"end_to_end_{transport}"
        return [self._loop.run(self._delay(path)) for _ in range(runs)]

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
        for path in self._paths.values():
            if isinstance(path, SendingPath):
                path.link.close()
        for links in self._links:
            links.close()
        self._loop.close()

    async def _time_of_transfer(self, path: str, num_parts: int = 1, compute_s: float = 0.0) -> float:
        """From the last block's being computed to all of them lying verified in the other's pool. Where nothing is
        computed meanwhile, that is from the offer on."""
        destination, agent, _ = self._agents[path]
        transfer_id = secrets.token_bytes(16)
        self._pipe.send((path, transfer_id))
        computed_at = time.perf_counter()
        agent.open(transfer_id, destination, "r", 1, self._pool.num_blocks)
        for first in range(0, self._pool.num_blocks, part := self._pool.num_blocks // num_parts):
            if compute_s:
                await asyncio.sleep(compute_s)
                computed_at = time.perf_counter()
            agent.send_blocks(transfer_id, first, self._block_ids[first : first + part])
        agent.commit(transfer_id, 0, (1,))
        return (await self._arrivals(path, 1))[0] - computed_at

    async def _delay(self, path: str) -> float:
        long_s = await self._time_of_transfer(path)
        began_at = self._begin(path, 1)
        alone_s = (await self._arrivals(path, 1))[0] - began_at
        self._begin(path, self._num_chunks)
        await asyncio.sleep(long_s / 4)
        began_at = self._begin(path, 1)
        beside_s = min(await self._arrivals(path, 2)) - began_at
        return (beside_s - alone_s) / (long_s / self._num_chunks)

    def _begin(self, path: str, num_chunks: int) -> float:
        """A transfer of so many chunks, all computed; when."""
        destination, agent, _ = self._agents[path]
        transfer_id, num_blocks = secrets.token_bytes(16), num_chunks * self._chunk_nbytes // LAYOUT.block_nbytes
        self._pipe.send((path, transfer_id))
        began_at = time.perf_counter()
        agent.open(transfer_id, destination, "r", 1, num_blocks)
        agent.send_blocks(transfer_id, 0, self._block_ids[:num_blocks])
        agent.commit(transfer_id, 0, (1,))
        return began_at

    async def _arrivals(self, path: str, num_transfers: int) -> list[float]:
        async with asyncio.timeout(TIMEOUT_S):
            ends = [(await self._agents[path][2].get())[0] for _ in range(num_transfers)]
        assert set(ends) == {"closed"}, ends
        return [self._arrival() for _ in ends]

    def _arrival(self) -> float:
        """When the other process had it all."""
        assert self._pipe.poll(TIMEOUT_S), "the other process does not answer"
        answer, arrived_at = self._pipe.recv()
        assert answer == "arrived", answer
        return float(arrived_at)

    def _agent(
        self, store: BlockStore, transport: TransportName, is_bare: bool
    ) -> tuple[PeerRef, TransferAgent, asyncio.Queue[tuple[str, float]]]:
        return self._loop.run(self._start_agent(store, config_of(self._chunk_nbytes, transport, is_bare)))

    async def _start_agent(
        self, store: BlockStore, config: TransferConfig
    ) -> tuple[PeerRef, TransferAgent, asyncio.Queue[tuple[str, float]]]:
        destination: PeerRef = self._pipe.recv()
        ends: asyncio.Queue[tuple[str, float]] = asyncio.Queue()
        host = GrantingHost(self._block_ids, ends.put_nowait)
        me, agent, _ = await start_agent(Role.PREFILL, store, host, config)
        self._pipe.send(me)
        agent.set_members(1, (me, destination))
        async with asyncio.timeout(TIMEOUT_S):
            while not agent.warm_links:  # noqa: ASYNC110 (has no event)
                await asyncio.sleep(0.01)
        return destination, agent, ends
