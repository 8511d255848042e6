from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.events import WorkerDown
from router.last_places import LastPlaces
from tests.router.values import CONFIG, arrived, make_router

PROMPTS = st.lists(st.integers(0, 1), max_size=5).map(
    lambda blocks: tuple(bytes(blocks[: end + 1]) for end in range(len(blocks)))
)


@given(st.lists(st.tuples(PROMPTS, st.sampled_from("abc")), max_size=12), PROMPTS)
def test_it_finds_the_longest_prompt_that_is_continued(
    placed: list[tuple[tuple[bytes, ...], str]], links: tuple[bytes, ...]
) -> None:
    places, known = LastPlaces[str](), dict[bytes, str]()
    for prompt, worker_id in placed:
        places.note(prompt, worker_id)
        if prompt:
            known[prompt[-1]] = worker_id
    assert places.find(links) == next((known[link] for link in links[::-1] if link in known), None)


def test_the_oldest_are_forgotten() -> None:
    places = LastPlaces[str](max_prompts=2)
    for name in (b"a", b"b", b"a", b"c"):
        places.note((name,), name.decode())
    assert [places.find((name,)) for name in (b"a", b"b", b"c")] == ["a", None, "c"]


@pytest.mark.parametrize("dispatch_tokens", [0, 1])
def test_the_router_remembers_where_it_placed_a_prompt(dispatch_tokens: int) -> None:
    """Sent or queued."""
    router = make_router("p-0", "p-1", "d-0", config=replace(CONFIG, dispatch_tokens=dispatch_tokens))
    for index in range(4):
        router.on(arrived(f"first {index}", [index] * 8), 0.0)
    placed = {}
    for index in range(4):
        in_flight = router._in_flight[f"first {index}"]
        plan = in_flight.queued or (in_flight.attempt and in_flight.attempt.plan)
        assert plan
        placed[index] = plan.prefill.worker_id
    assert set(placed.values()) == {"p-0", "p-1"}
    assert any(one.queued for one in router._in_flight.values()) == bool(dispatch_tokens)
    for index, worker_id in placed.items():
        assert router.view.last_place(arrived("next", [*[index] * 8, 1, 2, 3, 4]).links) == worker_id


def test_workers_that_are_gone_or_only_decode_are_no_last_place() -> None:
    router = make_router("p-0", "p-1", "d-0")
    links = arrived("first", [1] * 8).links
    router.view.note_placed(router.view.workers["d-0"], links)
    assert router.view.last_place(links) is None
    router.view.note_placed(router.view.workers["p-1"], links)
    assert router.view.last_place(links) == "p-1"
    router.on(WorkerDown("p-1", "1", "test"), 0.0)
    assert router.view.last_place(links) is None
