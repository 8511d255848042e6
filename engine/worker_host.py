"""A worker on its event loop: routers on one side, the engine's threads on the other, KV transfers beside it. Passes
events on and keeps the lease; decides nothing about requests or blocks."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace

import grpc.aio

from engine.engine_thread import EngineThread
from engine.events import (
    AbortTransfer,
    BlocksSent,
    CommitTransfer,
    CopyBlocks,
    Effect,
    Event,
    ExpectTransfer,
    GrantTransfer,
    OfferReturn,
    OpenTransfer,
    PullRefused,
    PullRequested,
    RefusePull,
    RefuseTransfer,
    RequestPull,
    ReturnOffered,
    SendBlocks,
    Submitted,
    TransferArrived,
    TransferClosed,
    TransferLost,
    TransferOffered,
    TransferRefused,
)
from engine.host_copies import HostCopies
from engine.request_owners import RequestOwners
from engine.router_session import RouterSession, check_hello, receive_commands, send_reports, worker_hello
from engine.transfer_port import TransferPort
from engine.worker_config import LeaseConfig
from protos import codec
from protos import worker_pb2 as pb
from protos import worker_pb2_grpc as pb_grpc
from protos.types import HandoffRefused, MigrationFailed, PeerRef, TokenOutput, TransferFailure, TransferKind

logger = logging.getLogger("twinring.engine")

Context = grpc.aio.ServicerContext[pb.RouterFrame, pb.WorkerFrame]


class WorkerHost(pb_grpc.WorkerServicer):
    """Invariant: an output goes to the session that submitted its request, or nowhere.

    Has the shape of kvtransfer's TransferHost. Lives on one event loop; the engine's threads call only `deliver` and
    `crashed`."""

    def __init__(self, me: PeerRef, model_fingerprint: str, lease: LeaseConfig, on_end: Callable[[str], None]) -> None:
        """`on_end(reason)` is called when the worker must exit: its lease ran out or its engine crashed."""
        self.me = me
        self._model_fingerprint = model_fingerprint
        self._lease = lease
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._sessions: set[RouterSession] = set()
        self._owners = RequestOwners()
        self._lease_renewed_at: float | None = None  # None until the first router has come: loading has no lease
        self._fenced = False
        self._is_leaving = False
        self._engine: EngineThread
        self._transfers: TransferPort
        self._copies: HostCopies | None = None

    def wire(self, engine: EngineThread, transfers: TransferPort, copies: HostCopies | None = None) -> None:
        """copies: where the engine has host memory."""
        self._engine = engine
        self._transfers = transfers
        self._copies = copies

    # --- routers --------------------------------------------------------------------------------------------------

    async def Connect(self, request_iterator: AsyncIterator[pb.RouterFrame], context: Context) -> None:
        first = await anext(request_iterator)
        await check_hello(first.hello, self.me, context)
        await context.write(worker_hello(self.me, self._model_fingerprint))
        session = RouterSession(first.hello.router_id)
        self._sessions.add(session)
        self._heard_from(session)
        if self._is_leaving:
            session.leave()
        tasks = [
            asyncio.create_task(send_reports(session, context)),
            asyncio.create_task(receive_commands(request_iterator, self._on_frame, session)),
            asyncio.create_task(self._until_silent(session)),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            session.close()
            self._sessions.discard(session)
            self._engine.post(*self._owners.end_session(session))

    def _heard_from(self, session: RouterSession) -> None:
        """Any router renews the worker's lease, each one its own session's."""
        self._lease_renewed_at = session.heard_at = time.monotonic()

    async def _until_silent(self, session: RouterSession) -> None:
        """A router that hangs while others go on has requests here that nobody waits for: its session ends."""
        while True:
            left_s = session.heard_at + self._lease.lease_s - time.monotonic()
            if left_s < 0:
                return
            await asyncio.sleep(left_s + self._lease.heartbeat_interval_s)

    def _on_frame(self, session: RouterSession, frame: pb.RouterFrame) -> None:
        if self._fenced:
            return
        self._heard_from(session)
        command = codec.command_from_proto(frame)
        if command.members is not None:
            self._transfers.set_members(command.membership_version, command.members)
        for request in command.submits:
            self._owners.submitted(request, session)
        for abort in command.aborts:
            self._owners.aborted(abort)
        # In this order: a frame may submit a request and, batched behind it, already abort it.
        events: list[Event] = [
            *map(Submitted, command.submits),
            *command.retargets,
            *command.migrates,
            *command.aborts,
        ]
        if events:
            self._engine.post(*events)

    async def Leave(self, message: pb.LeaveRequest, context: object) -> pb.LeaveResponse:
        self.leave()
        return pb.LeaveResponse()

    def leave(self) -> None:
        """Ask the routers to be drained: whoever keeps the workers then ends this one."""
        self._is_leaving = True
        for session in self._sessions:
            session.leave()

    @property
    def is_live(self) -> bool:
        """A worker whose engine hangs is not vouched for."""
        return not self._fenced and self._engine.step_age_s(time.monotonic()) <= self._lease.max_step_s

    @property
    def has_router(self) -> bool:
        return bool(self._sessions)

    async def keep_lease(self) -> None:
        """Send heartbeats while the engine makes progress; fence this worker once its lease has run out."""
        heartbeat = 0
        while not self._fenced:
            await asyncio.sleep(self._lease.heartbeat_interval_s)
            silent_s = 0.0 if self._lease_renewed_at is None else time.monotonic() - self._lease_renewed_at
            if silent_s > self._lease.lease_s:
                self._fence(f"lease ran out: no router for {silent_s:.2f} s")
            elif self.is_live:
                heartbeat += 1
                transfers = self._transfers
                stats = replace(self._engine.stats, warm_links=transfers.warm_links, transfers=transfers.stats)
                for session in self._sessions:
                    session.beat(heartbeat, stats)

    def _fence(self, reason: str) -> None:
        logger.error("fenced", extra={"fields": {"worker_id": self.me.worker_id, "reason": reason}})
        self._fenced = True
        self._engine.fence(reason)
        self._on_end(reason)

    # --- the engine's threads -------------------------------------------------------------------------------------

    def deliver(self, effects: Sequence[Effect]) -> None:
        """Called on either thread of the engine."""
        self._loop.call_soon_threadsafe(self._apply, effects)

    def crashed(self, error: BaseException) -> None:
        """Called on either thread of the engine."""
        self._loop.call_soon_threadsafe(self._fence, f"engine crashed: {error!r}")

    def _apply(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            match effect:
                case TokenOutput() | HandoffRefused() | MigrationFailed():
                    self._owners.emit(effect)
                case OpenTransfer():
                    self._open(effect)
                case SendBlocks(transfer_id, first_block, block_ids):
                    self._transfers.send_blocks(transfer_id, first_block, block_ids)
                case CommitTransfer(transfer_id, first_index, token_ids):
                    self._transfers.commit(transfer_id, first_index, token_ids)
                case AbortTransfer(transfer_id, reason):
                    self._transfers.abort(transfer_id, reason)
                case ExpectTransfer(handoff, request_id, attempt):
                    self._transfers.expect(handoff.transfer_id, handoff.peer, request_id, attempt, handoff.kind)
                case GrantTransfer(transfer_id, num_held_blocks, block_ids):
                    self._transfers.grant(transfer_id, num_held_blocks, block_ids)
                case RefuseTransfer(transfer_id, reason):
                    self._transfers.refuse(transfer_id, reason)
                case RequestPull(pull_id, source_worker_id, request_id, attempt, block_hashes, kind):
                    self._transfers.request_pull(pull_id, source_worker_id, request_id, attempt, block_hashes, kind)
                case RefusePull(pull_id, _, reason):
                    self._transfers.refuse_pull(pull_id, reason)
                case OfferReturn(home_worker_id, request_id, attempt, block_hashes):
                    self._transfers.offer_return(home_worker_id, request_id, attempt, block_hashes)
                case CopyBlocks():
                    assert self._copies is not None, "the engine has no host memory"
                    self._copies.copy(effect)

    def _open(self, effect: OpenTransfer) -> None:
        """A pull or a return does not move its request: that one is elsewhere, or waits here for its handoff. One that
        migrates leaves when the router says so."""
        handoff, request_id, attempt = effect.handoff, effect.request_id, effect.attempt
        if effect.kind is TransferKind.HANDOFF:
            self._owners.transfer_opened(handoff.transfer_id, request_id, attempt)
        self._transfers.open(handoff.transfer_id, handoff.peer, request_id, attempt, effect.num_blocks, effect.kind)

    # --- KV transfers (kvtransfer.agent.TransferHost) ----------------------------------------------------------------

    def on_offered(self, transfer_id: bytes, request_id: str, attempt: int, num_blocks: int) -> None:
        self._engine.post(TransferOffered(transfer_id, request_id, attempt, num_blocks))

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
        self._engine.post(
            TransferArrived(transfer_id, first_index, token_ids, num_bytes, transfer_s, exposed_s, num_blocks)
        )

    def on_lost(self, transfer_id: bytes, reason: str) -> None:
        self._engine.post(TransferLost(transfer_id, reason))

    def on_refused(self, transfer_id: bytes, reason: str) -> None:
        self._owners.transfer_refused(transfer_id)
        self._engine.post(TransferRefused(transfer_id, reason))

    def on_sent(self, transfer_id: bytes, num_blocks: int) -> None:
        self._engine.post(BlocksSent(transfer_id, num_blocks))

    def on_closed(self, transfer_id: bytes, failure: TransferFailure | None) -> None:
        self._owners.transfer_closed(transfer_id)
        self._engine.post(TransferClosed(transfer_id, failure))

    def on_pull_asked(
        self,
        pull_id: bytes,
        destination: PeerRef,
        request_id: str,
        attempt: int,
        block_hashes: tuple[bytes, ...],
        kind: TransferKind,
    ) -> None:
        self._engine.post(PullRequested(pull_id, destination, request_id, attempt, block_hashes, kind))

    def on_pull_refused(self, pull_id: bytes, reason: str) -> None:
        self._engine.post(PullRefused(pull_id, reason))

    def on_return_offered(
        self, source_worker_id: str, request_id: str, attempt: int, block_hashes: tuple[bytes, ...]
    ) -> None:
        self._engine.post(ReturnOffered(source_worker_id, request_id, attempt, block_hashes))
