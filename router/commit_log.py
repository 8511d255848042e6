"""Which output tokens of one request are settled. Decides what a report adds; knows no workers, attempts or text."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

from protos.types import FinishReason, Logprobs


@dataclass(frozen=True, slots=True)
class Taken:
    """What one report added: new tokens at the end of the log, and why the attempt cannot go on (empty: it can)."""

    token_ids: tuple[int, ...]
    conflict: str = ""
    logprobs: tuple[Logprobs, ...] = ()  # one for each of token_ids, where the reports had them


class CommitLog:
    """Invariant: a committed token never changes; tokens commit in order of index, each index once.

    The end is known once a report with a finish reason has come, maybe before the tokens in front of it."""

    def __init__(self, max_pending_tokens: int, given: Iterable[int] = ()) -> None:
        """given: output that the caller has already, the beginning of the log."""
        self.token_ids = array("i", given)
        self.num_given_tokens = len(self.token_ids)
        self.finish_reason: FinishReason | None = None
        self._end: int | None = None
        self._max_pending_tokens = max_pending_tokens
        self._pending: list[tuple[int, tuple[int, ...], tuple[Logprobs, ...]]] = []

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def is_complete(self) -> bool:
        return self._end == len(self.token_ids)

    def take(
        self,
        index: int,
        token_ids: tuple[int, ...],
        finish_reason: FinishReason | None = None,
        logprobs: tuple[Logprobs, ...] = (),
    ) -> Taken:
        """Commit what can be committed of token_ids, which start at output index `index`."""
        before = len(self.token_ids)
        fresh: list[Logprobs] = []
        conflict = self._note_end(index + len(token_ids), finish_reason)
        if not conflict and index > len(self.token_ids):
            conflict = self._hold(index, token_ids, logprobs)
        elif not conflict:
            conflict = self._commit(index, token_ids, logprobs, fresh) or self._drain(fresh)
        return Taken(tuple(self.token_ids[before:]), conflict, tuple(fresh))

    def start_over(self) -> None:
        """A new attempt resumes behind the last committed token: what only the old one vouched for is forgotten."""
        self._pending.clear()
        self._end = None
        self.finish_reason = None

    def _note_end(self, end: int, finish_reason: FinishReason | None) -> str:
        if self._end is not None and (end > self._end or (finish_reason is not None and end != self._end)):
            return f"tokens up to index {end} after an end at {self._end}"
        if finish_reason is None:
            return ""
        num_reported = max([len(self.token_ids), *(index + len(tokens) for index, tokens, _ in self._pending)])
        if end < num_reported:
            return f"an end at {end} after tokens up to index {num_reported}"
        self._end, self.finish_reason = end, finish_reason
        return ""

    def _hold(self, index: int, token_ids: tuple[int, ...], logprobs: tuple[Logprobs, ...]) -> str:
        num_pending = sum(len(tokens) for _, tokens, _ in self._pending)
        if num_pending + len(token_ids) > self._max_pending_tokens:
            return f"more than {self._max_pending_tokens} tokens ahead of index {len(self.token_ids)}"
        self._pending.append((index, token_ids, logprobs))
        return ""

    def _commit(
        self, index: int, token_ids: tuple[int, ...], logprobs: tuple[Logprobs, ...], fresh: list[Logprobs]
    ) -> str:
        """The log probabilities of what is new are added to `fresh`; the log has no further use for them."""
        num_known = min(len(self.token_ids) - index, len(token_ids))
        for offset in range(num_known):
            if self.token_ids[index + offset] != token_ids[offset]:
                return (
                    f"token {token_ids[offset]} at index {index + offset},"
                    f" where {self.token_ids[index + offset]} is committed"
                )
        self.token_ids.extend(token_ids[num_known:])
        fresh.extend(logprobs[num_known:])
        return ""

    def _drain(self, fresh: list[Logprobs]) -> str:
        self._pending.sort(key=lambda report: report[:2])
        while self._pending and self._pending[0][0] <= len(self.token_ids):
            conflict = self._commit(*self._pending.pop(0), fresh)
            if conflict:
                return conflict
        return ""
