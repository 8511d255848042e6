"""The one object that a worker wires: moves KV blocks to and from other workers. Composes the two sides; decides who is
dialled and who is welcome."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc

from kvtransfer.asks import Asks
from kvtransfer.block_store import BlockStore
from kvtransfer.config import TransferConfig
from kvtransfer.counters import TransferCounters
from kvtransfer.destination_side import DestinationSide
from kvtransfer.greeter import Greeter
from kvtransfer.handshake import judge_hello, terms_of
from kvtransfer.host import TransferHost
from kvtransfer.messages import Hello, HelloRefused, PullAsk, ReturnAsk, pack_hashes
from kvtransfer.source_side import SourceSide
from kvtransfer.transport import Transport
from kvtransfer.transports import transport_for
from protos import worker_pb2_grpc
from protos.types import PeerRef, Role, TransferKind, TransferStats

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
        secret: bytes,  # handshake.peer_secret
        transport: Transport | None = None,  # tests hand in a MemoryTransport
    ) -> None:
        self.counters = TransferCounters()
        self._me = me
        self._store = store
        self._host = host
        self._config = config
        self._secret = secret
        self._transport = transport
        self._members: dict[str, PeerRef] | None = None
        self._version = -1
        self._source: SourceSide
        self._destination: DestinationSide
        self._asks: Asks
        self._ticking: asyncio.Task[None] | None = None

    def add_to_server(self, server: grpc.aio.Server) -> None:
        worker_pb2_grpc.add_PeerServicer_to_server(_PeerService(self), server)

    async def start(self) -> None:
        self._transport = self._transport or transport_for(self._config, self._store.device)
        terms = terms_of(self._store.layout, self._config)
        greeter = Greeter(self._me, terms, self._secret, self._config, self._judge, self.counters)
        parts = (self._me, self._store, self._host, self._config, self._transport, self.counters, greeter)
        self._source = SourceSide(*parts)
        self._destination = DestinationSide(*parts)
        self._asks = Asks(self._host, self._config, self._source, greeter)
        self._ticking = asyncio.create_task(self._tick())

    async def close(self) -> None:
        """Abort everything, join the threads, give back the descriptors. The host hears of every open transfer."""
        if self._ticking is None:
            return
        self._ticking.cancel()
        await asyncio.gather(self._ticking, return_exceptions=True)
        self._ticking = None
        await asyncio.gather(self._asks.close(), self._source.close(), self._destination.close())
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
        hands_over = self._me.role is Role.PREFILL
        warm = tuple(peer for peer in members if hands_over and peer.role is Role.DECODE)
        self._source.set_members(members, warm)
        self._asks.set_members(self._members)

    @property
    def warm_links(self) -> tuple[str, ...]:
        return self._source.warm_links

    @property
    def stats(self) -> TransferStats:
        block_nbytes = self._store.layout.block_nbytes
        return replace(self.counters.stats(), block_nbytes=block_nbytes, links=self._source.link_stats)

    @property
    def open_transfers(self) -> int:
        return self._source.num_open + self._destination.num_open

    # --- source -------------------------------------------------------------------------------------------------------

    def open(
        self,
        transfer_id: bytes,
        peer: PeerRef,
        request_id: str,
        attempt: int,
        num_blocks: int,
        kind: TransferKind = TransferKind.HANDOFF,
    ) -> None:
        """A migration may have to wait for its link to be made, so nothing is sent before the first on_sent."""
        is_member = (self._members or {}).get(peer.worker_id) == peer
        if kind is TransferKind.MIGRATE and is_member:
            self._source.open_when_warm(transfer_id, peer, request_id, attempt, num_blocks, kind)
            return
        refusal = self._source.open(transfer_id, peer, request_id, attempt, num_blocks, kind)
        self._asks.answered(transfer_id, refusal)

    def refuse_pull(self, pull_id: bytes, reason: str) -> None:
        self._asks.answered(pull_id, reason)

    def offer_return(self, home_worker_id: str, request_id: str, attempt: int, block_hashes: tuple[bytes, ...]) -> None:
        """Dropped where the home is not there or does not hear it."""
        if (home := (self._members or {}).get(home_worker_id)) is not None:
            ask = ReturnAsk(request_id, attempt, pack_hashes(block_hashes))
            self._asks.ask(home, ask, lambda refusal: None)

    def send_blocks(self, transfer_id: bytes, first_block: int, block_ids: tuple[int, ...]) -> None:
        self._source.send_blocks(transfer_id, first_block, block_ids)

    def commit(self, transfer_id: bytes, first_index: int, token_ids: tuple[int, ...]) -> None:
        self._source.commit(transfer_id, first_index, token_ids)

    # --- destination --------------------------------------------------------------------------------------------------

    def expect(
        self,
        transfer_id: bytes,
        source: PeerRef,
        request_id: str,
        attempt: int,
        kind: TransferKind = TransferKind.HANDOFF,
    ) -> None:
        self._destination.expect(transfer_id, source, request_id, attempt, kind)

    def request_pull(
        self,
        pull_id: bytes,
        source_worker_id: str,
        request_id: str,
        attempt: int,
        block_hashes: tuple[bytes, ...],
        kind: TransferKind,
    ) -> None:
        """Ask that worker, whichever life of it is a member now: what it sends is named by its hashes."""
        source = (self._members or {}).get(source_worker_id)
        if source is None:
            reason = f"{source_worker_id} is not a member"
            asyncio.get_running_loop().call_soon(self._host.on_pull_refused, pull_id, reason)
            return
        self._destination.expect(pull_id, source, request_id, attempt, kind)
        ask = PullAsk(pull_id, kind, request_id, attempt, pack_hashes(block_hashes))
        self._asks.ask(source, ask, lambda refusal: self._on_pull_refused(pull_id, refusal))

    def _on_pull_refused(self, pull_id: bytes, reason: str) -> None:
        if self._destination.forget(pull_id):
            self._host.on_pull_refused(pull_id, reason)

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

    async def answer(self, stream: Any) -> None:
        if self._ticking is not None:
            await self._asks.serve(stream)

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

    async def Ask(self, request_iterator: AsyncIterator[Any], context: Any) -> None:
        await self._agent.answer(context)
