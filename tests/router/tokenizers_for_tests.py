"""Tokenizers built in memory, of the kinds that the served families bring."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from router.detokenizer import TokenText
from router.served_model import ServedModel

EOS_TOKEN_ID = 256
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# Spaces by themselves and doubled, pieces that begin a word and that do not, and letters of several bytes.
PIECES = ["▁", "▁▁", "▁the", "▁cat", "s", "un", ".", "é", "▁über", "北", "\n", "E", "ND"]


def byte_level() -> Any:
    """Token ids 0..255 are bytes (in the order of the byte-level alphabet), 256 is </s>."""
    return _byte_level(merges=[])


def byte_level_merged() -> Any:
    """As Llama 3 and Qwen: tokens of several bytes, which may begin or end in the middle of a character, and an added
    token that is no special one."""
    shown = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters = [shown.pre_tokenize_str(text)[0][0] for text in (" t", " the", "北", "é", "😀")]
    words = [(letters[0][0], letters[0][1]), *((letter[0], letter[1]) for letter in letters[2:])]
    merges = [*words, (letters[4][2], letters[4][3])]
    wrapped = _byte_level(merges)
    wrapped.add_tokens([AddedToken("<tool> ü", special=False)])
    return wrapped


def _byte_level(merges: list[tuple[str, str]]) -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: index for index, char in enumerate(alphabet)}
    vocab["</s>"] = EOS_TOKEN_ID
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    assert wrapped.convert_tokens_to_ids("</s>") == EOS_TOKEN_ID
    return wrapped


def metaspace() -> Any:
    """As legacy sentencepiece conversions: the decoder drops the spaces of the first token."""
    tokenizer = Tokenizer(models.WordLevel(vocab=_ids(PIECES), unk_token="."))
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def byte_fallback(strip: bool) -> Any:
    """As Llama 2, Mistral and Phi-3 (one leading space goes), or as Gemma (it stays)."""
    tokenizer = Tokenizer(models.BPE(vocab=_ids([*BYTES, *PIECES]), merges=[], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    wrapped.add_tokens([AddedToken("<|user|>", special=True), AddedToken("<|end|>", special=False)])
    return wrapped


KINDS: dict[str, Callable[[], Any]] = {
    "bytes": byte_level,
    "llama3-qwen": byte_level_merged,
    "metaspace": metaspace,
    "llama2-mistral-phi3": partial(byte_fallback, True),
    "gemma": partial(byte_fallback, False),
}
NUM_UNKNOWN = 3  # rows of a padded vocabulary that have no token


def token_text(tokenizer: Any) -> TokenText:
    """As the server makes it, for a model whose vocabulary is padded."""
    return TokenText.of(
        ServedModel(
            name="test",
            architecture="",
            dtype="float32",
            tokenizer=tokenizer,
            vocab_size=len(tokenizer) + NUM_UNKNOWN,
            max_model_len=1000,
            eos_token_ids=(),
            model_fingerprint="",
            block_size=4,
            hash_block_size=4,
            hash_key=b"",
        )
    )


def _ids(tokens: list[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}
