from __future__ import annotations

from array import array
from dataclasses import replace

import pytest

from protos.types import Abort, FinishReason, Handoff, HandoffRefused, ServingMode, WorkerAccount
from router.events import (
    AbortRequested,
    ClientCancelled,
    Deliver,
    Effect,
    Fail,
    StopMatched,
    Tick,
    WorkerDown,
    WorkerUp,
)
from router.router import Router
from tests.router.values import CONFIG, arrived, make_router, output, peer, reported, sends

STOP, LENGTH, ABORT, ERROR = FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT, FinishReason.ERROR
PROMPT = [1, 2, 3, 4, 5, 6]


def delivered(effects: list[Effect]) -> list[tuple[int, tuple[int, ...], FinishReason | None]]:
    return [(e.first_index, e.token_ids, e.finish_reason) for e in effects if isinstance(e, Deliver)]


def failure(effects: list[Effect]) -> Fail:
    return next(effect for effect in effects if isinstance(effect, Fail))


def assert_empty(router: Router) -> None:
    assert router.num_in_flight == 0
    assert not router._by_client_id
    assert not any(view.pending_tokens or view.placed_blocks for view in router.view.workers.values())


def test_dispatch_tells_both_workers_of_one_transfer() -> None:
    router = make_router("p-0", "d-0")
    found = sends(router.on(arrived("r", PROMPT), 0.0))
    (prefill,), (decode,) = found["p-0"].submits, found["d-0"].submits
    assert prefill.attempt == decode.attempt == 1
    assert prefill.handoff_to == Handoff((1).to_bytes(16, "little"), peer("d-0"))
    assert decode.handoff_from == Handoff((1).to_bytes(16, "little"), peer("p-0"))
    assert prefill.handoff_from is decode.handoff_to is None
    assert list(prefill.token_ids) == list(decode.token_ids) == PROMPT
    assert prefill.home_worker_ids == ()  # nobody pulls


def test_a_good_life() -> None:
    router = make_router("p-0", "d-0")
    router.on(arrived("r", PROMPT), 10.0)
    prefilled = WorkerAccount(num_cached_tokens=4, queued_s=0.1, prefill_s=0.2)
    effects = router.on(reported("p-0", output("r", 0, 7, account=prefilled)), 11.0)
    assert delivered(effects) == [(0, (7,), None)]
    assert effects[0].num_cached_tokens == 4  # type: ignore[union-attr]
    assert delivered(router.on(reported("d-0", output("r", 1, 8, 9)), 12.0)) == [(1, (8, 9), None)]
    decoded = WorkerAccount(
        num_kv_bytes=512, transfer_s=0.3, transfer_exposed_s=0.1, num_preemptions=1, mode=ServingMode.DISAGGREGATED
    )
    effects = router.on(reported("d-0", output("r", 3, 2, finish=STOP, account=decoded)), 14.0)
    assert delivered(effects) == [(3, (2,), STOP)]
    assert sends(effects) == {}  # both workers know that it has ended
    account = effects[0].account  # type: ignore[union-attr]
    assert account is not None
    assert (account.prefill_worker, account.decode_worker, account.num_attempts) == ("p-0", "d-0", 1)
    assert (account.mode, account.mode_reason) == (ServingMode.DISAGGREGATED, "")
    assert (account.num_cached_tokens, account.num_kv_bytes, account.num_preemptions) == (4, 512, 1)
    assert (account.ttft_s, account.tpot_s, account.e2e_s) == (1.0, 1.0, 4.0)
    assert router.statistics.num_finished == 1
    assert_empty(router)


def test_reports_of_the_two_workers_may_overtake_each_other() -> None:
    router = make_router("p-0", "d-0")
    router.on(arrived("r", PROMPT), 0.0)
    assert delivered(router.on(reported("d-0", output("r", 1, 8, finish=LENGTH)), 1.0)) == []
    effects = router.on(reported("p-0", output("r", 0, 7)), 2.0)
    assert delivered(effects) == [(0, (7, 8), LENGTH)]
    assert sends(effects) == {}
    assert_empty(router)


def test_a_request_that_ends_with_its_first_token_is_aborted_at_the_decode_worker() -> None:
    router = make_router("p-0", "d-0")
    router.on(arrived("r", PROMPT), 0.0)
    effects = router.on(reported("p-0", output("r", 0, 2, finish=STOP)), 1.0)
    assert delivered(effects) == [(0, (2,), STOP)]
    assert set(sends(effects)) == {"d-0"}
    account = effects[0].account  # type: ignore[union-attr]
    assert account is not None
    assert account.mode is ServingMode.LOCAL
    assert_empty(router)


def test_no_handoff_for_one_token() -> None:
    router = make_router("p-0", "d-0")
    found = sends(router.on(arrived("r", PROMPT, max_tokens=1), 0.0))
    assert set(found) == {"p-0"}
    assert found["p-0"].submits[0].handoff_to is None


@pytest.mark.parametrize("num_reports", [0, 1, 2])
def test_cancel_aborts_everywhere_in_every_state(num_reports: int) -> None:
    router = make_router("p-0", "d-0")
    router.on(arrived("r", PROMPT), 0.0)
    for event in [reported("p-0", output("r", 0, 7)), reported("d-0", output("r", 1, 8))][:num_reports]:
        router.on(event, 1.0)
    effects = router.on(ClientCancelled("r"), 2.0)
    assert {worker_id: send.aborts for worker_id, send in sends(effects).items()} == {
        "p-0": (Abort("r", 1),),
        "d-0": (Abort("r", 1),),
    }
    assert not delivered(effects)
    assert_empty(router)
    assert router.on(ClientCancelled("r"), 3.0) == []
    assert router.on(reported("d-0", output("r", 2, 9)), 3.0) == []
    assert router.statistics.num_stale_reports == 1


def test_cancel_while_no_worker_is_up() -> None:
    router = make_router()
    assert router.on(arrived("r", PROMPT), 0.0) == []
    assert router.on(ClientCancelled("r"), 1.0) == []
    assert_empty(router)


@pytest.mark.parametrize(("event", "reason"), [(StopMatched("r"), STOP), (AbortRequested("r"), ABORT)])
def test_the_router_can_end_a_request(event: StopMatched | AbortRequested, reason: FinishReason) -> None:
    router = make_router("p-0", "d-0")
    router.on(arrived("r", PROMPT), 0.0)
    router.on(reported("p-0", output("r", 0, 7)), 1.0)
    router.on(reported("d-0", output("r", 1, 8)), 1.0)
    effects = router.on(event, 2.0)
    assert delivered(effects) == [(2, (), reason)]
    assert set(sends(effects)) == {"p-0", "d-0"}
    assert_empty(router)


def test_a_clients_id_is_unique_while_in_flight() -> None:
    router = make_router("p-0", "d-0")
    router.on(arrived("r1", PROMPT, client_id="mine"), 0.0)
    refused = failure(router.on(arrived("r2", PROMPT, client_id="mine"), 0.0))
    assert (refused.request_id, refused.code) == ("r2", "ALREADY_EXISTS")
    assert refused.message == "request_id 'mine' is in flight already"
    assert router.find("", "mine") == ("r1",)
    router.on(ClientCancelled("r1"), 0.0)
    assert router.on(arrived("r3", PROMPT, client_id="mine"), 0.0)
    assert router.find("", "mine") == ("r3",)


def test_the_number_in_flight_is_bounded() -> None:
    router = make_router("p-0", "d-0", config=replace(CONFIG, max_in_flight=1))
    router.on(arrived("r1", PROMPT), 0.0)
    refused = failure(router.on(arrived("r2", PROMPT), 0.0))
    assert (refused.code, refused.retry_after_s) == ("RESOURCE_EXHAUSTED", 1.0)
    router.on(ClientCancelled("r1"), 0.0)
    assert_empty(router)


def test_an_error_of_a_worker_fails_the_request_with_its_text() -> None:
    router = make_router("p-0", "d-0")
    router.on(arrived("r", PROMPT), 0.0)
    effects = router.on(reported("p-0", output("r", 0, finish=ERROR, error="6 blocks needed, 4 there")), 0.0)
    assert failure(effects) == Fail("r", "INTERNAL", "worker p-0: 6 blocks needed, 4 there")
    assert set(sends(effects)) == {"p-0", "d-0"}
    assert_empty(router)


# --- failover -----------------------------------------------------------------------------------------------------


def test_a_lost_decode_worker_is_replaced_behind_the_committed_tokens() -> None:
    router = make_router("p-0", "d-0", "d-1")
    found = sends(router.on(arrived("r", PROMPT), 0.0))
    first = next(worker_id for worker_id in found if worker_id != "p-0")
    second = {"d-0": "d-1", "d-1": "d-0"}[first]
    router.on(reported("p-0", output("r", 0, 7)), 1.0)
    router.on(reported(first, output("r", 1, 8)), 1.0)
    effects = router.on(WorkerDown(first, "1", "killed"), 2.0)
    prefill = [e for e in effects if getattr(e, "worker_id", "") == "p-0"]
    assert prefill[0].aborts == (Abort("r", 1),)  # type: ignore[union-attr]
    submit = prefill[1].submits[0]  # type: ignore[union-attr]
    assert (submit.attempt, submit.token_ids, submit.num_prompt_tokens) == (2, array("i", [*PROMPT, 7, 8]), 6)
    assert submit.handoff_to is not None
    assert submit.handoff_to.peer == peer(second)
    assert router.on(reported("p-0", output("r", 2, 99)), 3.0) == []  # attempt 1 is over
    assert router.statistics.num_stale_reports == 1
    effects = router.on(reported("p-0", output("r", 2, 9, attempt=2)), 3.0)
    assert delivered(effects) == [(2, (9,), None)]
    effects = router.on(reported(second, output("r", 3, 2, attempt=2, finish=STOP)), 4.0)
    assert delivered(effects) == [(3, (2,), STOP)]
    assert effects[0].account.num_attempts == 2  # type: ignore[union-attr]
    assert router.statistics.num_failovers == 1
    assert_empty(router)


def test_a_lost_prefill_worker_matters_until_the_decode_worker_reports() -> None:
    router = make_router("p-0", "p-1", "d-0")
    found = sends(router.on(arrived("r", PROMPT), 0.0))
    first = next(worker_id for worker_id in found if worker_id.startswith("p"))
    router.on(reported(first, output("r", 0, 7)), 1.0)
    effects = router.on(WorkerDown(first, "1", "killed"), 2.0)
    assert router.statistics.num_failovers == 1
    aborts = [e.aborts for e in effects if getattr(e, "aborts", ())]  # type: ignore[union-attr]
    assert aborts == [(Abort("r", 1),)]  # at d-0; the dead one is not told


def test_a_lost_prefill_worker_does_not_matter_once_the_decode_worker_has_the_kv() -> None:
    router = make_router("p-0", "d-0")
    router.on(arrived("r", PROMPT), 0.0)
    router.on(reported("p-0", output("r", 0, 7)), 1.0)
    router.on(reported("d-0", output("r", 1, 8)), 1.0)
    assert router.on(WorkerDown("p-0", "1", "killed"), 2.0) == []
    effects = router.on(reported("d-0", output("r", 2, 9, finish=STOP)), 3.0)
    assert delivered(effects) == [(2, (9,), STOP)]
    assert_empty(router)


def test_a_prefill_worker_whose_token_is_still_missing_does_matter() -> None:
    router = make_router("p-0", "p-1", "d-0")
    found = sends(router.on(arrived("r", PROMPT), 0.0))
    first = next(worker_id for worker_id in found if worker_id.startswith("p"))
    router.on(reported("d-0", output("r", 1, 8)), 1.0)  # overtook token 0, which is lost now
    router.on(WorkerDown(first, "1", "killed"), 2.0)
    assert router.statistics.num_failovers == 1


def test_attempts_are_bounded() -> None:
    router = make_router("p-0")
    router.on(arrived("r", PROMPT), 0.0)
    for life in range(1, 3):
        router.on(WorkerUp(peer("p-0", str(life + 1))), 1.0)  # implies the loss of the life before
    effects = router.on(WorkerDown("p-0", "3", "killed again"), 2.0)
    failed = failure(effects)
    assert failed.code == "UNAVAILABLE"
    assert failed.message == "3 attempts failed; the last one: worker p-0 was lost: killed again"
    assert_empty(router)


def test_requests_wait_for_a_worker_and_no_longer_than_they_may() -> None:
    router = make_router()
    assert router.on(arrived("r1", PROMPT), 0.0) == []
    assert router.on(arrived("r2", PROMPT), 20.0) == []
    assert router.on(Tick(), 29.0) == []
    failed = failure(router.on(Tick(), 30.0))
    assert (failed.request_id, failed.code) == ("r1", "UNAVAILABLE")
    assert failed.message == "no worker is up; waited 30.0 s for one"
    found = sends(router.on(WorkerUp(peer("p-0")), 31.0))
    assert found["p-0"].submits[0].request_id == "r2"
    router.on(ClientCancelled("r2"), 32.0)
    assert_empty(router)


def test_a_worker_that_gives_a_request_up_costs_an_attempt() -> None:
    router = make_router("p-0")
    router.on(arrived("r", PROMPT), 0.0)
    effects = router.on(reported("p-0", output("r", 0, finish=ABORT, error="fenced")), 1.0)
    assert not delivered(effects)
    assert router.statistics.num_failovers == 1


def test_a_token_that_contradicts_a_committed_one_fails_the_attempt() -> None:
    router = make_router("p-0", "d-0")
    router.on(arrived("r", PROMPT), 0.0)
    router.on(reported("p-0", output("r", 0, 7)), 1.0)
    effects = router.on(reported("d-0", output("r", 0, 8, 9)), 2.0)
    assert not delivered(effects)
    submits = [e.submits[0] for e in effects if getattr(e, "submits", ())]  # type: ignore[union-attr]
    assert [(s.attempt, list(s.token_ids)) for s in submits] == [(2, [*PROMPT, 7])] * 2


def test_other_incarnations_and_other_workers_are_not_heard() -> None:
    router = make_router("p-0", "p-1", "d-0")
    found = sends(router.on(arrived("r", PROMPT), 0.0))
    other = {"p-0": "p-1", "p-1": "p-0"}[next(worker_id for worker_id in found if worker_id.startswith("p"))]
    assert router.on(reported("d-0", output("r", 0, 7), incarnation="0"), 1.0) == []
    assert router.on(reported(other, output("r", 0, 7)), 1.0) == []
    assert router.on(WorkerDown("d-0", "0", "an old life"), 1.0) == []
    assert router.statistics.num_stale_reports == 2
    assert router.statistics.num_failovers == 0


def test_the_remaining_deadline_shrinks() -> None:
    router = make_router("p-0")
    event = arrived("r", PROMPT)
    router.on(replace(event, request=replace(event.request, deadline_s=10.0)), 100.0)
    effects = router.on(reported("p-0", output("r", 0, finish=ABORT)), 104.0)
    submit = next(e.submits[0] for e in effects if getattr(e, "submits", ()))  # type: ignore[union-attr]
    assert submit.deadline_s == 6.0


# --- refused handoffs ---------------------------------------------------------------------------------------------


def refused(worker_id: str) -> object:
    return reported(worker_id, refusals=(HandoffRefused("r", 1, "0 of 2 blocks free"),))


def test_a_refused_handoff_goes_to_another_decode_worker_then_stays() -> None:
    router = make_router("p-0", "d-0", "d-1")
    found = sends(router.on(arrived("r", PROMPT), 0.0))
    first = next(worker_id for worker_id in found if worker_id != "p-0")
    second = {"d-0": "d-1", "d-1": "d-0"}[first]

    router.on(reported("p-0", output("r", 0, 7)), 1.0)
    found = sends(router.on(refused("p-0"), 1.0))  # type: ignore[arg-type]
    assert found[first].aborts == (Abort("r", 1),)
    submit, retarget = found[second].submits[0], found["p-0"].retargets[0]
    assert retarget.handoff_to is not None
    assert submit.handoff_from is not None
    assert retarget.handoff_to.peer == peer(second)
    assert retarget.handoff_to.transfer_id == submit.handoff_from.transfer_id != (1).to_bytes(16, "little")
    assert submit.attempt == retarget.attempt == 1
    assert list(submit.token_ids) == PROMPT  # as at the source, whose first token has come meanwhile

    found = sends(router.on(refused("p-0"), 2.0))  # type: ignore[arg-type]
    assert found[second].aborts == (Abort("r", 1),)
    assert found["p-0"].retargets[0].handoff_to is None
    assert set(found) == {"p-0", second}

    router.on(WorkerDown(second, "1", "killed"), 3.0)  # not part of the attempt any more
    assert router.statistics.num_failovers == 0
    effects = router.on(reported("p-0", output("r", 1, 2, finish=STOP)), 4.0)
    account = effects[0].account  # type: ignore[union-attr]
    assert account is not None
    assert (account.mode, account.decode_worker) == (ServingMode.LOCAL, "p-0")
    assert "0 of 2 blocks free" in account.mode_reason
    assert_empty(router)


def test_a_refusal_is_not_heard_once_the_decode_worker_has_the_kv() -> None:
    router = make_router("p-0", "d-0")
    router.on(arrived("r", PROMPT), 0.0)
    router.on(reported("d-0", output("r", 1, 8)), 1.0)
    assert router.on(refused("p-0"), 2.0) == []  # type: ignore[arg-type]
    assert router.on(refused("d-0"), 2.0) == []  # type: ignore[arg-type]
    assert router.statistics.num_stale_reports == 2
