"""What the router has for one client's call and the client has not read yet. Bounded; knows no sockets."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from router.events import Deliver, Fail


class ClientCall:
    """Invariant: at most max_tokens unread output tokens are kept, save those of a last word; a Fail replaces all."""

    def __init__(self, request_id: str, max_tokens: int) -> None:
        self.request_id = request_id
        self._max_tokens = max_tokens
        self._unread: Deliver | Fail | None = None
        self._wake = asyncio.Event()

    def put(self, effect: Deliver | Fail) -> bool:
        """False, and the call has failed, where the client reads too slowly for this."""
        is_kept = isinstance(effect, Fail) or self._fits(effect)
        if isinstance(effect, Fail):
            self._unread = effect
        elif is_kept:
            self._unread = self._merge(effect)
        else:
            message = f"the client reads too slowly: more than {self._max_tokens} output tokens wait for it"
            self._unread = Fail(self.request_id, "RESOURCE_EXHAUSTED", message)
        self._wake.set()
        return is_kept

    async def take(self) -> Deliver | Fail:
        """All that has come since the last time, as one."""
        await self._wake.wait()
        self._wake.clear()
        assert self._unread is not None
        unread, self._unread = self._unread, None
        return unread

    def _fits(self, deliver: Deliver) -> bool:
        if deliver.finish_reason is not None:
            return True
        num_unread = len(self._unread.token_ids) if isinstance(self._unread, Deliver) else 0
        return num_unread == 0 or num_unread + len(deliver.token_ids) <= self._max_tokens

    def _merge(self, deliver: Deliver) -> Deliver | Fail:
        unread = self._unread
        if not isinstance(unread, Deliver):
            return deliver if unread is None else unread
        assert deliver.first_index == unread.first_index + len(unread.token_ids)
        return replace(
            deliver,
            first_index=unread.first_index,
            token_ids=unread.token_ids + deliver.token_ids,
            logprobs=unread.logprobs + deliver.logprobs,
        )
