"""When the client makes a lost call again, and what it sends then. No server: values and instants only."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.client_types import Call, CallFailed, Chunk, Completion, Placement, RetryPolicy, Sampling
from cluster.generation import Generation
from protos.types import FinishReason

POLICY = RetryPolicy(give_up_after_s=10.0, initial_wait_s=0.1, max_wait_s=2.0)
LOST = CallFailed("UNAVAILABLE", "connection reset")
FAR = 1e9


def generation(policy: RetryPolicy = POLICY, draw: float = 1.0, n: int = 1) -> Generation:
    return Generation(Call("prompt", Sampling(seed=7, n=n), "r"), policy, lambda: draw)


def chunk(first_index: int, *token_ids: int, text: str = "", choice: int = 0, is_last: bool = False) -> Chunk:
    completion = None
    if is_last:
        completion = Completion("r", text, token_ids, FinishReason.LENGTH, 3, 0, 7, Placement(), choice_index=choice)
    return Chunk("r", choice, first_index, token_ids, text, completion=completion)


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), min_size=1, max_size=8), st.data())
def test_the_whole_is_the_parts_however_often_the_connection_is_lost(
    parts: list[list[int]], data: st.DataObject
) -> None:
    one, now, index, num_lost = generation(), 0.0, 0, 0
    for number, part in enumerate(parts):
        for _ in range(data.draw(st.integers(0, 3))):
            now += one.retry_wait_s(LOST, now, FAR)
            assert one.call().output_token_ids == tuple(token for done in parts[:number] for token in done)
            assert (one.call().request_id, one.call().sampling.seed) == ("r", 7)
            num_lost += index > 0
        last = one.take(chunk(index, *part, text=str(part), is_last=number == len(parts) - 1))
        index += len(part)
    assert one.is_done and last.completion is not None
    assert last.completion.token_ids == tuple(token for part in parts for token in part)
    assert last.completion.text == "".join(map(str, parts))
    assert last.completion.num_resumes == num_lost
    assert last.token_ids == tuple(parts[-1])


def test_the_wait_doubles_up_to_its_most_and_starts_again_after_a_token() -> None:
    one = generation()
    assert [one.retry_wait_s(LOST, 0.0, FAR) for _ in range(7)] == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    one.take(chunk(0, 5))
    assert one.retry_wait_s(LOST, 9.0, FAR) == 0.1
    assert generation(draw=0.0).retry_wait_s(LOST, 0.0, FAR) == 0.05


def test_it_gives_up_in_time() -> None:
    one = generation()
    one.retry_wait_s(LOST, 100.0, FAR)
    one.retry_wait_s(LOST, 109.0, FAR)
    with pytest.raises(CallFailed, match="connection reset"):
        one.retry_wait_s(LOST, 109.9, FAR)
    with pytest.raises(CallFailed):
        generation(RetryPolicy(give_up_after_s=0)).retry_wait_s(LOST, 0.0, FAR)


def test_it_does_not_wait_past_the_deadline() -> None:
    assert generation().retry_wait_s(LOST, 0.0, 0.11) == 0.1
    with pytest.raises(CallFailed):
        generation().retry_wait_s(LOST, 0.0, 0.09)


@pytest.mark.parametrize(
    ("code", "pushback_s", "wait_s"),
    [
        ("UNAVAILABLE", 1.5, 1.5),
        ("UNAVAILABLE", -1.0, None),
        ("RESOURCE_EXHAUSTED", 0.7, 0.7),
        ("RESOURCE_EXHAUSTED", None, None),
        ("RESOURCE_EXHAUSTED", -1.0, None),
        ("INVALID_ARGUMENT", None, None),
        ("DEADLINE_EXCEEDED", None, None),
        ("CANCELLED", None, None),
        ("INTERNAL", None, None),
        ("ALREADY_EXISTS", None, None),
    ],
)
def test_which_failures_are_final(code: str, pushback_s: float | None, wait_s: float | None) -> None:
    failure = CallFailed(code, "why", pushback_s)
    if wait_s is not None:
        assert generation().retry_wait_s(failure, 0.0, FAR) == wait_s
        return
    with pytest.raises(CallFailed) as caught:
        generation().retry_wait_s(failure, 0.0, FAR)
    assert caught.value is failure


def test_after_a_loss_the_server_may_still_know_the_id() -> None:
    one = generation()
    one.retry_wait_s(LOST, 0.0, FAR)
    assert one.retry_wait_s(CallFailed("ALREADY_EXISTS", "in flight"), 0.1, FAR) == 0.2


def test_several_choices_are_sent_again_only_before_any_token() -> None:
    one = generation(n=2)
    one.retry_wait_s(LOST, 0.0, FAR)
    assert one.call().output_token_ids == ()
    one.take(chunk(0, 5, choice=1))
    with pytest.raises(CallFailed):
        one.retry_wait_s(LOST, 0.0, FAR)
    assert not one.take(chunk(0, 6, choice=0, is_last=True)).completion.num_resumes  # type: ignore[union-attr]
    assert not one.is_done
    one.take(chunk(1, 7, choice=1, is_last=True))
    assert one.is_done


@pytest.mark.parametrize("first_index", [0, 3])
def test_a_gap_or_a_repeat_is_an_error_not_output(first_index: int) -> None:
    one = generation()
    one.take(chunk(0, 5, 6))
    with pytest.raises(CallFailed, match=f"INTERNAL: tokens from index {first_index} on came where 2 was due"):
        one.take(chunk(first_index, 7))
    assert one.call().output_token_ids == (5, 6)
