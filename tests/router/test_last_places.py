from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.last_places import LastPlaces

PROMPTS = st.lists(st.integers(0, 1), max_size=5).map(
    lambda blocks: tuple(bytes(blocks[: end + 1]) for end in range(len(blocks)))
)


@given(st.lists(st.tuples(PROMPTS, st.sampled_from("abc")), max_size=12), PROMPTS)
def test_it_finds_the_longest_prompt_that_is_continued(
    placed: list[tuple[tuple[bytes, ...], str]], links: tuple[bytes, ...]
) -> None:
    places, known = LastPlaces(), dict[bytes, str]()
    for prompt, worker_id in placed:
        places.note(prompt, worker_id)
        if prompt:
            known[prompt[-1]] = worker_id
    assert places.find(links) == next((known[link] for link in links[::-1] if link in known), None)


def test_the_oldest_are_forgotten() -> None:
    places = LastPlaces(max_prompts=2)
    for name in (b"a", b"b", b"a", b"c"):
        places.note((name,), name.decode())
    assert [places.find((name,)) for name in (b"a", b"b", b"c")] == ["a", None, "c"]
