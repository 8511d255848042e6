"""Which router session a request's outputs go to. Knows ids only."""

from __future__ import annotations

from engine.router_session import Entry, RouterSession
from protos.types import Abort, GenerateRequest, TokenOutput


class RequestOwners:
    """Invariant: an entry lives from submit until the request has finished here, was aborted, or was handed over. One
    that migrates away is aborted by the router, and until then may come back."""

    def __init__(self) -> None:
        self._owners: dict[str, tuple[RouterSession, int]] = {}
        self._open_transfers: dict[bytes, tuple[str, int]] = {}

    def __len__(self) -> int:
        return len(self._owners) + len(self._open_transfers)

    def submitted(self, request: GenerateRequest, session: RouterSession) -> None:
        self._owners[request.request_id] = (session, request.attempt)

    def aborted(self, abort: Abort) -> None:
        owner = self._owners.get(abort.request_id)
        if owner is not None and owner[1] <= abort.attempt:
            del self._owners[abort.request_id]

    def transfer_opened(self, transfer_id: bytes, request_id: str, attempt: int) -> None:
        self._open_transfers[transfer_id] = (request_id, attempt)

    def transfer_refused(self, transfer_id: bytes) -> None:
        self._open_transfers.pop(transfer_id, None)

    def transfer_closed(self, transfer_id: bytes) -> None:
        """The request went to its destination, or ended: this worker has no more to say about it."""
        opened_for = self._open_transfers.pop(transfer_id, None)
        if opened_for is None or opened_for in self._open_transfers.values():
            return
        request_id, attempt = opened_for
        owner = self._owners.get(request_id)
        if owner is not None and owner[1] == attempt:
            del self._owners[request_id]

    def emit(self, entry: Entry) -> None:
        owner = self._owners.get(entry.request_id)
        if owner is None or owner[1] != entry.attempt:
            return
        owner[0].emit(entry)
        if isinstance(entry, TokenOutput) and entry.finish_reason is not None:
            del self._owners[entry.request_id]

    def end_session(self, session: RouterSession) -> list[Abort]:
        """The requests that lost their reader."""
        orphans = [
            Abort(request_id, attempt) for request_id, (owner, attempt) in self._owners.items() if owner is session
        ]
        for orphan in orphans:
            del self._owners[orphan.request_id]
        return orphans
