"""What the front door must know of the model behind it. Plain values and a tokenizer handed in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from protos.block_hash import chain_root


class Tokenizer(Protocol):
    """As transformers has it."""

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]: ...

    def get_vocab(self) -> dict[str, int]: ...

    chat_template: Any  # None: the model has none

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> Any: ...

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

    def encode_rendered(self, text: str) -> list[int]:
        """The template has put the special tokens in."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    @property
    def has_chat_template(self) -> bool:
        return bool(self.tokenizer.chat_template)

    def render_chat(self, messages: list[dict[str, str]]) -> str:
        text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text

    def decode(self, token_ids: list[int]) -> str:
        """Without special tokens; no clean-up, because that changes text that was given out before."""
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def root(self, cache_salt: bytes) -> bytes:
        return chain_root(self.hash_key, self.model_fingerprint, cache_salt)
