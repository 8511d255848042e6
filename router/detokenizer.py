"""Token ids to text, piece by piece. Decides how much of the text is final; knows a tokenizer as TokenText only."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from router.served_model import ServedModel

REPLACEMENT = "\ufffd"  # what decoders put for bytes that are no whole character
MAX_WINDOW = 32  # tokens decoded again for every piece
MIN_WINDOW = 8  # tokens kept as context when the window moves on
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # as sentencepiece names the bytes of what it has no token for


@dataclass(frozen=True, slots=True)
class TokenText:
    """A tokenizer, as far as turning tokens into text goes."""

    decode: Callable[[list[int]], str]
    skipped: frozenset[int]  # ids that decode leaves out: special tokens, and ids that the tokenizer has no token for
    byte_ids: frozenset[int]  # byte tokens: a run of them is decoded as one, and as nothing but U+FFFD if one is wrong

    @classmethod
    def of(cls, served: ServedModel) -> TokenText:
        vocab = served.tokenizer.get_vocab()
        special = {token_id for token_id, token in served.tokenizer.added_tokens_decoder.items() if token.special}
        unknown = set(range(served.vocab_size)).difference(vocab.values())
        byte_ids = {token_id for token, token_id in vocab.items() if BYTE_TOKEN.fullmatch(token)}
        return cls(served.decode, frozenset(special | unknown), frozenset(byte_ids - special))


class Detokenizer:
    """Invariant: the pieces so far and flush() concatenate to the decoded text of all tokens so far.

    Only a window of recent tokens is decoded again. Its first tokens are context: decoders treat the start of a text
    specially (a leading space goes), so a piece is what the window's text has grown by, never a token's own text.
    Skipped tokens never enter it: a window of them would be no context."""

    def __init__(self, tokens: TokenText) -> None:
        self._tokens = tokens
        self._window: list[int] = []
        self._run: list[int] = []  # byte tokens behind the window: the next one may change the text of all of them
        self._num_out = 0  # characters of the window's text that have been given out

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete; what may still change is held back."""
        for token_id in token_ids:
            self._take(token_id)
        text = self._tokens.decode(self._window)
        piece = text[self._num_out : _num_final(text)]
        self._num_out += len(piece)
        if len(self._window) > MAX_WINDOW:
            self._shrink()
        return piece

    def pending(self) -> str:
        """What is held back, as it reads if no token follows."""
        return self._tokens.decode(self._window + self._run)[self._num_out :]

    def flush(self) -> str:
        """The rest, when no token follows."""
        piece = self.pending()
        self._window, self._run = self._window + self._run, []
        self._num_out += len(piece)
        return piece

    def _take(self, token_id: int) -> None:
        if token_id in self._tokens.skipped:
            return
        self._run.append(token_id)
        if token_id not in self._tokens.byte_ids:
            self._window += self._run
            self._run = []

    def _shrink(self) -> None:
        """Eight tokens are at least eight bytes: how a character begun at their end goes on does not depend on more."""
        self._window = self._window[-MIN_WINDOW:]
        self._num_out = _num_final(self._tokens.decode(self._window))


def _num_final(text: str) -> int:
    """An unfinished character at the end shows as one U+FFFD."""
    return len(text) - text.endswith(REPLACEMENT)
