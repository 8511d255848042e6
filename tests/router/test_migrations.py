"""A decode that moves, as the router sees it: who is told what, whose tokens count, and who has it in the end."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from protos.types import (
    Abort,
    FinishReason,
    Handoff,
    Migrate,
    MigrationFailed,
    Retarget,
    ServingMode,
    TransferKind,
    WorkerAccount,
)
from router.events import ClientCancelled, Deliver, Effect, MigrationWanted, Reported, Send, WorkerDown, WorkerUp
from router.migrations import RETURN_PAUSE_S
from router.router import Router
from tests.router.values import arrived, make_router, output, peer, reported, sends

STOP, ABORT, ERROR = FinishReason.STOP, FinishReason.ABORT, FinishReason.ERROR
PROMPT = [1, 2, 3, 4, 5, 6]
HANDOFF_ID, MIGRATE_ID = (1).to_bytes(16, "little"), (2).to_bytes(16, "little")
TO_D1 = MigrationWanted("r", "d-1", "d-0 is hot")
STAY = Send("d-0", retargets=(Retarget("r", 1, None),))


def decoding() -> Router:
    """At d-0, with three tokens; d-1 came after it."""
    router = make_router("p-0", "d-0")
    router.on(arrived("r", PROMPT), 0.0)
    router.on(reported("p-0", output("r", 0, 10)), 1.0)
    router.on(reported("d-0", output("r", 1, 11, 12)), 2.0)
    router.on(WorkerUp(peer("d-1")), 2.0)
    return router


def migrating() -> Router:
    router = decoding()
    router.on(TO_D1, 3.0)
    return router


def tokens(effects: list[Effect]) -> list[int]:
    return [token_id for each in effects if isinstance(each, Deliver) for token_id in each.token_ids]


def decodes_at(router: Router) -> str:
    attempt = router._in_flight["r"].attempt
    assert attempt is not None and attempt.migration is None
    return attempt.plan.decoding_worker.worker_id


def charged(router: Router) -> set[str]:
    views = router.view.workers.values()
    assert all(set(view.placed_blocks) == set(view.decoding) for view in views)
    return {view.worker_id for view in views if view.placed_blocks}


def failed(transfer_id: bytes = MIGRATE_ID, worker_id: str = "d-0") -> Reported:
    return reported(worker_id, failed_migrations=(MigrationFailed("r", 1, transfer_id, "no room"),))


def test_both_workers_are_told_and_both_are_charged() -> None:
    router = decoding()
    found = sends(router.on(TO_D1, 3.0))
    (submit,) = found["d-1"].submits
    assert list(submit.token_ids) == [*PROMPT, 10, 11, 12]
    assert (submit.attempt, submit.num_prompt_tokens, submit.return_worker_id) == (1, 6, "p-0")
    assert submit.handoff_from == Handoff(MIGRATE_ID, peer("d-0"), TransferKind.MIGRATE)
    assert found["d-0"].migrates == (Migrate("r", 1, Handoff(MIGRATE_ID, peer("d-1"), TransferKind.MIGRATE)),)
    assert charged(router) == {"d-0", "d-1"}


def test_a_good_move() -> None:
    router = migrating()
    spent = WorkerAccount(num_kv_bytes=100, num_preemptions=1, mode=ServingMode.DISAGGREGATED)
    assert tokens(router.on(reported("d-0", output("r", 3, 13, account=spent)), 4.0)) == [13]
    effects = router.on(reported("d-1", output("r", 4, 14)), 4.5)
    assert tokens(effects) == [14]
    assert sends(effects) == {"d-0": Send("d-0", aborts=(Abort("r", 1),))}
    assert decodes_at(router) == "d-1" and charged(router) == {"d-1"}
    effects = router.on(reported("d-1", output("r", 5, 2, finish=STOP, account=WorkerAccount(num_kv_bytes=50))), 5.0)
    assert sends(effects) == {}, "d-0 has been told before"
    account = effects[0].account  # type: ignore[union-attr]
    assert account is not None
    assert (account.decode_worker, account.decode_reason) == ("d-1", "migrated from d-0: d-0 is hot")
    assert (account.num_migrations, account.migration_pause_s, account.num_attempts) == (1, 0.5, 1)
    assert (account.mode, account.num_kv_bytes, account.num_preemptions) == (ServingMode.DISAGGREGATED, 150, 1)
    assert (router.statistics.num_migrations, router.statistics.num_failed_migrations) == (1, 0)


def test_the_source_is_kept_until_its_last_token_has_come() -> None:
    router = migrating()
    assert router.on(reported("d-1", output("r", 4, 14)), 4.0) == []
    assert router.on(failed(), 4.0) == [], "the destination has spoken"
    effects = router.on(reported("d-0", output("r", 3, 13)), 4.5)
    assert tokens(effects) == [13, 14]
    assert sends(effects) == {"d-0": Send("d-0", aborts=(Abort("r", 1),))}
    assert decodes_at(router) == "d-1"


def test_a_failed_move_leaves_it_where_it_is() -> None:
    router = migrating()
    effects = router.on(failed(), 4.0)
    assert effects == [Send("d-1", aborts=(Abort("r", 1),)), STAY]
    assert decodes_at(router) == "d-0" and charged(router) == {"d-0"}
    assert router.on(failed(), 4.1) == [], "late"
    assert router.on(reported("d-1", output("r", 3, 99)), 4.1) == [], "it was given up"
    assert tokens(router.on(reported("d-0", output("r", 3, 13)), 4.2)) == [13]
    assert router.statistics.num_failed_migrations == 1


@pytest.mark.parametrize("finish", [ABORT, ERROR])
def test_a_destination_that_cannot_take_it_fails_nobody(finish: FinishReason) -> None:
    router = migrating()
    effects = router.on(reported("d-1", output("r", 3, finish=finish, error="too long for me")), 4.0)
    assert effects == [Send("d-1", aborts=(Abort("r", 1),)), STAY]
    assert decodes_at(router) == "d-0"


@pytest.mark.parametrize("has_spoken", [False, True])
def test_a_destination_that_dies_early_leaves_it_to_the_source(has_spoken: bool) -> None:
    router = migrating()
    if has_spoken:
        router.on(reported("d-1", output("r", 4, 14)), 4.0)  # and 13 is still on its way
    assert router.on(WorkerDown("d-1", "1", "killed"), 4.1) == [STAY]
    assert tokens(router.on(reported("d-0", output("r", 3, 13, 14)), 4.2)) == [13, 14]
    assert decodes_at(router) == "d-0" and charged(router) == {"d-0"}


def test_a_destination_that_dies_late_takes_the_attempt_with_it() -> None:
    router = migrating()
    router.on(reported("d-0", output("r", 3, 13)), 4.0)
    router.on(reported("d-1", output("r", 4, 14)), 4.5)
    effects = router.on(WorkerDown("d-1", "1", "killed"), 5.0)
    (submit,) = [one for send in effects if isinstance(send, Send) and send.worker_id == "d-0" for one in send.submits]
    assert submit.attempt == 2 and list(submit.token_ids[6:]) == [10, 11, 12, 13, 14]


def test_a_source_that_dies_early_takes_the_attempt_with_it() -> None:
    router = migrating()
    effects = router.on(WorkerDown("d-0", "1", "killed"), 4.0)
    aborts = [send for send in effects if isinstance(send, Send) and send.aborts]
    assert {send.worker_id for send in aborts} == {"p-0", "d-1"}
    assert router.statistics.num_failovers == 1
    assert router.on(reported("d-1", output("r", 3, 99)), 4.1) == [], "of the attempt before"


def test_a_source_that_dies_late_costs_nothing() -> None:
    router = migrating()
    router.on(reported("d-0", output("r", 3, 13)), 4.0)
    router.on(reported("d-1", output("r", 4, 14)), 4.5)
    assert router.on(WorkerDown("d-0", "1", "killed"), 5.0) == []
    assert tokens(router.on(reported("d-1", output("r", 5, 15)), 5.5)) == [15]


@pytest.mark.parametrize(
    "ends",
    [
        lambda router: router.on(ClientCancelled("r"), 4.0),
        lambda router: router.on(reported("d-0", output("r", 3, 2, finish=STOP)), 4.0),
    ],
)
def test_an_end_in_the_midst_is_told_to_the_destination(ends: Callable[[Router], list[Effect]]) -> None:
    router = migrating()
    assert "d-1" in sends(ends(router))
    assert router.num_in_flight == 0 and charged(router) == set()


@pytest.mark.parametrize(
    "wanted",
    [
        MigrationWanted("nobody", "d-1", ""),
        MigrationWanted("r", "d-0", "it is there"),
        MigrationWanted("r", "d-7", "not up"),
    ],
)
def test_what_cannot_be_does_nothing(wanted: MigrationWanted) -> None:
    router = decoding()
    assert router.on(wanted, 3.0) == []
    assert decodes_at(router) == "d-0"


def test_one_move_at_a_time_and_none_before_it_decodes() -> None:
    router = migrating()
    assert router.on(TO_D1, 3.1) == []
    router = make_router("p-0", "d-0", "d-1")
    router.on(arrived("r", PROMPT), 0.0)
    router.on(reported("p-0", output("r", 0, 10)), 1.0)
    for worker_id in ("d-0", "d-1", "p-0"):
        assert router.on(MigrationWanted("r", worker_id, "too early"), 2.0) == []


def test_one_that_drops_a_request_that_a_late_word_had_given_to_it_costs_an_attempt_and_not_the_request() -> None:
    """d-1 had the request before, its words of that time come late, and the migration back to it is lost."""
    router = migrating()
    router.on(failed(), 3.5)
    again = 3.5 + RETURN_PAUSE_S
    assert set(sends(router.on(TO_D1, again))) == {"d-0", "d-1"}
    router.on(reported("d-1", output("r", 3, 13)), again)
    assert decodes_at(router) == "d-1"
    router.on(reported("d-1", output("r", 4, finish=ABORT)), again + 0.1)
    assert router.statistics.num_failovers == 1


def test_one_that_drops_a_request_that_is_elsewhere_by_now_costs_nothing() -> None:
    router = migrating()
    router.on(failed(), 3.5)
    assert router.on(reported("d-1", output("r", 3, finish=ABORT)), 3.6) == []
    assert router.statistics.num_failovers == 0 and decodes_at(router) == "d-0"


def test_there_and_back() -> None:
    """What the first life of a worker said, and says again, is not taken for its second one's."""
    router = migrating()
    router.on(reported("d-0", output("r", 3, 13)), 4.0)
    router.on(reported("d-1", output("r", 4, 14)), 4.5)
    back = MigrationWanted("r", "d-0", "d-1 is hotter")
    assert router.on(back, 4.5 + RETURN_PAUSE_S / 2) == [], "it may not have heard that it was to forget"
    assert set(sends(router.on(back, 4.5 + RETURN_PAUSE_S))) == {"d-0", "d-1"}
    assert router.on(reported("d-0", output("r", 3, 13)), 5.1) == []
    effects = router.on(reported("d-0", output("r", 5, 15)), 5.2)
    assert tokens(effects) == [15]
    assert sends(effects) == {"d-1": Send("d-1", aborts=(Abort("r", 1),))}
    assert decodes_at(router) == "d-0" and charged(router) == {"d-0"}
    assert router._in_flight["r"].account(6.0).num_migrations == 2
