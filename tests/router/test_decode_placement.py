from __future__ import annotations

from dataclasses import replace

import pytest

from protos.types import FinishReason, HandoffRefused, ServingMode
from router.config import RouterConfig
from router.events import Deliver, WorkerDown, WorkerUp
from router.policies.held_room import HeldRoom
from router.policy import Candidate
from router.router import Router
from tests.router.values import BLOCK, CONFIG, arrived, make_router, output, peer, reported, sends, stats

PEAK_ROOM = replace(CONFIG, decode_policy="peak_room")
HELD_ROOM = replace(CONFIG, decode_policy="held_room", num_decode_candidates=1)
LOCAL = replace(HELD_ROOM, max_local_prefill_tokens=6)
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
    with pytest.raises(
        ValueError, match="decode_policy must be one of most_free_blocks, peak_room, held_room, got 'best'"
    ):
        RouterConfig(decode_policy="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_decode_candidates must be at least 1, got 0"):
        RouterConfig(num_decode_candidates=0)
    with pytest.raises(ValueError, match="max_local_prefill_tokens must not be negative, got -1"):
        RouterConfig(max_local_prefill_tokens=-1)


# --- what is held there -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_free_there", "chosen"), [(98, "d-1"), (97, "d-0"), (2, "d-0")])
def test_what_is_held_weighs_as_much_as_room(num_free_there: int, chosen: str) -> None:
    elsewhere = Candidate("d-0", num_blocks=100, num_free_blocks=99)
    holds = Candidate("d-1", num_cached_tokens=2 * BLOCK, num_blocks=100, num_free_blocks=num_free_there)
    choice = HeldRoom(BLOCK).choose(3 * BLOCK, [elsewhere, holds])
    assert choice.worker_id == chosen
    if chosen == "d-1":
        assert choice.reason == "most room and KV: 8 of 12 tokens held, 98 of 100 blocks free, 0 requests there"


def test_one_that_holds_all_and_has_no_room_comes_last() -> None:
    full = Candidate("d-0", num_cached_tokens=50 * BLOCK, num_blocks=100, num_free_blocks=2)
    roomy = Candidate("d-1", num_blocks=100, num_free_blocks=3)
    assert HeldRoom(BLOCK).choose(3 * BLOCK, [full, roomy]).worker_id == "d-1"


def router_with_a_first_turn(config: RouterConfig) -> Router:
    """Its 8 blocks are on d-0, which has less room than d-1 now."""
    router = make_router("p-0", "d-0", config=config)
    router.on(arrived("first", list(range(32)), max_tokens=40), 0.0)
    finish(router, "first", "d-0", 2)
    router.on(WorkerUp(peer("d-1")), 0.0)
    router.on(reported("d-0", stats=stats(num_free_blocks=95)), 0.0)
    router.on(reported("d-1", stats=stats()), 0.0)
    return router


def next_turn(router: Router, num_new_tokens: int = 9, max_tokens: int = 40) -> set[str]:
    prompt = [*range(32), *range(900, 900 + num_new_tokens)]
    return set(sends(router.on(arrived("next", prompt, max_tokens), 1.0)))


def test_the_next_turn_decodes_where_the_last_one_did() -> None:
    assert next_turn(router_with_a_first_turn(HELD_ROOM)) == {"p-0", "d-0"}, "although it is not among the roomiest"
    assert next_turn(router_with_a_first_turn(CONFIG)) == {"p-0", "d-1"}


def test_the_last_place_is_a_candidate_like_any_other() -> None:
    router = router_with_a_first_turn(HELD_ROOM)
    router.on(reported("p-0", stats=stats(warm_links=("d-1",))), 0.0)
    assert next_turn(router) == {"p-0", "d-1"}, "one without a link does not come before one that has it"
    router = router_with_a_first_turn(HELD_ROOM)
    router.on(WorkerDown("d-0", "1", "test"), 0.0)
    assert next_turn(router) == {"p-0", "d-1"}
    router = router_with_a_first_turn(replace(HELD_ROOM, max_requests_per_worker=1, num_decode_candidates=2))
    router.on(reported("d-1", stats=stats(num_free_blocks=90)), 0.0)
    router.on(arrived("other", [1, 2, 3]), 0.0)
    assert next_turn(router) == {"p-0", "d-1"}, "d-0 has all the requests that it takes"
    router = router_with_a_first_turn(HELD_ROOM)
    assert next_turn(router) == {"p-0", "d-0"}
    refused = HandoffRefused("next", 1, "no room")
    assert "d-1" in sends(router.on(reported("p-0", refusals=(refused,)), 1.0))


@pytest.mark.parametrize(("config", "num_links"), [(CONFIG, 0), (PEAK_ROOM, 0), (HELD_ROOM, 8), (LOCAL, 8)])
def test_what_decode_workers_hold_is_noted_where_it_is_used(config: RouterConfig, num_links: int) -> None:
    assert len(router_with_a_first_turn(config).view.workers["d-0"].prefixes) == num_links


# --- prefill where it decodes ---------------------------------------------------------------------------------------


def test_little_to_prefill_is_prefilled_where_it_decodes() -> None:
    router = router_with_a_first_turn(LOCAL)
    assert next_turn(router, num_new_tokens=6) == {"d-0"}
    attempt = router._in_flight["next"].attempt
    assert attempt is not None and attempt.handoff_to() is None
    assert (attempt.plan.num_predicted_cached_tokens, attempt.plan.num_prefill_tokens) == (32, 6)
    effects = router.on(reported("d-0", output("next", 0, 1, finish=FinishReason.STOP)), 2.0)
    (last,) = [effect for effect in effects if isinstance(effect, Deliver)]
    assert last.account is not None
    assert (last.account.mode, last.account.prefill_worker, last.account.decode_worker) == (
        ServingMode.LOCAL,
        "d-0",
        "d-0",
    )
    assert last.account.mode_reason == "6 of 38 tokens to prefill are not worth a handoff"


def test_more_is_not() -> None:
    assert next_turn(router_with_a_first_turn(LOCAL), num_new_tokens=7) == {"p-0", "d-0"}
    assert next_turn(router_with_a_first_turn(HELD_ROOM), num_new_tokens=1) == {"p-0", "d-0"}, "off by default"
    assert next_turn(router_with_a_first_turn(LOCAL), 6, max_tokens=1) == {"p-0"}, "nothing is left to decode"
    router = router_with_a_first_turn(LOCAL)
    for worker_id in ("d-0", "d-1"):
        router.on(reported(worker_id, stats=stats(num_free_blocks=9)), 0.0)
    assert next_turn(router, num_new_tokens=6) == {"p-0", "d-0"}, "no room for 38 tokens"


def test_what_a_decode_worker_prefills_at_a_time_is_bounded() -> None:
    router = make_router("p-0", "d-0", config=LOCAL)
    assert set(sends(router.on(arrived("a", [1, 2, 3]), 0.0))) == {"d-0"}
    assert set(sends(router.on(arrived("b", [4, 5, 6, 7]), 0.0))) == {"p-0", "d-0"}
    assert set(sends(router.on(arrived("c", [7, 8, 9]), 0.0))) == {"d-0"}
    router.on(reported("d-0", output("a", 0, 1)), 1.0)  # it has prefilled
    assert set(sends(router.on(arrived("d", [1, 1, 1]), 1.0))) == {"d-0"}
    assert set(sends(router.on(arrived("e", [1, 1, 1]), 1.0))) == {"p-0", "d-0"}


def test_it_waits_in_no_queue() -> None:
    router = make_router("p-0", "d-0", config=replace(LOCAL, dispatch_tokens=8))
    router.on(arrived("a", list(range(8))), 0.0)
    assert sends(router.on(arrived("b", list(range(100, 108))), 0.0)) == {}, "p-0 has enough to do"
    assert set(sends(router.on(arrived("c", [1, 2, 3]), 0.0))) == {"d-0"}
