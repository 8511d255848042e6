"""Two tokenizers built in memory: byte-level, and one that drops the leading space as sentencepiece models do."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

EOS_TOKEN_ID = 256


def byte_level() -> Any:
    """Token ids 0..255 are bytes (in the order of the byte-level alphabet), 256 is </s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: index for index, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    assert wrapped.convert_tokens_to_ids("</s>") == EOS_TOKEN_ID
    return wrapped


def metaspace() -> Any:
    vocab = {piece: index for index, piece in enumerate(["▁", "▁the", "▁cat", "s", "▁sat", "un", "▁▁", ".", "é"])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token="."))
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
