"""Where generated text ends by a stop string, whichever way it is cut into pieces. Knows text only."""

from __future__ import annotations


class StopStrings:
    """Invariant: what has been given out contains no stop string and no beginning of one that may still complete.

    The stop string that ends first wins; of those that end together, the longest."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._max_held = max(map(len, stop), default=1) - 1
        self._held = ""

    def push(self, piece: str, may_end: bool = True) -> tuple[str, str | None]:
        """Text to give out, and the stop string found behind it. After a match nothing more may be pushed. Where the
        text may not end yet, stop strings that end in this piece are text like any other."""
        text = self._held + piece
        if may_end and (found := self._found(text)):
            _, start, stop = min(found)
            self._held = ""
            return text[:start], stop
        num_out = len(text) - self._num_held(text)
        self._held = text[num_out:]
        return text[:num_out], None

    def would_match(self, piece: str) -> bool:
        """Whether push(piece) would find a stop string."""
        return bool(self._found(self._held + piece))

    def flush(self) -> str:
        """The rest, when no text follows."""
        text, self._held = self._held, ""
        return text

    def _found(self, text: str) -> list[tuple[int, int, str]]:
        """End, start and string of every stop string that ends behind what was held: one that ended in there came when
        the text might not end."""
        num_old = len(self._held)
        starts = ((stop, text.find(stop, max(0, num_old + 1 - len(stop)))) for stop in self._stop)
        return [(start + len(stop), start, stop) for stop, start in starts if start >= 0]

    def _num_held(self, text: str) -> int:
        for length in range(min(self._max_held, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
