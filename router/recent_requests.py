"""The requests that ended last, for the page at /ui: a bounded memory of who ran them and what they cost. Holds no
prompt and no text. Time is handed in."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from router.account import RequestAccount

MAX_RECENT = 200
FLOW_WINDOW_S = 60.0
FLOW_BUCKET_S = 5.0


@dataclass(frozen=True, slots=True)
class EndedRequest:
    request_id: str  # the internal one
    ended_at_unix_s: float
    outcome: str  # a finish reason, or the name of a gRPC status code
    num_prompt_tokens: int
    num_output_tokens: int
    account: RequestAccount | None  # None: it ended before any worker had it, or was cancelled


@dataclass(slots=True)
class Flow:
    """What went from one prefill worker to one decode worker; both are the same where nothing was handed over."""

    prefill_worker: str
    decode_worker: str
    num_requests: int = 0
    num_kv_bytes: int = 0

    def add(self, num_requests: int, num_kv_bytes: int) -> None:
        self.num_requests += num_requests
        self.num_kv_bytes += num_kv_bytes


Flows = dict[tuple[str, str], Flow]


class RecentRequests:
    """Invariant: the last MAX_RECENT requests in the order in which they ended, and the flows of FLOW_WINDOW_S at
    least and one bucket more at most. Its size does not grow with the number of requests."""

    def __init__(self) -> None:
        self._ended: deque[EndedRequest] = deque(maxlen=MAX_RECENT)
        self._buckets: deque[tuple[int, Flows]] = deque()  # (which span of FLOW_BUCKET_S, its flows), oldest first

    def note(self, ended: EndedRequest) -> None:
        self._ended.append(ended)
        account = ended.account
        if account is None or not account.prefill_worker:
            return
        index = int(ended.ended_at_unix_s // FLOW_BUCKET_S)
        # A clock that was set back adds to the newest bucket: the order holds.
        if not self._buckets or self._buckets[-1][0] < index:
            self._buckets.append((index, {}))
        self._drop_old(ended.ended_at_unix_s)
        _add(self._buckets[-1][1], account.prefill_worker, account.decode_worker, 1, account.num_kv_bytes)

    @property
    def ended(self) -> Sequence[EndedRequest]:
        """Oldest first."""
        return self._ended

    def flows(self, now_unix_s: float) -> list[Flow]:
        """Of the last minute, busiest first."""
        self._drop_old(now_unix_s)
        totals: Flows = {}
        for _, flows in self._buckets:
            for flow in flows.values():
                _add(totals, flow.prefill_worker, flow.decode_worker, flow.num_requests, flow.num_kv_bytes)
        return sorted(totals.values(), key=lambda flow: (-flow.num_requests, flow.prefill_worker, flow.decode_worker))

    def _drop_old(self, now_unix_s: float) -> None:
        oldest = int((now_unix_s - FLOW_WINDOW_S) // FLOW_BUCKET_S)
        while self._buckets and self._buckets[0][0] < oldest:
            self._buckets.popleft()


def _add(flows: Flows, prefill_worker: str, decode_worker: str, num_requests: int, num_kv_bytes: int) -> None:
    flow = flows.setdefault((prefill_worker, decode_worker), Flow(prefill_worker, decode_worker))
    flow.add(num_requests, num_kv_bytes)
