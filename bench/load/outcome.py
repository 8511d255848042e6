"""What became of one request, and the words for it: TTFT, TPOT, ITL, E2E. Instants are seconds since the level began.

A request's latency counts from the instant at which it was due, not from the one at which it was sent: a server (or a
generator) that falls behind must not look fast by delaying the questions."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Slo:
    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class Outcome:
    due_at: float
    sent_at: float
    ended_at: float
    text_at: tuple[float, ...] = ()  # of each chunk that carried text
    last_at: float = 0.0  # of the last chunk of the choice, with text or not
    num_prompt_tokens: int | None = None  # by the server's account, as are the next two
    num_output_tokens: int | None = None
    num_cached_tokens: int | None = None
    error: str | None = None  # its kind: http_429, timeout, connection, cut, malformed, in_stream
    error_detail: str = ""

    @property
    def is_ok(self) -> bool:
        return self.error is None

    @property
    def num_tokens(self) -> int:
        """Output tokens; chunks with text where the server does not say."""
        return len(self.text_at) if self.num_output_tokens is None else self.num_output_tokens

    @property
    def first_at(self) -> float:
        """An answer without any text (special tokens only) came at its end."""
        return self.text_at[0] if self.text_at else self.last_at

    @property
    def ttft_s(self) -> float:
        return self.first_at - self.due_at

    @property
    def e2e_s(self) -> float:
        return self.ended_at - self.due_at

    @property
    def tpot_s(self) -> float | None:
        """None for a single token: it has no successor to wait for."""
        return (self.last_at - self.first_at) / (self.num_tokens - 1) if self.num_tokens > 1 else None

    @property
    def itls_s(self) -> list[float]:
        """Gaps between chunks with text; a chunk may carry several tokens."""
        return [after - before for before, after in pairwise(self.text_at)]

    @property
    def lateness_s(self) -> float:
        return self.sent_at - self.due_at

    def meets(self, slo: Slo) -> bool:
        return self.is_ok and self.ttft_s <= slo.ttft_s and (self.tpot_s is None or self.tpot_s <= slo.tpot_s)
