from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.stop_strings import StopStrings


def run(stop: tuple[str, ...], pieces: list[str]) -> tuple[str, str | None]:
    stops, text = StopStrings(stop), ""
    for piece in pieces:
        out, matched = stops.push(piece)
        text += out
        if matched is not None:
            return text, matched
    return text + stops.flush(), None


def test_a_match_across_pieces_is_found_and_cut() -> None:
    assert run(("END",), ["some E", "N", "D more"]) == ("some ", "END")


def test_a_beginning_is_held_back_and_given_out_when_it_fails() -> None:
    stops = StopStrings(("END",))
    assert stops.push("a EN") == ("a ", None)
    assert stops.push("X") == ("ENX", None)
    assert stops.push("E") == ("", None)
    assert stops.flush() == "E"


def test_the_one_that_ends_first_wins_then_the_longest() -> None:
    assert run(("abcd", "bc"), ["abcd"]) == ("a", "bc")
    assert run(("bc", "abc"), ["xabc"]) == ("x", "abc")


texts = st.text(alphabet="ab", max_size=30)
stop_strings = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=4).map(tuple)


@given(stop_strings, texts, st.data())
def test_pieces_do_not_matter_and_nothing_given_out_contains_a_stop(
    stop: tuple[str, ...], text: str, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = run(stop, list(text))
    assert run(stop, pieces) == whole
    given_out, matched = whole
    assert not any(s in given_out for s in stop)
    if matched is None:
        assert given_out == text
    else:
        assert text.startswith(given_out + matched)
