"""What the transfer agent tells the worker that it serves."""

from __future__ import annotations

from typing import Protocol

from protos.types import PeerRef, TransferFailure, TransferKind


class TransferHost(Protocol):
    """Called on the event-loop thread, never from within a call into the agent; must not block. Each transfer that the
    host opened, expects or asked for ends in exactly one of arrived, lost, refused, closed, pull refused, or in the
    host's own `refuse`."""

    def on_offered(self, transfer_id: bytes, request_id: str, attempt: int, num_blocks: int) -> None:
        """Destination: answer, now or later, by the agent's grant or refuse."""

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
        """Destination: of the offered blocks the first num_blocks, those that were here already among them, are
        verified and written: all, but for a migration."""

    def on_lost(self, transfer_id: bytes, reason: str) -> None:
        """Destination: it will not come, and nothing writes to the granted blocks any more."""

    def on_refused(self, transfer_id: bytes, reason: str) -> None:
        """Source: the destination took nothing."""

    def on_sent(self, transfer_id: bytes, num_blocks: int) -> None:
        """Source of a migration, many times: the destination has granted its blocks, and so many of the request's
        blocks have been sent or were there."""

    def on_closed(self, transfer_id: bytes, failure: TransferFailure | None) -> None:
        """Source: acknowledged (None), aborted or expired, and nothing reads the blocks any more."""

    def on_pull_asked(
        self,
        pull_id: bytes,
        destination: PeerRef,
        request_id: str,
        attempt: int,
        block_hashes: tuple[bytes, ...],
        kind: TransferKind,
    ) -> None:
        """Source: answer, now or later, by the agent's open or refuse_pull. There is a link to the destination."""

    def on_pull_refused(self, pull_id: bytes, reason: str) -> None:
        """Destination: nothing is offered, or nobody has answered."""

    def on_return_offered(
        self, source_worker_id: str, request_id: str, attempt: int, block_hashes: tuple[bytes, ...]
    ) -> None:
        """Home: nobody waits for an answer."""
