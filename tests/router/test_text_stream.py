from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.detokenizer import MAX_WINDOW, Detokenizer
from router.text_stream import TextStream
from tests.router.tokenizers_for_tests import EOS_TOKEN_ID, byte_level, token_text

BYTE_LEVEL = byte_level()
TOKEN_TEXT = token_text(BYTE_LEVEL)


def ids(text: str) -> list[int]:
    return list(BYTE_LEVEL.encode(text))


def pieces(token_ids: list[int], step: int) -> list[str]:
    detokenizer = Detokenizer(TOKEN_TEXT)
    found = [detokenizer.push(token_ids[start : start + step]) for start in range(0, len(token_ids), step)]
    return [*found, detokenizer.flush()]


def test_a_character_of_several_tokens_comes_whole() -> None:
    found = pieces(ids("a€😀b"), 1)
    assert "\ufffd" not in "".join(found)
    assert [piece for piece in found if piece] == ["a", "€", "😀", "b"]


def test_an_unfinished_character_is_shown_at_the_end() -> None:
    token_ids = ids("a€")[:-1]
    assert "".join(pieces(token_ids, 1)) == TOKEN_TEXT.decode(token_ids)


@settings(max_examples=60)
@given(st.text(max_size=80), st.integers(1, 7))
def test_pieces_concatenate_to_the_text(text: str, step: int) -> None:
    assert "".join(pieces(ids(text), step)) == text


def test_the_window_stays_small_whatever_comes() -> None:
    lengths: list[int] = []

    def decode(token_ids: list[int]) -> str:
        lengths.append(len(token_ids))
        return TOKEN_TEXT.decode(token_ids)

    detokenizer = Detokenizer(replace(TOKEN_TEXT, decode=decode))
    continuation_byte = ids("é")[1]
    for token_id in [continuation_byte] * 300 + ids("x" * 300):
        detokenizer.push([token_id])
    assert max(lengths) <= MAX_WINDOW + 1


def test_a_stop_string_across_tokens_ends_the_text_and_names_its_token() -> None:
    text = TextStream(TOKEN_TEXT, ("END",))
    assert text.push(ids("some E")) == "some "
    assert text.push(ids("ND more")) == ""
    assert text.matched_stop == "END"
    assert text.num_tokens == len("some END")


def test_what_is_held_back_comes_at_the_end() -> None:
    text = TextStream(TOKEN_TEXT, ("END",))
    assert text.push(ids("the E")) == "the "
    assert text.push([EOS_TOKEN_ID]) == ""
    assert text.flush() == "E"
    assert text.matched_stop is None


@pytest.mark.parametrize("step", [1, 3, 100])
def test_without_stop_strings_nothing_but_unfinished_characters_is_held(step: int) -> None:
    text = TextStream(TOKEN_TEXT, ())
    token_ids = ids("plain words")
    found = [text.push(token_ids[start : start + step]) for start in range(0, len(token_ids), step)]
    assert "".join(found) == "plain words"
    assert text.num_tokens == len(token_ids)


def test_no_stop_string_ends_the_first_min_tokens() -> None:
    text = TextStream(TOKEN_TEXT, ("b", "dd!"), min_tokens=3)
    assert text.push(ids("abcdd")) == "abc"  # "dd" may be the beginning of "dd!"
    assert text.matched_stop is None
    assert text.push(ids("efb")) == "ddef"
    assert (text.matched_stop, text.num_tokens) == ("b", 8)


def test_what_was_held_when_the_text_might_not_end_is_no_stop_string_later() -> None:
    text = TextStream(TOKEN_TEXT, ("END", "ENDING!"), min_tokens=3)
    assert text.push(ids("ENDI")) == ""
    assert text.push(ids("s END")) == "ENDIs "
    assert text.matched_stop == "END"


def test_a_stop_string_begun_before_min_tokens_may_end_behind() -> None:
    text = TextStream(TOKEN_TEXT, ("END",), min_tokens=2)
    assert text.push(ids("END")) == ""
    assert text.matched_stop == "END"


def test_include_stop_keeps_the_stop_string_and_the_stop_token() -> None:
    text = TextStream(TOKEN_TEXT, ("END",), include_stop=True)
    assert text.push(ids("some END more")) == "some END"
    kept, cut = TextStream(TOKEN_TEXT, (), include_stop=True), TextStream(TOKEN_TEXT, ())
    (stop_token,) = ids("x")
    assert kept.push(ids("a")) + kept.push_stop_token(stop_token) + kept.flush() == "ax"
    assert cut.push(ids("a")) + cut.push_stop_token(stop_token) + cut.flush() == "a"
    assert kept.num_tokens == cut.num_tokens == 2
