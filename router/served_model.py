"""What the front door must know of the model behind it. Plain values and a tokenizer handed in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from protos.block_hash import chain_root


class Tokenizer(Protocol):
    """As transformers has it."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> Any: ...


@dataclass(frozen=True, slots=True)
class ServedModel:
    name: str
    architecture: str
    dtype: str
    tokenizer: Tokenizer
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    model_fingerprint: str
    block_size: int  # tokens
    hash_block_size: int  # tokens
    hash_key: bytes

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def decode(self, token_ids: list[int]) -> str:
        """Without special tokens; no clean-up, because that changes text that was given out before."""
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def root(self, cache_salt: bytes) -> bytes:
        return chain_root(self.hash_key, self.model_fingerprint, cache_salt)
