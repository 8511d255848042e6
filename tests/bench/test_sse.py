"""The event parser: what it gives does not depend on where the bytes are cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.load.sse import EventParser

EVENT_TEXTS = st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"])), min_size=1)
LINE_ENDS = st.sampled_from([b"\n", b"\r\n", b"\r"])


def events_of(pieces: list[bytes]) -> list[str]:
    parser = EventParser()
    return [event for piece in pieces for event in parser.feed(piece)] + parser.close()


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


@given(EVENT_TEXTS, LINE_ENDS, st.lists(st.integers(0, 10**6)), st.booleans(), st.booleans())
def test_events_survive_any_cut(
    texts: list[str], line_end: bytes, places: list[int], has_mark: bool, is_ended: bool
) -> None:
    lines = [b": a comment" + line_end + b"data: " + text.encode() + line_end for text in texts]
    data = (b"\xef\xbb\xbf" if has_mark else b"") + line_end.join(lines) + (line_end if is_ended else b"")
    assert events_of(cut(data, places)) == texts


@pytest.mark.parametrize(
    ("data", "events"),
    [
        (b"data: a\n\n", ["a"]),
        (b"data:a\n\n", ["a"]),
        (b"data:  a\n\n", [" a"]),
        (b"data: a\ndata: b\n\n", ["a\nb"]),
        (b"event: x\nid: 1\nretry: 2\ndata: a\n\n", ["a"]),
        (b"event: x\n\n", []),
        (b"\n\n\n", []),
        (b"database: a\n\n", []),
        (b"data\n\n", [""]),
        (b"data: a", ["a"]),
        (b"data: a\r", ["a"]),
        (b"", []),
    ],
)
def test_fields(data: bytes, events: list[str]) -> None:
    assert events_of([data]) == events
    assert events_of([bytes([byte]) for byte in data]) == events


def test_an_event_is_given_as_soon_as_it_ends() -> None:
    parser = EventParser()
    assert parser.feed(b"data: a\n\ndata: b\n") == ["a"]
    assert parser.feed(b"\n") == ["b"]


def test_bytes_that_are_no_text() -> None:
    with pytest.raises(UnicodeDecodeError):
        EventParser().feed(b"data: \xff\n\n")
