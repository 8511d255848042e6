"""The text of one request, from its token ids: characters made whole, ended by its stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from router.detokenizer import Detokenizer
from router.stop_strings import StopStrings


class TextStream:
    """Invariant: the texts given out concatenate to the text of the first `num_tokens` tokens up to the stop string."""

    def __init__(self, decode: Callable[[list[int]], str], stop: tuple[str, ...]) -> None:
        self._detokenizer = Detokenizer(decode)
        self._stop = StopStrings(stop)
        self._has_stop = bool(stop)
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
            piece, self.matched_stop = self._stop.push(self._detokenizer.push([token_id]))
            text += piece
            if self.matched_stop is not None:
                break
        return text

    def flush(self) -> str:
        """What was held back; a stop string may still complete in it."""
        piece, self.matched_stop = self._stop.push(self._detokenizer.flush())
        return piece if self.matched_stop is not None else piece + self._stop.flush()
