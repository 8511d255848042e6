"""The requests placed on one worker and not yet sent to it: the router keeps them where they can still move, and sends
only as many as keep the worker busy. Knows the order and the credit; not which worker it is, nor what the requests are.
"""

from __future__ import annotations

from collections.abc import Callable

from router.queue_order import Queued, QueueOrder
from router.work_by_length import WorkByLength


class WorkerQueue:
    """Invariant: `num_tokens` and `_work` are the sums over the entries; on_change is called after every change.

    A request that is queued holds nothing on any worker. One that is sent cannot keep the credit for good: its first
    token, from either worker, or its end gives it back; reports are lost only with the stream that carries them, and
    with that (it breaks, or no heartbeat comes) the router gives up this worker with queue, credit and all."""

    def __init__(self, order: QueueOrder, dispatch_tokens: int, on_change: Callable[[], None]) -> None:
        self.num_tokens = 0
        self._work = WorkByLength()
        self._order = order
        self._dispatch_tokens = dispatch_tokens
        self._on_change = on_change

    def __len__(self) -> int:
        return len(self._order)

    @property
    def work_s(self) -> float:
        return self._work.total_s

    def work_before_s(self, prefill_s: float) -> float:
        """What would go before a request that takes so long, as far as the order lets length decide: else all."""
        return self._work.shorter_s(prefill_s) if self._order.puts_short_first else self.work_s

    def has_credit(self, num_sent_tokens: int) -> bool:
        """Whether one more may go, with so many sent and not yet prefilled: one request may overdraw it, so that one
        longer than the credit goes too."""
        return self._dispatch_tokens == 0 or num_sent_tokens < self._dispatch_tokens

    def put(self, entry: Queued) -> None:
        self._order.add(entry)
        self.num_tokens += entry.num_tokens
        self._work.add(entry.prefill_s)
        self._on_change()

    def remove(self, request_id: str) -> Queued | None:
        """None where it is not here."""
        entry = self._order.remove(request_id)
        if entry is not None:
            self.num_tokens -= entry.num_tokens
            self._work.remove(entry.prefill_s)
            self._on_change()
        return entry

    def head(self, now: float, num_sent_tokens: int, start_s: float) -> Queued | None:
        """The next to send, while there is credit. `start_s`: how long the worker is busy with what it has."""
        return self._order.head(now, start_s) if self.has_credit(num_sent_tokens) else None

    def in_order(self, now: float, start_s: float) -> list[Queued]:
        return self._order.in_order(now, start_s)
