from __future__ import annotations

from dataclasses import replace

import pytest

from protos.types import FinishReason
from router.config import RouterConfig
from router.events import WorkerUp
from router.router import Router
from tests.router.values import BLOCK, CONFIG, arrived, make_router, output, peer, reported, sends, stats

PEAK_ROOM = replace(CONFIG, decode_policy="peak_room")
PROMPT = list(range(8))


def router_with_a_long_answer(config: RouterConfig) -> Router:
    """On d-0, which is the largest and has the most room now; d-1 to d-4 have less and less, and no requests."""
    router = make_router("p-0", "d-0", config=config)
    router.on(arrived("long", PROMPT, max_tokens=300), 0.0)
    router.on(reported("d-0", stats=stats(num_blocks=110, num_free_blocks=110)), 0.0)
    for index in range(1, 5):
        router.on(WorkerUp(peer(f"d-{index}")), 0.0)
        router.on(reported(f"d-{index}", stats=stats(num_free_blocks=90 - index)), 0.0)
    return router


def decode_worker(router: Router, request_id: str, max_tokens: int = 40) -> str:
    found = sends(router.on(arrived(request_id, PROMPT, max_tokens), 0.0))
    (worker_id,) = found.keys() - {"p-0"}
    return worker_id


def finish(router: Router, request_id: str, worker_id: str, num_tokens: int) -> None:
    """The caller goes on reading; the answer stops by itself."""
    router.on(reported(worker_id, output(request_id, 0, *range(num_tokens), finish=FinishReason.STOP)), 0.0)
    assert not router.find("", f"client-{request_id}")


def test_room_now_or_room_at_the_peak() -> None:
    assert decode_worker(router_with_a_long_answer(CONFIG), "next") == "d-0"
    router = router_with_a_long_answer(PEAK_ROOM)
    assert decode_worker(router, "next") == "d-1"
    attempt = router._in_flight["next"].attempt
    assert attempt is not None
    # Nothing has ended yet: it is expected to go to its limit.
    num_blocks = -(-(len(PROMPT) + 40) // BLOCK)
    expected = f"most room at its peak: {num_blocks} of 100 blocks, 0 requests there"
    assert attempt.plan.decode_reason == expected


def test_answers_that_end_early_make_room() -> None:
    """The long answer has none of its tokens yet: now it is expected to be as short as the others."""
    router = router_with_a_long_answer(PEAK_ROOM)
    for index in range(3):
        worker_id = decode_worker(router, f"short-{index}")
        assert worker_id == ("d-1" if index == 0 else "d-0")
        finish(router, f"short-{index}", worker_id, 2)
    assert router.planner.decode._outputs.remaining(0, 300) == 2
    view = router.view.workers["d-0"]
    assert [one.num_tokens for one in view.decoding.values()] == [len(PROMPT)]
    router.on(reported("d-0", output("long", 0, *range(60))), 0.0)
    assert [one.num_tokens for one in view.decoding.values()] == [len(PROMPT) + 60], "its figures are those of now"


def test_an_aborted_answer_says_nothing_about_lengths() -> None:
    router = make_router("p-0", "d-0", config=PEAK_ROOM)
    decode_worker(router, "r")
    router.on(reported("d-0", output("r", 0, 1, 2, 3)), 0.0)
    router._ended_by_router("r", FinishReason.ABORT, 0.0)
    assert router.planner.decode._outputs.remaining(0, 300) == 300


@pytest.mark.parametrize(("num_candidates", "chosen"), [(1, "d-0"), (2, "d-1")])
def test_only_the_roomiest_are_candidates(num_candidates: int, chosen: str) -> None:
    config = replace(PEAK_ROOM, num_decode_candidates=num_candidates)
    assert decode_worker(router_with_a_long_answer(config), "next") == chosen


def test_linked_workers_come_first() -> None:
    for config in (CONFIG, PEAK_ROOM):
        router = router_with_a_long_answer(config)
        router.on(reported("p-0", stats=stats(warm_links=("d-4",))), 0.0)
        assert decode_worker(router, "next") == "d-4"
        router.on(reported("p-0", stats=stats(warm_links=("d-4", "d-3"))), 0.0)
        assert decode_worker(router, "after") == "d-3"


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="decode_policy must be one of most_free_blocks, peak_room, got 'best'"):
        RouterConfig(decode_policy="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_decode_candidates must be at least 1, got 0"):
        RouterConfig(num_decode_candidates=0)
