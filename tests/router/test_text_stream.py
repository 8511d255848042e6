from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.detokenizer import MAX_WINDOW, Detokenizer
from router.text_stream import TextStream
from tests.router.tokenizers_for_tests import EOS_TOKEN_ID, byte_level, metaspace

BYTE_LEVEL, METASPACE = byte_level(), metaspace()


def decoder(tokenizer: Any) -> Any:
    return partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def ids(text: str) -> list[int]:
    return list(BYTE_LEVEL.encode(text))


def pieces(tokenizer: Any, token_ids: list[int], step: int) -> list[str]:
    detokenizer = Detokenizer(decoder(tokenizer))
    found = [detokenizer.push(token_ids[start : start + step]) for start in range(0, len(token_ids), step)]
    return [*found, detokenizer.flush()]


def test_a_character_of_several_tokens_comes_whole() -> None:
    found = pieces(BYTE_LEVEL, ids("a€😀b"), 1)
    assert "\ufffd" not in "".join(found)
    assert [piece for piece in found if piece] == ["a", "€", "😀", "b"]


def test_an_unfinished_character_is_shown_at_the_end() -> None:
    token_ids = ids("a€")[:-1]
    assert "".join(pieces(BYTE_LEVEL, token_ids, 1)) == decoder(BYTE_LEVEL)(token_ids)


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=80), st.integers(1, 7))
def test_pieces_concatenate_to_the_text(text: str, step: int) -> None:
    assert "".join(pieces(BYTE_LEVEL, ids(text), step)) == text


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 256), max_size=3 * MAX_WINDOW), st.integers(1, 7))
def test_pieces_of_any_bytes_concatenate_to_the_whole_decode(token_ids: list[int], step: int) -> None:
    assert "".join(pieces(BYTE_LEVEL, token_ids, step)) == decoder(BYTE_LEVEL)(token_ids)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, len(METASPACE) - 1), max_size=3 * MAX_WINDOW), st.integers(1, 7))
def test_leading_spaces_survive_the_moving_window(token_ids: list[int], step: int) -> None:
    assert "".join(pieces(METASPACE, token_ids, step)) == decoder(METASPACE)(token_ids)


def test_the_window_stays_small_whatever_comes() -> None:
    lengths: list[int] = []

    def decode(token_ids: list[int]) -> str:
        lengths.append(len(token_ids))
        return str(decoder(BYTE_LEVEL)(token_ids))

    detokenizer = Detokenizer(decode)
    continuation_byte = ids("é")[1]
    for token_id in [continuation_byte] * 300 + ids("x" * 300):
        detokenizer.push([token_id])
    assert max(lengths) <= MAX_WINDOW + 1


def test_a_stop_string_across_tokens_ends_the_text_and_names_its_token() -> None:
    text = TextStream(decoder(BYTE_LEVEL), ("END",))
    assert text.push(ids("some E")) == "some "
    assert text.push(ids("ND more")) == ""
    assert text.matched_stop == "END"
    assert text.num_tokens == len("some END")


def test_what_is_held_back_comes_at_the_end() -> None:
    text = TextStream(decoder(BYTE_LEVEL), ("END",))
    assert text.push(ids("the E")) == "the "
    assert text.push([EOS_TOKEN_ID]) == ""
    assert text.flush() == "E"
    assert text.matched_stop is None


@pytest.mark.parametrize("step", [1, 3, 100])
def test_without_stop_strings_nothing_but_unfinished_characters_is_held(step: int) -> None:
    text = TextStream(decoder(BYTE_LEVEL), ())
    token_ids = ids("plain words")
    found = [text.push(token_ids[start : start + step]) for start in range(0, len(token_ids), step)]
    assert "".join(found) == "plain words"
    assert text.num_tokens == len(token_ids)
