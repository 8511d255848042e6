"""A running decode that leaves one WorkerCore for another: what is sent when, who has it after each thing that may go
wrong, and that nothing stays leased."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.events import (
    AbortTransfer,
    BlocksSent,
    CommitTransfer,
    Effect,
    ExpectTransfer,
    GrantTransfer,
    OpenTransfer,
    RefuseTransfer,
    SendBlocks,
    TransferArrived,
    TransferClosed,
    TransferLost,
    TransferOffered,
    TransferRefused,
)
from protos.types import (
    Abort,
    FinishReason,
    GenerateRequest,
    Handoff,
    Migrate,
    MigrationFailed,
    Retarget,
    TokenOutput,
    TransferFailure,
    TransferKind,
)
from tests.engine.fake_worker import (
    PEER,
    PROMPT,
    T2,
    FakeWorker,
    T,
    expected_output,
    generate,
    held_and_leased,
    kinds,
)

MAX_TOKENS = 20
MIGRATE = Migrate("r", 1, Handoff(T, PEER, TransferKind.MIGRATE))
STAY = Retarget("r", 1, None)


def decoding(num_steps: int = 3, max_tokens: int = MAX_TOKENS, **changes: int | bool) -> FakeWorker:
    """Its request has 10 tokens of prompt and num_steps of output: 3 blocks of 4 and a rest."""
    worker = FakeWorker(**{"num_blocks": 16, **changes})
    worker.submit(generate("r", PROMPT, max_tokens=max_tokens))
    for _ in range(num_steps):
        worker.step()
    return worker


def leaving(worker: FakeWorker) -> FakeWorker:
    """The destination has granted, and what was full has been sent."""
    worker.on(MIGRATE)
    worker.on(BlocksSent(T, 0))
    return worker


def committed(worker: FakeWorker) -> list[Effect]:
    """Of the step that stops it."""
    leaving(worker)
    worker.on(BlocksSent(T, 3))
    return worker.step()


def failed(reason: str, transfer_id: bytes = T) -> MigrationFailed:
    return MigrationFailed("r", 1, transfer_id, reason)


def the_rest(worker: FakeWorker) -> None:
    worker.run()
    assert worker.tokens_of("r") == expected_output(PROMPT, MAX_TOKENS)
    assert held_and_leased(worker) == (0, 0)


# --- the source -------------------------------------------------------------------------------------------------------


def test_blocks_go_when_they_are_full_and_the_request_with_the_last_one() -> None:
    worker = decoding()
    assert worker.on(MIGRATE) == [OpenTransfer(MIGRATE.migrate_to, "r", 1, 4 + 2, TransferKind.MIGRATE)]
    assert kinds(worker.step()) == ["TokenOutput"], "nothing is granted yet"
    [sent] = worker.on(BlocksSent(T, 1))
    assert isinstance(sent, SendBlocks) and (sent.first_block, len(sent.block_ids)) == (0, 3)
    assert kinds(worker.step()) == ["TokenOutput"], "two blocks and a rest are on their way"
    worker.on(BlocksSent(T, 3))
    output, rest, commit = worker.step()
    assert isinstance(output, TokenOutput) and output.account is not None and output.finish_reason is None
    assert isinstance(rest, SendBlocks) and (rest.first_block, len(rest.block_ids)) == (3, 1)
    assert commit == CommitTransfer(T, 6, tuple(expected_output(PROMPT, 6)))
    assert worker.run() == [], "it is computed no more"
    assert held_and_leased(worker) == (4, 0)
    assert worker.on(TransferClosed(T)) == [], "it still may come back"
    assert held_and_leased(worker) == (4, 0)
    worker.on(Abort("r", 1))
    assert held_and_leased(worker) == (0, 0)


def test_with_a_longer_tail_it_is_stopped_first_and_copied_then() -> None:
    worker = decoding(max_migration_tail_blocks=100)
    worker.on(MIGRATE)
    worker.on(BlocksSent(T, 0))
    effects = worker.step()
    assert kinds(effects) == ["TokenOutput", "SendBlocks", "CommitTransfer"]


def test_what_is_not_decoding_cannot_leave() -> None:
    worker = FakeWorker(max_num_seqs=1, num_blocks=16)
    worker.submit(generate("busy", [1, 2], max_tokens=3))
    worker.submit(generate("r", PROMPT, max_tokens=MAX_TOKENS))
    worker.step()
    assert worker.on(MIGRATE) == [failed("it does not decode here: waiting")]
    worker.run()
    assert worker.on(MIGRATE) == [], "it is not here"


def test_a_repeated_word_changes_nothing_and_a_new_one_replaces_it() -> None:
    worker = leaving(decoding())
    assert worker.on(MIGRATE) == []
    second = Migrate("r", 1, Handoff(T2, PEER, TransferKind.MIGRATE))
    aborted, opened = worker.on(second)
    assert isinstance(aborted, AbortTransfer) and aborted.transfer_id == T
    assert isinstance(opened, OpenTransfer) and opened.handoff.transfer_id == T2
    assert worker.on(TransferClosed(T, TransferFailure.ABORTED)) == []
    assert worker.on(TransferRefused(T2, "no room")) == [failed("no room", T2)]
    the_rest(worker)


@pytest.mark.parametrize("is_granted", [False, True])
def test_before_the_commit_whatever_goes_wrong_the_request_goes_on(is_granted: bool) -> None:
    worker = decoding()
    worker.on(MIGRATE)
    if is_granted:
        worker.on(BlocksSent(T, 0))
        worker.step()
        end: TransferClosed | TransferRefused = TransferClosed(T, TransferFailure.LINK_LOST)
        assert worker.on(end) == [failed("the transfer ended: link_lost")]
    else:
        assert worker.on(TransferRefused(T, "no room")) == [failed("no room")]
    assert worker.on(STAY) == []
    the_rest(worker)


def test_after_the_commit_it_waits_for_the_routers_word() -> None:
    worker = decoding()
    committed(worker)
    assert worker.on(TransferClosed(T, TransferFailure.TIMEOUT)) == [failed("the transfer ended: timeout")]
    assert worker.run() == []
    assert held_and_leased(worker) == (4, 0)
    assert worker.on(STAY) == []
    the_rest(worker)


def test_the_router_may_keep_it_before_the_transfer_has_ended() -> None:
    worker = decoding()
    committed(worker)
    assert worker.on(STAY) == [AbortTransfer(T, "the router keeps it here")]
    worker.step()
    worker.on(TransferClosed(T, TransferFailure.ABORTED))
    the_rest(worker)


@pytest.mark.parametrize("is_committed", [False, True])
def test_a_request_that_is_aborted_ends_its_migration(is_committed: bool) -> None:
    worker = decoding()
    if is_committed:
        committed(worker)
    else:
        leaving(worker)
    assert kinds(worker.on(Abort("r", 1))) == ["AbortTransfer"]
    assert held_and_leased(worker)[1] > 0, "still read"
    assert worker.on(TransferClosed(T, TransferFailure.ABORTED)) == []
    assert held_and_leased(worker) == (0, 0)


def test_a_request_that_ends_before_it_has_left_stays() -> None:
    worker = leaving(decoding(max_tokens=6))
    effects = worker.run()
    assert [e.finish_reason for e in effects if isinstance(e, TokenOutput) and e.finish_reason]
    assert AbortTransfer(T, "finished") in effects
    worker.on(TransferClosed(T, TransferFailure.ABORTED))
    assert held_and_leased(worker) == (0, 0)


def test_a_preempted_request_stays() -> None:
    worker = FakeWorker(num_blocks=8)
    worker.submit(generate("urgent", range(50, 60), max_tokens=12, priority=1))
    worker.submit(generate("r", PROMPT, max_tokens=MAX_TOKENS))
    worker.step()
    worker.step()
    leaving(worker)
    effects: list[Effect] = []
    while failed("it was preempted") not in effects:
        effects = worker.step()
    assert worker.outputs[-1].preempted_request_ids == ("r",)
    worker.on(TransferClosed(T, TransferFailure.ABORTED))
    the_rest(worker)


def test_a_request_that_outgrows_its_offer_stays() -> None:
    worker = decoding(num_blocks=16)
    worker.on(MIGRATE)
    worker.on(BlocksSent(T, 0))
    effects = worker.run()
    assert failed("it has outgrown the 6 blocks on offer") in effects
    worker.on(TransferClosed(T, TransferFailure.ABORTED))
    the_rest(worker)


# --- the destination --------------------------------------------------------------------------------------------------


def migrating_in(num_known: int) -> GenerateRequest:
    """With so many tokens of the output given."""
    given = [*PROMPT, *expected_output(PROMPT, num_known)]
    request = generate("r", given, num_committed=num_known, max_tokens=MAX_TOKENS)
    return replace(request, handoff_from=Handoff(T, PEER, TransferKind.MIGRATE))


def awaiting(num_known: int, **changes: int | bool) -> FakeWorker:
    worker = FakeWorker(**{"num_blocks": 16, **changes})
    assert worker.submit(migrating_in(num_known)) == [ExpectTransfer(MIGRATE.migrate_to, "r", 1)]
    return worker


def bring(source: FakeWorker, worker: FakeWorker, **changes: int | tuple[int, ...]) -> None:
    """Run `source` to its commit and let all of it arrive."""
    opened = source.on(MIGRATE)[0]
    assert isinstance(opened, OpenTransfer)
    [granted] = worker.on(TransferOffered(T, "r", 1, opened.num_blocks))
    assert isinstance(granted, GrantTransfer)
    effects = source.on(BlocksSent(T, granted.num_held_blocks))
    effects += source.on(BlocksSent(T, 3)) + source.step()
    blocks = [block for each in effects if isinstance(each, SendBlocks) for block in each.block_ids]
    for theirs, ours in zip(blocks[granted.num_held_blocks :], granted.block_ids, strict=False):
        worker.kv[ours] = list(source.kv[theirs])
    commit = effects[-1]
    assert isinstance(commit, CommitTransfer)
    values = {
        "first_index": commit.first_index,
        "token_ids": commit.token_ids,
        "num_blocks": len(blocks),
        "num_bytes": 12,
        "transfer_s": 0.5,
        "exposed_s": 0.25,
        **changes,
    }
    assert worker.on(TransferArrived(transfer_id=T, **values)) == []  # type: ignore[arg-type]


@pytest.mark.parametrize("num_known", [1, 2, 3])
def test_the_destination_goes_on_at_the_next_token(num_known: int) -> None:
    worker = awaiting(num_known)
    bring(decoding(), worker)
    assert held_and_leased(worker) == (4, 0), "what was offered beyond goes back"
    worker.run()
    assert worker.first_index("r") == 4
    assert worker.tokens_of("r") == expected_output(PROMPT, MAX_TOKENS)[4:]
    assert all(output.num_batched_tokens == 1 for output in worker.outputs)
    assert held_and_leased(worker) == (0, 0)


def test_what_the_destination_has_is_not_sent_again() -> None:
    worker = FakeWorker(num_blocks=16)
    worker.submit(generate("before", PROMPT, max_tokens=1))
    worker.run()
    worker.submit(migrating_in(3))
    [granted] = worker.on(TransferOffered(T, "r", 1, 6))
    assert isinstance(granted, GrantTransfer) and (granted.num_held_blocks, len(granted.block_ids)) == (2, 4)


@pytest.mark.parametrize("is_granted", [False, True])
def test_the_destination_drops_what_is_lost(is_granted: bool) -> None:
    worker = awaiting(3)
    if is_granted:
        worker.on(TransferOffered(T, "r", 1, 6))
    [told] = worker.on(TransferLost(T, "link"))
    assert isinstance(told, TokenOutput) and (told.finish_reason, told.error) == (FinishReason.ABORT, "link")
    assert held_and_leased(worker) == (0, 0)
    assert worker.run() == []
    assert worker.core.stats().num_waiting == 0
    assert worker.on(Abort("r", 1)) == []


def test_the_destination_takes_nobody_where_as_many_run_as_may() -> None:
    worker = awaiting(3, max_num_seqs=1)
    worker.submit(generate("running", [1, 2], max_tokens=9))
    worker.step()
    assert worker.on(TransferOffered(T, "r", 1, 6)) == [RefuseTransfer(T, "1 requests run here, the most that may")]


def test_an_offer_of_fewer_blocks_than_there_are_is_refused() -> None:
    worker = awaiting(3)
    assert worker.on(TransferOffered(T, "r", 1, 3)) == [RefuseTransfer(T, "3 blocks offered, 13 tokens have 4")]


@pytest.mark.parametrize(
    "changes",
    [{"num_blocks": 3}, {"token_ids": (1, 2, 3, 4)}, {"first_index": 2, "token_ids": (1, 2)}, {"first_index": 9}],
)
def test_what_has_arrived_and_does_not_fit_is_computed(changes: dict[str, int | tuple[int, ...]]) -> None:
    worker = awaiting(3)
    bring(decoding(), worker, **changes)
    worker.run()
    assert worker.tokens_of("r") == expected_output(PROMPT, MAX_TOKENS)[3:]
    assert held_and_leased(worker) == (0, 0)
