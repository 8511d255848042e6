"""The text of one request, from its token ids: characters made whole, ended by its stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from router.detokenizer import REPLACEMENT, Detokenizer, TokenText
from router.stop_strings import StopStrings


class TextStream:
    """Invariant: the texts given out concatenate to the text of the first `num_tokens` tokens up to the stop string or
    stop token, and with it where `include_stop` says so. No stop string ends the first `min_tokens` tokens."""

    def __init__(
        self, tokens: TokenText, stop: tuple[str, ...], min_tokens: int = 0, include_stop: bool = False
    ) -> None:
        self._detokenizer = Detokenizer(tokens)
        self._stop = StopStrings(stop)
        self._has_stop = bool(stop)
        self._min_tokens = min_tokens
        self._include_stop = include_stop
        self.num_tokens = 0  # taken so far; the one that completed a stop string is the last
        self.matched_stop: str | None = None

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes token_ids up to the one that completes a stop string."""
        if not self._has_stop:
            self.num_tokens += len(token_ids)
            return self._detokenizer.push(token_ids)
        text = ""
        for token_id in token_ids:  # one by one, because the match must name its token
            self.num_tokens += 1
            text += self._push_one(token_id)
            if self.matched_stop is not None:
                break
        return text

    def push_stop_token(self, token_id: int) -> str:
        """Takes the token that ends the output."""
        if self._include_stop:
            return self.push([token_id])
        self.num_tokens += 1
        return ""

    def flush(self) -> str:
        """What was held back; a stop string may still complete in it."""
        text = self._give(self._detokenizer.flush())
        return text if self.matched_stop is not None else text + self._stop.flush()

    @property
    def _may_end(self) -> bool:
        return self.num_tokens > self._min_tokens

    def _give(self, piece: str) -> str:
        text, self.matched_stop = self._stop.push(piece, self._may_end)
        return text + self.matched_stop if self._include_stop and self.matched_stop is not None else text

    def _push_one(self, token_id: int) -> str:
        """A stop string counts as soon as the text would hold it if it ended here: a newline may be a byte token, which
        is held back because of what may follow, and after a stop string nothing does."""
        text = self._give(self._detokenizer.push([token_id]))
        if self.matched_stop is None and self._may_end:
            pending = self._detokenizer.pending()
            if REPLACEMENT not in pending and self._stop.would_match(pending):
                text += self._give(self._detokenizer.flush())
        return text
