"""A worker as far as transfers go: a tensor for a block pool, a host that records, a real agent, a real gRPC server."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import grpc
import torch

from kvtransfer.agent import TransferAgent
from kvtransfer.config import TransferConfig
from kvtransfer.transport import Transport
from protos.types import KVLayout, PeerRef, Role, TransferFailure, TransferKind

LAYOUT = KVLayout("model-a", "float32", 2, 2, 8, 4, 4)  # 1 KiB a block
NUM_BLOCKS = 64
SECRET = bytes(range(32))
CONFIG = TransferConfig(chunk_nbytes=2 * LAYOUT.block_nbytes, num_staging_chunks=2)  # equal in every process


class TensorStore:
    """Satisfies BlockStore. `gate` holds gathers and scatters back while it is cleared."""

    device = torch.device("cpu")

    def __init__(self, layout: KVLayout = LAYOUT, seed: int | None = None) -> None:
        self.layout = layout
        numel = layout.block_nbytes // layout.itemsize
        generator = torch.Generator().manual_seed(seed or 0)
        self.pool = torch.zeros(NUM_BLOCKS, numel)  # [num_blocks, block_numel]
        if seed is not None:
            self.pool.normal_(generator=generator)
        self.gate = threading.Event()
        self.gate.set()
        self.num_inside = 0  # gathers and scatters under way

    def gather(self, block_ids: Sequence[int], out: torch.Tensor) -> None:
        self.num_inside += 1
        self.gate.wait(10)
        torch.index_select(self.pool, 0, torch.tensor(block_ids), out=out)
        self.num_inside -= 1

    def scatter(self, block_ids: Sequence[int], staged: torch.Tensor) -> None:
        self.num_inside += 1
        self.gate.wait(10)
        self.pool.index_copy_(0, torch.tensor(block_ids), staged)
        self.num_inside -= 1


class RecordingHost:
    """Grants what it is offered to the blocks named in `grants`, or leaves the answer to the test."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.answer: Callable[[bytes, int], None] = lambda transfer_id, num_blocks: None
        self.answer_pull: Callable[[bytes, PeerRef], None] = lambda pull_id, destination: None
        self._changed = asyncio.Event()

    def on_offered(self, transfer_id: bytes, request_id: str, attempt: int, num_blocks: int) -> None:
        self._add("offered", transfer_id, request_id, attempt, num_blocks)
        self.answer(transfer_id, num_blocks)

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
        assert 0 <= exposed_s <= transfer_s
        self._add("arrived", transfer_id, first_index, token_ids, num_bytes)

    def on_lost(self, transfer_id: bytes, reason: str) -> None:
        self._add("lost", transfer_id, reason)

    def on_refused(self, transfer_id: bytes, reason: str) -> None:
        self._add("refused", transfer_id, reason)

    def on_sent(self, transfer_id: bytes, num_blocks: int) -> None:
        self._add("sent", transfer_id, num_blocks)

    def on_closed(self, transfer_id: bytes, failure: TransferFailure | None) -> None:
        self._add("closed", transfer_id)

    def on_pull_asked(
        self,
        pull_id: bytes,
        destination: PeerRef,
        request_id: str,
        attempt: int,
        block_hashes: tuple[bytes, ...],
        kind: TransferKind,
    ) -> None:
        self._add("asked", pull_id, destination, request_id, attempt, block_hashes, kind)
        self.answer_pull(pull_id, destination)

    def on_pull_refused(self, pull_id: bytes, reason: str) -> None:
        self._add("pull refused", pull_id, reason)

    def on_return_offered(
        self, source_worker_id: str, request_id: str, attempt: int, block_hashes: tuple[bytes, ...]
    ) -> None:
        self._add("return offered", source_worker_id, request_id, attempt, block_hashes)

    def _add(self, *event: Any) -> None:
        self.events.append(event)
        self._changed.set()

    def of(self, transfer_id: bytes | str) -> list[tuple[Any, ...]]:
        return [event for event in self.events if event[1] == transfer_id]

    def ends(self, transfer_id: bytes) -> list[str]:
        return [event[0] for event in self.of(transfer_id) if event[0] not in ("offered", "asked", "sent")]

    async def next(self, kind: str, transfer_id: bytes | str, timeout_s: float = 10.0) -> tuple[Any, ...]:
        async with asyncio.timeout(timeout_s):
            while True:
                for event in self.of(transfer_id):
                    if event[0] == kind:
                        return event
                self._changed.clear()
                await self._changed.wait()


class Worker:
    """One life of one worker."""

    def __init__(
        self,
        role: Role,
        worker_id: str,
        config: TransferConfig,
        layout: KVLayout = LAYOUT,
        seed: int | None = None,
        transport: Transport | None = None,
        secret: bytes = SECRET,
    ) -> None:
        self.role, self.worker_id, self.config, self.transport = role, worker_id, config, transport
        self.secret = secret
        self.store = TensorStore(layout, seed)
        self.host = RecordingHost()
        self.me: PeerRef
        self.agent: TransferAgent

    async def start(self) -> Worker:
        self.server = grpc.aio.server()
        port = self.server.add_insecure_port("127.0.0.1:0")
        self.me = PeerRef(self.worker_id, secrets.token_hex(8), f"127.0.0.1:{port}", self.role)
        self.agent = TransferAgent(self.me, self.store, self.host, self.config, self.secret, self.transport)
        self.agent.add_to_server(self.server)
        await self.agent.start()
        await self.server.start()
        return self

    async def stop(self) -> None:
        self.store.gate.set()
        await self.agent.close()
        await self.server.stop(None)

    async def warm(self, *worker_ids: str, timeout_s: float = 10.0) -> None:
        await until(lambda: set(self.agent.warm_links) == set(worker_ids), timeout_s)

    def grants(self, block_ids: Sequence[int], num_held_blocks: int = 0) -> None:
        """Answer every offer so."""
        self.host.answer = lambda transfer_id, num_blocks: self.agent.grant(
            transfer_id, num_held_blocks, tuple(block_ids)
        )


def membership(version: int, *workers: Worker) -> None:
    for worker in workers:
        worker.agent.set_members(version, tuple(other.me for other in workers))


def altered(layout: KVLayout, **changes: Any) -> KVLayout:
    return replace(layout, **changes)


async def until(holds: Callable[[], bool], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
