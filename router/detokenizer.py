"""Token ids to text, piece by piece. Decides when a character is whole; knows no tokenizer but a decode function."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"  # what decoders put for bytes that are no whole character
MAX_HELD = 3  # characters: an unfinished UTF-8 character has at most 3 bytes, each shown as one replacement at worst
MAX_WINDOW = 32  # tokens decoded again for every piece
MIN_WINDOW = 8  # tokens kept as context when the window moves on


class Detokenizer:
    """Invariant: the pieces so far and flush() concatenate to the decoded text of all tokens so far.

    Only a window of recent tokens is decoded again. Its first tokens are context: decoders treat the start of a text
    specially (a leading space goes), so a piece is what the window's text has grown by, never a token's own text."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._num_out = 0  # characters of the window's text that have been given out

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete; what may still change is held back."""
        self._window.extend(token_ids)
        text = self._decode(self._window)
        num_held = _num_held(text)
        piece = text[self._num_out : len(text) - num_held]
        self._num_out += len(piece)
        if len(self._window) > MAX_WINDOW:
            self._shrink(num_held)
        return piece

    def flush(self) -> str:
        """The rest, when no token follows."""
        piece = self._decode(self._window)[self._num_out :]
        self._num_out += len(piece)
        return piece

    def _shrink(self, num_held: int) -> None:
        tail = self._window[-MIN_WINDOW:]
        num_chars = len(self._decode(tail))
        # A tail that shows (nearly) nothing, special tokens for example, is no context: wait for a better one.
        if num_chars > num_held:
            self._window = tail
            self._num_out = num_chars - num_held


def _num_held(text: str) -> int:
    run = len(text) - len(text.rstrip(REPLACEMENT))
    return min(run, MAX_HELD)
