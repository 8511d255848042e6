"""Streamed text is the whole decode, cut: for the tokenizers of every served family, whatever the tokens."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.detokenizer import MAX_WINDOW
from router.text_stream import TextStream
from tests.router.tokenizers_for_tests import BYTES, KINDS, NUM_UNKNOWN, token_text

TOKENIZERS = {kind: make() for kind, make in KINDS.items()}
TEXTS = {kind: token_text(tokenizer) for kind, tokenizer in TOKENIZERS.items()}
BYTE_FALLBACK = ["llama2-mistral-phi3", "gemma"]


def ids(kind: str, *tokens: str) -> list[int]:
    vocab = TOKENIZERS[kind].get_vocab()
    return [vocab[token] for token in tokens]


def utf8(text: str) -> list[str]:
    """The byte tokens of a text."""
    return [BYTES[byte] for byte in text.encode()]


def stream(
    kind: str, token_ids: list[int], cuts: list[int], stop: tuple[str, ...] = ()
) -> tuple[list[str], TextStream]:
    text = TextStream(TEXTS[kind], stop)
    borders = [0, *sorted({cut % (len(token_ids) + 1) for cut in cuts}), len(token_ids)]
    pieces = []
    for start, end in pairwise(borders):
        if text.matched_stop is None:
            pieces.append(text.push(token_ids[start:end]))
    return pieces if text.matched_stop is not None else [*pieces, text.flush()], text


@st.composite
def runs_of_tokens(draw: st.DrawFn, tokenizer: Any) -> list[int]:
    """Random ids, mixed with runs of a special token, long enough to fill a window, and with whole characters."""
    any_id = st.integers(0, len(tokenizer) + NUM_UNKNOWN - 1)
    vocab = tokenizer.get_vocab()
    special = st.sampled_from(tokenizer.all_special_ids).flatmap(
        lambda token_id: st.integers(1, 2 * MAX_WINDOW).map(lambda count: [token_id] * count)
    )
    whole = st.text(max_size=6).map(
        lambda text: [vocab[byte] for byte in utf8(text)] if BYTES[0] in vocab else tokenizer.encode(text)
    )
    parts = draw(st.lists(st.one_of(st.lists(any_id, max_size=20), special, whole), max_size=12))
    return [token_id for part in parts for token_id in part]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150)
@given(data=st.data(), cuts=st.lists(st.integers(0, 300), max_size=60))
def test_any_tokens_in_any_split_give_the_whole_decode(kind: str, data: st.DataObject, cuts: list[int]) -> None:
    token_ids = data.draw(runs_of_tokens(TOKENIZERS[kind]))
    expected = TOKENIZERS[kind].decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(stream(kind, token_ids, cuts)[0]) == expected
    assert "".join(stream(kind, token_ids, list(range(len(token_ids))))[0]) == expected


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(data=st.data(), cuts=st.lists(st.integers(0, 300), max_size=30))
def test_a_stop_string_ends_the_text_where_the_whole_decode_first_has_it(
    kind: str, data: st.DataObject, cuts: list[int]
) -> None:
    token_ids = data.draw(runs_of_tokens(TOKENIZERS[kind]))
    whole = TEXTS[kind].decode(token_ids)
    start = data.draw(st.integers(0, max(0, len(whole) - 1)))
    stop = whole[start : start + data.draw(st.integers(1, 5))]
    if not stop or "\ufffd" in stop:
        return
    pieces, text = stream(kind, token_ids, cuts, (stop,))
    assert text.matched_stop == stop
    seen = TEXTS[kind].decode(token_ids[: text.num_tokens])
    assert "".join(pieces) == seen[: seen.index(stop)]
    assert stop not in TEXTS[kind].decode(token_ids[: text.num_tokens - 1]), "it was there a token before"


@pytest.mark.parametrize("kind", BYTE_FALLBACK)
def test_a_run_of_bytes_waits_for_its_end(kind: str) -> None:
    """One wrong byte turns the whole run into U+FFFD, the characters before it too."""
    good, bad = ids(kind, "▁cat", *utf8("é北"), "s"), ids(kind, "▁cat", *utf8("é"), "<0xFF>", "s")
    space = " " if kind == "gemma" else ""
    assert [piece for piece in stream(kind, good, list(range(20)))[0] if piece] == [f"{space}cat", "é北s"]
    assert "".join(stream(kind, bad, list(range(20)))[0]) == f"{space}cat\ufffd\ufffd\ufffds"


@pytest.mark.parametrize("kind", BYTE_FALLBACK)
def test_a_special_token_does_not_end_a_run_of_bytes(kind: str) -> None:
    first, *others = utf8("北")
    assert "".join(stream(kind, ids(kind, first, "<|user|>", *others, "</s>"), [1, 2, 3])[0]) == "北"


@pytest.mark.parametrize("kind", BYTE_FALLBACK)
def test_a_stop_string_of_a_byte_token_needs_no_token_after_it(kind: str) -> None:
    """Llama 2 has its newline as a byte."""
    pieces, text = stream(kind, ids(kind, "s", "<0x0A>", "▁cat"), [1, 2], ("\n",))
    assert ("".join(pieces), text.matched_stop, text.num_tokens) == ("s", "\n", 2)


def test_leading_spaces() -> None:
    tokens = ("▁the", "▁cat", "▁", "▁the")
    kinds = ["metaspace", *BYTE_FALLBACK]
    assert {kind: "".join(stream(kind, ids(kind, *tokens), [1, 2, 3])[0]) for kind in kinds} == {
        "metaspace": "the cat  the",
        "llama2-mistral-phi3": "the cat  the",
        "gemma": " the cat  the",
    }


@pytest.mark.parametrize("kind", ["bytes", "llama3-qwen"])
def test_a_character_in_pieces_comes_whole_across_special_tokens_that_fill_the_window(kind: str) -> None:
    eos = TOKENIZERS[kind].eos_token_id
    *begun, last = TOKENIZERS[kind].encode("a😀")
    token_ids = [*begun, *[eos] * 2 * MAX_WINDOW, last]
    assert "".join(stream(kind, token_ids, list(range(len(token_ids))))[0]) == "a😀"
