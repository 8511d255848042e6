"""The taking side of a pull: a WorkerCore that asks the homes of a prefix for what it lacks."""

from __future__ import annotations

import pytest

from engine.config import PullConfig
from engine.events import (
    AbortTransfer,
    Effect,
    Event,
    GrantTransfer,
    PullRefused,
    RefuseTransfer,
    RequestPull,
    TransferArrived,
    TransferLost,
    TransferOffered,
)
from protos.types import Abort, ServingMode, WorkerAccount
from tests.engine.fake_worker import FakeWorker, config, expected_output, generate, held_and_leased, measured
from tests.engine.test_pull_source import hashes

PULLS = PullConfig(s_per_token=0.5, base_s=1.0, deadline_s=20.0)
LONG = list(range(14))  # three full blocks and a tail
HOMES = ("home", "other")


def puller(num_blocks: int = 12, pulls: PullConfig = PULLS, max_num_seqs: int = 4) -> FakeWorker:
    return measured(FakeWorker(num_blocks, "me", pulls=pulls, max_num_seqs=max_num_seqs))


def submit(worker: FakeWorker, name: str = "r", prompt: list[int] = LONG, homes: tuple[str, ...] = HOMES) -> bytes:
    """The id of the pull that it asks for."""
    [asked] = worker.submit(generate(name, prompt, homes=homes))
    return asked_pull(asked)


def asked_pull(effect: Effect) -> bytes:
    assert isinstance(effect, RequestPull), effect
    return effect.pull_id


def offer(worker: FakeWorker, pull_id: bytes, num_blocks: int = 3) -> GrantTransfer:
    [granted] = worker.on(TransferOffered(pull_id, "r", 1, num_blocks))
    assert isinstance(granted, GrantTransfer)
    return granted


def arrive(worker: FakeWorker, granted: GrantTransfer, first_block: int = 0, prompt: list[int] = LONG) -> list[Effect]:
    """Write the blocks [first_block, ...) of the prompt that were granted, as the transfer would."""
    home = FakeWorker()
    home.submit(generate("h", prompt))
    home.begin_step()
    assert home.output is not None
    table = list(home.output.scheduled[0].block_table)
    home.end_step()
    start = first_block + granted.num_held_blocks
    for place, block in enumerate(granted.block_ids, start=start):
        worker.kv[block] = list(home.kv[table[place]])
    return worker.on(TransferArrived(granted.transfer_id, 0, (), 12, 0.5, 0.0))


def account(worker: FakeWorker, name: str = "r") -> WorkerAccount:
    found = worker.last_output(name).account
    assert found is not None and worker.tokens_of(name) == expected_output(prompt_of(worker, name), 4)
    return found


def prompt_of(worker: FakeWorker, name: str) -> list[int]:
    tokens = next(each for output in reversed(worker.outputs) for each in output.scheduled if each.request_id == name)
    return list(tokens.token_ids[: tokens.num_prompt_tokens])


def test_a_pulled_prefix_is_found_in_the_cache_when_the_request_starts() -> None:
    worker = puller()
    [asked] = worker.submit(generate("r", LONG, homes=HOMES))
    assert asked == RequestPull(b"me pulls 1", "home", "r", 1, hashes(LONG))
    assert worker.begin_step() == [] and worker.output is None
    assert worker.core.stats().num_waiting == 1 and worker.core.stats().num_pending_prefill_tokens == 14
    granted = offer(worker, b"me pulls 1")
    assert (granted.num_held_blocks, len(granted.block_ids)) == (0, 3)
    assert held_and_leased(worker) == (0, 3)
    assert arrive(worker, granted) == []
    assert held_and_leased(worker) == (0, 0) and worker.core.ledger().cached == 3
    worker.run()
    done = account(worker)
    assert (done.num_cached_tokens, done.num_pulled_tokens, worker.num_computed["r"]) == (0, 12, 2 + 3)
    assert (done.mode, done.pull_s, done.queued_s, done.num_failed_pulls) == (ServingMode.LOCAL, 1.0, 2.0, 0)


def test_it_asks_for_what_it_lacks_only_and_always_computes_a_token() -> None:
    worker = puller()
    worker.submit(generate("before", LONG[:6], max_tokens=1))
    worker.run()
    [asked] = worker.submit(generate("r", LONG[:12], homes=HOMES))
    assert isinstance(asked, RequestPull) and asked.block_hashes == hashes(LONG)[1:2]  # not the last of 12 tokens
    granted = offer(worker, asked.pull_id, 1)
    assert len(granted.block_ids) == 1 and held_and_leased(worker) == (0, 2)
    arrive(worker, granted, first_block=1)
    worker.run()
    assert (account(worker).num_cached_tokens, account(worker).num_pulled_tokens) == (4, 4)


def test_others_go_on_while_one_waits_and_it_takes_its_place_by_arrival() -> None:
    worker = puller(max_num_seqs=1)
    pull_id = submit(worker)
    worker.submit(generate("second", [50, 51], max_tokens=4))
    worker.submit(generate("third", [60, 61], max_tokens=4))
    worker.step()
    assert [each.request_id for each in worker.outputs[-1].scheduled] == ["second"]
    arrive(worker, offer(worker, pull_id))
    worker.run()
    order = [each.request_id for output in worker.outputs for each in output.scheduled]
    assert order.index("r") < order.index("third")


@pytest.mark.parametrize(
    ("pulls", "speed", "homes"),
    [
        (PullConfig(s_per_token=1.0), 1.0, HOMES),  # as dear as computing
        (PullConfig(s_per_token=0.1, base_s=12.0), 1.0, HOMES),
        (PULLS, 0.0, HOMES),  # nothing is known of prefill
        (PULLS, 1.0, ()),
        (PULLS, 1.0, ("me",)),
    ],
)
def test_it_computes_where_a_pull_is_not_worth_it(pulls: PullConfig, speed: float, homes: tuple[str, ...]) -> None:
    worker = FakeWorker(12, "me", pulls=pulls)
    if speed:
        measured(worker, speed)
    assert worker.submit(generate("r", LONG, homes=homes)) == []
    worker.run()
    assert account(worker).num_pulled_tokens == 0


def test_the_other_home_is_asked_where_the_first_refuses_and_then_it_computes() -> None:
    worker = puller()
    first = submit(worker, homes=("me", "home", "other"))
    [asked] = worker.on(PullRefused(first, "nothing here"))
    assert isinstance(asked, RequestPull)
    assert (asked.source_worker_id, asked.block_hashes) == ("other", hashes(LONG)) and asked.pull_id != first
    assert worker.on(PullRefused(first, "nothing here")) == []  # repeated
    assert worker.on(PullRefused(asked.pull_id, "nothing here")) == []
    worker.run()
    assert (account(worker).num_failed_pulls, account(worker).num_pulled_tokens) == (2, 0)


@pytest.mark.parametrize("granted_first", [False, True])
def test_a_lost_pull_is_a_recompute(granted_first: bool) -> None:
    worker = puller()
    pull_id = submit(worker)
    if granted_first:
        offer(worker, pull_id)
    assert worker.on(TransferLost(pull_id, "link lost")) == []
    assert held_and_leased(worker) == (0, 0)
    worker.run()
    assert (account(worker).num_failed_pulls, account(worker).mode) == (1, ServingMode.LOCAL)


@pytest.mark.parametrize("granted_first", [False, True])
def test_a_late_pull_is_given_up_and_its_blocks_stay_leased_until_they_are_quiet(granted_first: bool) -> None:
    worker = puller()
    pull_id = submit(worker)
    if granted_first:
        offer(worker, pull_id)
    assert worker.core.deadline == 20.0
    worker.now = 18.0
    assert worker.begin_step() == [] and worker.output is None
    assert worker.begin_step() == [AbortTransfer(pull_id, "late")]
    assert worker.output is not None and worker.core.deadline is None
    worker.end_step()
    assert held_and_leased(worker)[1] == (3 if granted_first else 0)
    worker.on(TransferLost(pull_id, "aborted"))
    assert held_and_leased(worker)[1] == 0
    worker.run()
    assert (account(worker).num_failed_pulls, account(worker).pull_s) == (1, 20.0)


@pytest.mark.parametrize("granted_first", [False, True])
@pytest.mark.parametrize("arrives", [False, True])
def test_abort_while_the_pull_is_open(granted_first: bool, arrives: bool) -> None:
    worker = puller()
    pull_id = submit(worker)
    if granted_first:
        offer(worker, pull_id)
    assert worker.on(Abort("r", 1)) == [AbortTransfer(pull_id, "aborted")]
    assert held_and_leased(worker) == (0, 3 if granted_first else 0)  # still written to
    last: Event = TransferArrived(pull_id, 0, (), 1, 0.0, 0.0) if arrives else TransferLost(pull_id, "aborted")
    assert worker.on(last) == []
    assert held_and_leased(worker) == (0, 0)
    assert worker.run() == [] and worker.core.stats().num_waiting == 0


def test_an_offer_after_the_request_has_gone_is_refused() -> None:
    worker = puller()
    pull_id = submit(worker)
    worker.on(Abort("r", 1))
    [refused] = worker.on(TransferOffered(pull_id, "r", 1, 3))
    assert isinstance(refused, RefuseTransfer)


@pytest.mark.parametrize(("num_blocks", "reason"), [(0, "0 blocks offered, 3 were"), (4, "4 blocks offered, 3 were")])
def test_an_offer_of_what_was_not_asked_for_is_refused(num_blocks: int, reason: str) -> None:
    worker = puller()
    [refused] = worker.on(TransferOffered(submit(worker), "r", 1, num_blocks))
    assert isinstance(refused, RefuseTransfer) and refused.reason.startswith(reason)
    worker.run()
    assert account(worker).num_failed_pulls == 1


def test_without_room_the_offer_is_refused_with_the_numbers() -> None:
    worker = puller(num_blocks=5)
    pull_id = submit(worker)
    worker.submit(generate("running", range(30, 39), max_tokens=9))
    worker.step()
    [refused] = worker.on(TransferOffered(pull_id, "r", 1, 2))
    reason = "2 blocks needed behind 0 cached ones, 2 of 5 available, 1 of them spoken for"
    assert refused == RefuseTransfer(pull_id, reason)
    worker.run()
    assert account(worker).num_failed_pulls == 1


def test_an_offer_is_refused_where_the_blocks_before_it_were_evicted_meanwhile() -> None:
    worker = puller(num_blocks=6)
    worker.submit(generate("before", LONG[:6], max_tokens=1))
    worker.run()
    pull_id = submit(worker)  # for all but the first block
    worker.submit(generate("greedy", range(30, 52), max_tokens=2))
    worker.run()
    [refused] = worker.on(TransferOffered(pull_id, "r", 1, 1))
    assert isinstance(refused, RefuseTransfer) and "behind 1 cached ones" in refused.reason
    worker.run()
    assert account(worker).num_pulled_tokens == 0


def test_what_was_computed_meanwhile_is_not_written_again() -> None:
    worker = puller()
    worker.submit(generate("before", LONG[:9], max_tokens=1))
    worker.begin_step()
    pull_id = submit(worker)
    worker.end_step()
    granted = offer(worker, pull_id)
    assert (granted.num_held_blocks, len(granted.block_ids)) == (2, 1)
    arrive(worker, granted)
    worker.run()
    assert (account(worker).num_cached_tokens, account(worker).num_pulled_tokens) == (8, 4)


def test_a_second_request_joins_the_pull_and_asks_its_own_home_for_the_rest() -> None:
    worker = puller(num_blocks=16)
    pull_id = submit(worker, prompt=LONG[:9])
    assert worker.submit(generate("joined", LONG, homes=("its home",))) == []
    assert worker.core.stats().num_waiting == 2
    [asked] = arrive(worker, offer(worker, pull_id, 2))
    assert isinstance(asked, RequestPull)
    assert (asked.source_worker_id, asked.request_id, asked.block_hashes) == ("its home", "joined", hashes(LONG)[2:])
    [granted] = worker.on(TransferOffered(asked.pull_id, "joined", 1, 1))
    assert isinstance(granted, GrantTransfer)
    arrive(worker, granted, first_block=2)
    worker.run()
    assert (account(worker).num_pulled_tokens, account(worker, "joined").num_pulled_tokens) == (8, 12)


def test_one_that_joined_counts_only_the_blocks_that_it_shares() -> None:
    worker = puller(num_blocks=16)
    pull_id = submit(worker)
    worker.submit(generate("joined", [*LONG[:5], 70, 71, 72, 73], homes=()))
    assert arrive(worker, offer(worker, pull_id)) == []
    worker.run()
    assert (account(worker).num_pulled_tokens, account(worker, "joined").num_pulled_tokens) == (12, 4)


def test_the_pull_goes_on_for_those_that_joined_when_its_asker_ends() -> None:
    worker = puller()
    pull_id = submit(worker)
    worker.submit(generate("joined", LONG, homes=HOMES))
    assert worker.on(Abort("r", 1)) == []
    arrive(worker, offer(worker, pull_id))
    worker.run()
    assert account(worker, "joined").num_pulled_tokens == 12


def test_those_that_joined_ask_their_own_homes_when_nothing_came() -> None:
    worker = puller()
    pull_id = submit(worker, homes=("home",))
    assert worker.submit(generate("joined", LONG, homes=("its home",))) == []
    [asked] = worker.on(PullRefused(pull_id, "nothing here"))
    assert isinstance(asked, RequestPull) and asked.source_worker_id == "its home"
    worker.step()
    assert [each.request_id for each in worker.outputs[-1].scheduled] == ["r"]  # it waits for nobody any more


def test_repeated_and_late_events_change_nothing() -> None:
    worker = puller()
    pull_id = submit(worker)
    assert worker.on(TransferArrived(pull_id, 0, (), 1, 0.0, 0.0)) == []  # nothing was granted
    granted = offer(worker, pull_id)
    assert worker.on(TransferOffered(pull_id, "r", 1, 3)) == []
    assert worker.on(PullRefused(pull_id, "late")) == []
    assert held_and_leased(worker) == (0, 3)
    arrive(worker, granted)
    for event in (TransferLost(pull_id, "late"), PullRefused(pull_id, "late")):
        assert worker.on(event) == []
    worker.run()
    assert account(worker).num_pulled_tokens == 12


def test_a_pulled_block_that_was_evicted_before_its_turn_is_computed() -> None:
    worker = puller(num_blocks=6)
    pull_id = submit(worker)
    arrive(worker, offer(worker, pull_id))
    worker.submit(generate("urgent", range(30, 52), max_tokens=2, priority=1))
    worker.run()
    assert account(worker).num_pulled_tokens == 0 and worker.num_computed["r"] == 14 + 3


def test_bad_knobs_are_named() -> None:
    with pytest.raises(ValueError, match="s_per_token must not be negative, got -1"):
        PullConfig(s_per_token=-1)
    with pytest.raises(ValueError, match="deadline_s must be above 0, got 0"):
        PullConfig(s_per_token=1, deadline_s=0)
    with pytest.raises(ValueError, match="enable_prefix_caching is False"):
        config(pulls=PULLS, enable_prefix_caching=False)


def test_a_pull_takes_no_step_of_anybody_and_nothing_of_it_is_computed() -> None:
    """The same steps with the same work for the others, whether or not one waits for its KV meanwhile."""
    alone, beside = puller(24), puller(24)
    pull_id = submit(beside)
    for worker in (alone, beside):
        worker.submit(generate("other", range(30, 55), max_tokens=6))
    granted = offer(beside, pull_id)
    for _ in range(4):
        alone.step()
        beside.step()
    assert [output.num_batched_tokens for output in beside.outputs] == [o.num_batched_tokens for o in alone.outputs]
    arrive(beside, granted)
    beside.run()
    assert beside.num_computed["other"] == 25 + 5 and beside.num_computed["r"] == 14 - 12 + 3
    assert account(beside).num_pulled_tokens == 12


def test_what_came_of_pulls_is_counted_once_for_all_that_waited() -> None:
    worker = puller(num_blocks=24)
    done = submit(worker)
    worker.submit(generate("joined", LONG, homes=HOMES))
    arrive(worker, offer(worker, done))
    other = list(range(20, 34))
    first = submit(worker, "refused", other)
    [asked] = worker.on(PullRefused(first, "nothing here"))
    worker.on(TransferLost(asked_pull(asked), "link lost"))
    submit(worker, "late", list(range(40, 54)))
    worker.now = 50.0
    worker.run()
    stats = worker.core.stats().pulls
    assert stats.num_tokens == 12
    assert {outcome.value: num for outcome, num in stats.num_by_outcome} == {
        "done": 1, "refused": 1, "lost": 1, "late": 1,
    }  # fmt: skip


def test_pulls_are_judged_by_what_the_last_ones_took() -> None:
    """By what is assumed at first, 12 tokens come sooner than the 12 s in which they are computed."""
    worker = puller(pulls=PullConfig(deadline_s=100.0))
    pull_id = submit(worker)
    worker.now += 100.0
    worker.begin_step()
    worker.end_step()
    worker.on(TransferLost(pull_id, "given up"))
    assert worker.submit(generate("next", LONG[::-1], homes=HOMES)) == [], "a fifth of 100 s weighs more"
