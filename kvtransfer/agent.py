"""The one object that a worker wires: moves KV blocks to and from other workers. Composes the two sides; decides who is
dialled and who is welcome."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc

from kvtransfer.block_store import BlockStore
from kvtransfer.config import TransferConfig
from kvtransfer.counters import TransferCounters
from kvtransfer.destination_side import DestinationSide
from kvtransfer.gloo_link import GlooTransport
from kvtransfer.handshake import judge_hello, terms_of
from kvtransfer.host import TransferHost
from kvtransfer.messages import Hello, HelloRefused
from kvtransfer.source_side import SourceSide
from kvtransfer.transport import Transport
from protos import worker_pb2_grpc
from protos.types import PeerRef, Role, TransferStats

__all__ = ["TransferAgent", "TransferHost"]

_TICK_S = 0.05


class TransferAgent:
    """Every method is called on the event-loop thread, between `start` and `close`. A call for a transfer that has
    ended meanwhile is ignored."""

    def __init__(
        self,
        me: PeerRef,
        store: BlockStore,
        host: TransferHost,
        config: TransferConfig,
        transport: Transport | None = None,  # tests hand in a MemoryTransport
    ) -> None:
        self.counters = TransferCounters()
        self._me = me
        self._store = store
        self._host = host
        self._config = config
        self._transport = transport
        self._members: dict[str, PeerRef] | None = None
        self._version = -1
        self._source: SourceSide
        self._destination: DestinationSide
        self._ticking: asyncio.Task[None] | None = None

    def add_to_server(self, server: grpc.aio.Server) -> None:
        worker_pb2_grpc.add_PeerServicer_to_server(_PeerService(self), server)

    async def start(self) -> None:
        self._transport = self._transport or GlooTransport(self._config)
        parts = (self._me, self._store, self._host, self._config, self._transport, self.counters)
        self._source = SourceSide(*parts)
        self._destination = DestinationSide(*parts, self._judge)
        self._ticking = asyncio.create_task(self._tick())

    async def close(self) -> None:
        """Abort everything, join the threads, give back the descriptors. The host hears of every open transfer."""
        if self._ticking is None:
            return
        self._ticking.cancel()
        await asyncio.gather(self._ticking, return_exceptions=True)
        self._ticking = None
        await asyncio.gather(self._source.close(), self._destination.close())
        await asyncio.sleep(0)  # the last reports
        if self._transport is not None:
            self._transport.close()
            self._transport = None

    def set_members(self, version: int, members: tuple[PeerRef, ...]) -> None:
        if version < self._version:
            return
        former = {peer.incarnation for peer in (self._members or {}).values()}
        self._version = version
        self._members = {peer.worker_id: peer for peer in members}
        self._destination.set_members({peer.incarnation for peer in members}, former)
        if self._me.role is Role.PREFILL:
            self._source.set_peers(tuple(peer for peer in members if peer.role is Role.DECODE))

    @property
    def warm_links(self) -> tuple[str, ...]:
        return self._source.warm_links

    @property
    def stats(self) -> TransferStats:
        return replace(self.counters.stats(), block_nbytes=self._store.layout.block_nbytes)

    @property
    def open_transfers(self) -> int:
        return self._source.num_open + self._destination.num_open

    # --- source -------------------------------------------------------------------------------------------------------

    def open(self, transfer_id: bytes, peer: PeerRef, request_id: str, attempt: int, num_blocks: int) -> None:
        self._source.open(transfer_id, peer, request_id, attempt, num_blocks)

    def send_blocks(self, transfer_id: bytes, first_block: int, block_ids: tuple[int, ...]) -> None:
        self._source.send_blocks(transfer_id, first_block, block_ids)

    def commit(self, transfer_id: bytes, first_index: int, token_ids: tuple[int, ...]) -> None:
        self._source.commit(transfer_id, first_index, token_ids)

    # --- destination --------------------------------------------------------------------------------------------------

    def expect(self, transfer_id: bytes, source: PeerRef, request_id: str, attempt: int) -> None:
        self._destination.expect(transfer_id, source, request_id, attempt)

    def grant(self, transfer_id: bytes, num_held_blocks: int, block_ids: tuple[int, ...]) -> None:
        self._destination.grant(transfer_id, num_held_blocks, block_ids)

    def refuse(self, transfer_id: bytes, reason: str) -> None:
        self._destination.refuse(transfer_id, reason)

    # --- both ---------------------------------------------------------------------------------------------------------

    def abort(self, transfer_id: bytes, reason: str) -> None:
        self._source.abort(transfer_id, reason)
        self._destination.abort(transfer_id, reason)

    def _judge(self, hello: Hello) -> HelloRefused | None:
        return judge_hello(hello, self._me, terms_of(self._store.layout, self._config), self._members)

    async def serve(self, stream: Any) -> None:
        if self._ticking is not None:
            await self._destination.serve(stream)

    async def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_TICK_S)
            self._source.tick(loop.time())
            self._destination.tick(loop.time())


class _PeerService(worker_pb2_grpc.PeerServicer):
    def __init__(self, agent: TransferAgent) -> None:
        self._agent = agent

    async def Control(self, request_iterator: AsyncIterator[Any], context: Any) -> None:
        await self._agent.serve(context)
