"""Host memory as a second tier of the prefix cache: a WorkerCore whose device is too small for what it has computed."""

from __future__ import annotations

import pytest

from engine.config import HostTierConfig, PullConfig
from engine.events import (
    Copied,
    CopyBlocks,
    CopyDirection,
    CopyLost,
    Effect,
    GrantTransfer,
    OpenTransfer,
    PullRequested,
    RequestPull,
    ReturnOffered,
    SendBlocks,
    TransferArrived,
    TransferClosed,
    TransferOffered,
)
from protos.types import Abort
from tests.engine.fake_worker import PEER, FakeWorker, T, config, digest, expected_output, generate, kinds, measured
from tests.engine.test_pull_source import hashes

HOST = HostTierConfig(num_blocks=12, s_per_token=0.5)
PULLS = PullConfig(s_per_token=0.5, deadline_s=100.0, max_returns=1)
PROMPT = list(range(18))  # four full blocks and a tail
OTHER = [50 + i for i in range(26)]  # six full blocks and a tail: with one for output, they need seven


def worker(host: HostTierConfig = HOST, num_blocks: int = 8, pulls: PullConfig | None = None) -> FakeWorker:
    if pulls is None:
        return measured(FakeWorker(num_blocks, host=host))
    return measured(FakeWorker(num_blocks, host=host, pulls=pulls))


def run(each: FakeWorker, name: str, prompt: list[int], returns_to: str = "") -> list[int]:
    """To its end, and what is copied then."""
    each.submit(generate(name, prompt, max_tokens=1, returns_to=returns_to))
    each.run()
    each.end_copies()
    each.run()
    assert each.tokens_of(name) == expected_output(prompt, 1)
    return each.tokens_of(name)


def spilled(host: HostTierConfig = HOST, pulls: PullConfig | None = None) -> FakeWorker:
    """The last three of PROMPT's four blocks are in host memory only."""
    each = worker(host, pulls=pulls)
    run(each, "before", PROMPT)
    run(each, "other", OTHER)
    return each


def copies(effects: list[Effect]) -> list[CopyBlocks]:
    return [effect for effect in effects if isinstance(effect, CopyBlocks)]


def num_cached_tokens(each: FakeWorker, name: str) -> int:
    account = each.last_output(name).account
    return -1 if account is None else account.num_cached_tokens


def submit(each: FakeWorker, name: str, prompt: list[int], max_tokens: int = 1) -> CopyBlocks:
    [load] = copies(each.submit(generate(name, prompt, max_tokens=max_tokens)))
    assert load.direction is CopyDirection.TO_DEVICE
    return load


def num_hits(each: FakeWorker, name: str) -> int:
    """Prompt tokens that were not computed."""
    return len(PROMPT) - each.num_computed[name]


def quiet(each: FakeWorker) -> None:
    ledger = each.core.ledger()
    assert ledger.balanced and (ledger.held, ledger.leased, ledger.host_leased) == (0, 0, 0), ledger


# --- saving ---------------------------------------------------------------------------------------------------------


def test_full_blocks_are_saved_when_their_request_ends_and_leased_meanwhile() -> None:
    each = worker()
    each.submit(generate("r", PROMPT, max_tokens=1))
    [save] = copies(each.run())
    assert save.direction is CopyDirection.TO_HOST and len(save.from_block_ids) == len(save.to_block_ids) == 4
    ledger = each.core.ledger()
    assert (ledger.leased, ledger.host_leased, ledger.host_cached, ledger.host_total) == (4, 4, 0, 12)
    each.end_copies()
    ledger = each.core.ledger()
    assert (ledger.leased, ledger.host_leased, ledger.cached, ledger.host_cached) == (0, 0, 4, 4)
    assert [each.host_kv[b][-1] for b in save.to_block_ids] == [digest(PROMPT[: 4 * (i + 1)]) for i in range(4)]


def test_what_is_there_is_not_saved_again() -> None:
    each = worker()
    run(each, "first", PROMPT)
    each.submit(generate("second", [*PROMPT, *range(70, 76)], max_tokens=1))
    [save] = copies(each.run())
    assert len(save.to_block_ids) == 2  # blocks 4 and 5 are new


def test_two_requests_that_end_together_save_their_prefix_once() -> None:
    each = worker()
    for name in ("a", "b"):
        each.submit(generate(name, PROMPT, max_tokens=1))
    assert sum(len(save.to_block_ids) for save in copies(each.run())) == 4


def test_no_more_blocks_than_the_limit_are_on_their_way_and_the_last_of_a_prefix_go_first() -> None:
    each = worker(HostTierConfig(num_blocks=12, s_per_token=0.5, max_saving_blocks=2))
    each.submit(generate("r", PROMPT, max_tokens=1))
    [first] = copies(each.run())
    assert len(first.to_block_ids) == 2 == each.core.ledger().host_leased
    [second] = copies(each.end_copy(first.copy_id))
    assert each.end_copy(second.copy_id) == []
    ends = [each.host_kv[b][-1] for copy in (second, first) for b in copy.to_block_ids]
    assert ends == [digest(PROMPT[: 4 * (i + 1)]) for i in range(4)]


def test_a_prefix_that_is_being_saved_does_not_drive_its_own_beginning_out() -> None:
    each = worker(HostTierConfig(num_blocks=4, s_per_token=0.5))
    for name, prompt in (("a", PROMPT[:9]), ("b", OTHER[:9]), ("c", PROMPT)):
        run(each, name, prompt)
    assert all(block_hash in each.core._host for block_hash in hashes(PROMPT))


@pytest.mark.parametrize("max_saving_blocks", [1, 2, 64])
def test_of_a_full_tier_the_least_recently_used_prefix_goes_its_last_block_first(max_saving_blocks: int) -> None:
    """However its parts came there."""
    each = worker(HostTierConfig(num_blocks=6, s_per_token=0.5, max_saving_blocks=max_saving_blocks))
    run(each, "first", PROMPT[:9])
    run(each, "second", PROMPT)
    third = [90 + i for i in range(13)]
    run(each, "third", third)
    assert [block_hash in each.core._host for block_hash in hashes(PROMPT)] == [True, True, True, False]
    assert all(block_hash in each.core._host for block_hash in hashes(third))


def test_the_limit_is_for_all_saves_together() -> None:
    each = worker(HostTierConfig(num_blocks=12, s_per_token=0.5, max_saving_blocks=3))
    for name, prompt in (("a", PROMPT[:9]), ("b", OTHER[:9])):
        each.submit(generate(name, prompt, max_tokens=1))
    assert [len(save.to_block_ids) for save in copies(each.run())] == [2, 1]
    each.end_copies()
    assert each.core.ledger().host_cached == 4


def test_what_was_evicted_before_its_turn_is_left_out() -> None:
    each = worker(HostTierConfig(num_blocks=12, s_per_token=0.5, max_saving_blocks=1))
    each.submit(generate("r", PROMPT, max_tokens=1))
    [save] = copies(each.run())
    each.submit(generate("other", OTHER, max_tokens=1))
    each.run()
    each.end_copies()
    assert save.copy_id not in each.copies
    assert [block_hash in each.core._host for block_hash in hashes(PROMPT)] == [False, False, False, True]
    assert all(block_hash in each.core._host for block_hash in hashes(OTHER))


def test_of_a_prefix_larger_than_the_tier_the_first_blocks_are_saved() -> None:
    each = worker(HostTierConfig(num_blocks=3, s_per_token=0.5))
    run(each, "r", PROMPT)
    assert [block_hash in each.core._host for block_hash in hashes(PROMPT)] == [True, True, True, False]


def test_what_goes_home_is_not_saved_here() -> None:
    each = worker(pulls=PULLS)
    each.submit(generate("r", PROMPT, max_tokens=1, returns_to="elsewhere"))
    assert copies(each.run()) == []


def test_a_save_that_is_lost_is_not_found() -> None:
    each = worker()
    each.submit(generate("r", PROMPT, max_tokens=1))
    [save] = copies(each.run())
    each.end_copy(save.copy_id, is_lost=True)
    assert each.core.ledger().host_cached == 0
    quiet(each)


# --- loading --------------------------------------------------------------------------------------------------------


def test_a_prefix_that_was_evicted_is_loaded_and_not_computed() -> None:
    each = spilled()
    load = submit(each, "again", PROMPT)
    assert each.begin_step() == [] and each.output is None  # it waits
    assert each.core.stats().num_waiting == 1
    each.end_copy(load.copy_id)
    each.run()
    assert each.tokens_of("again") == expected_output(PROMPT, 1)
    assert num_hits(each, "again") == 16 == num_cached_tokens(each, "again")
    account = each.last_output("again").account
    assert account is not None and account.pull_s > 0 and account.num_pulled_tokens == 0


def test_what_is_quicker_to_compute_is_not_loaded() -> None:
    each = spilled(HostTierConfig(num_blocks=12, s_per_token=1.0))  # as quick as computing
    assert copies(each.submit(generate("again", PROMPT, max_tokens=1))) == []
    each.run()
    assert each.tokens_of("again") == expected_output(PROMPT, 1)


def test_a_load_waits_behind_others_or_is_not_begun() -> None:
    """0.6 s a token and 1 s to compute it: behind one of three blocks, another of three comes too late."""
    each = worker(HostTierConfig(num_blocks=20, s_per_token=0.6), num_blocks=12)
    second = [30 + i for i in range(18)]
    for name, prompt in (("a", PROMPT), ("b", second), ("c", OTHER + OTHER[:14])):
        run(each, name, prompt)
    assert submit(each, "a2", PROMPT)
    assert copies(each.submit(generate("b2", second, max_tokens=1))) == []
    each.end_copies()
    each.run()
    assert each.tokens_of("b2") == expected_output(second, 1)


def test_loads_of_the_same_blocks_are_joined() -> None:
    each = spilled()
    load = submit(each, "a", PROMPT)
    assert each.submit(generate("b", PROMPT[:17], max_tokens=1)) == []
    assert each.core.stats().num_waiting == 2
    each.end_copy(load.copy_id)
    each.run()
    for name, prompt in (("a", PROMPT), ("b", PROMPT[:17])):
        assert each.tokens_of(name) == expected_output(prompt, 1)
        assert num_cached_tokens(each, name) == 16


def test_one_that_joined_loads_the_rest() -> None:
    each = worker(HostTierConfig(num_blocks=20, s_per_token=0.1), num_blocks=9)
    longer = [*PROMPT[:16], *range(70, 80)]
    run(each, "longer", longer)
    run(each, "other", OTHER + OTHER[:6])
    load = submit(each, "a", PROMPT[:9])
    assert each.submit(generate("b", longer, max_tokens=1)) == []
    [rest] = copies(each.end_copy(load.copy_id))
    assert rest.direction is CopyDirection.TO_DEVICE
    each.end_copy(rest.copy_id)
    each.run()
    assert num_cached_tokens(each, "b") == 24


def test_a_load_that_is_lost_is_computed() -> None:
    each = spilled()
    load = submit(each, "again", PROMPT)
    assert copies(each.end_copy(load.copy_id, is_lost=True)) == []
    each.run()
    assert each.tokens_of("again") == expected_output(PROMPT, 1)


def test_a_request_that_ends_leaves_its_load_to_end_alone() -> None:
    each = spilled()
    load = submit(each, "again", PROMPT)
    each.on(Abort("again", 1))
    assert each.core.stats().num_waiting == 0 and each.core.ledger().leased > 0
    assert each.end_copy(load.copy_id) == []
    quiet(each)
    assert each.submit(generate("third", PROMPT, max_tokens=1)) == []  # all of it is on the device
    each.run()
    assert num_cached_tokens(each, "third") == 16


def test_fencing_ends_requests_and_lets_copies_end() -> None:
    each = spilled()
    load = submit(each, "again", PROMPT)
    assert each.core.abort_all(9.0, "fenced") == []
    each.end_copy(load.copy_id)
    quiet(each)


def test_late_repeated_and_unknown_events_change_nothing() -> None:
    each = spilled()
    load = submit(each, "again", PROMPT)
    each.end_copy(load.copy_id)
    before = each.core.ledger()
    for copy_id in (load.copy_id, b"unknown"):
        assert each.on(Copied(copy_id)) == each.on(CopyLost(copy_id, "late")) == []
    assert each.core.ledger() == before


def test_what_finds_no_room_is_loaded_when_its_turn_has_come() -> None:
    each = spilled()
    each.submit(generate("big", OTHER, max_tokens=4))
    each.begin_step()
    assert copies(each.submit(generate("again", PROMPT, max_tokens=1))) == []
    each.end_step()
    begun = copies(each.run())  # to the end of the other one, which is saved then
    assert [one.direction for one in begun] == [CopyDirection.TO_HOST, CopyDirection.TO_DEVICE]
    assert each.core.stats().num_waiting == 1 and not each.tokens_of("again")
    each.end_copies()
    each.run()
    assert each.tokens_of("again") == expected_output(PROMPT, 1)
    assert num_hits(each, "again") == 16


def test_who_waits_for_a_load_in_its_turn_holds_nobody_up() -> None:
    each = spilled()
    each.submit(generate("big", OTHER, max_tokens=4))
    each.begin_step()
    each.submit(generate("again", PROMPT, max_tokens=1))
    each.submit(generate("new", [90, 91, 92], max_tokens=1))
    each.end_step()
    each.run()
    assert each.tokens_of("new") == expected_output([90, 91, 92], 1) and not each.tokens_of("again")
    each.on(Abort("again", 1))
    each.end_copies()
    quiet(each)


# --- with other workers ---------------------------------------------------------------------------------------------


def test_host_memory_comes_first_and_the_rest_from_home() -> None:
    each = spilled(pulls=PULLS)
    longer = [*PROMPT[:16], *range(70, 79)]
    [load] = each.submit(generate("again", longer, max_tokens=1, homes=["home"]))
    assert isinstance(load, CopyBlocks)
    [asked] = each.end_copy(load.copy_id)
    assert isinstance(asked, RequestPull) and asked.block_hashes == hashes(longer)[4:]


def test_others_are_served_from_both_memories() -> None:
    each = spilled(pulls=PULLS)
    effects = each.on(PullRequested(T, PEER, "r", 1, hashes(PROMPT)))
    assert kinds(effects) == ["OpenTransfer", "SendBlocks", "CommitTransfer"]
    opened, sent, _ = effects
    assert isinstance(opened, OpenTransfer) and isinstance(sent, SendBlocks)
    assert opened.num_blocks == len(sent.block_ids) == 4
    assert [block_id >= 8 for block_id in sent.block_ids] == [False, True, True, True]
    assert [each.row(b)[-1] for b in sent.block_ids] == [digest(PROMPT[: 4 * (i + 1)]) for i in range(4)]
    assert each.core.ledger().host_leased == 3
    assert each.on(PullRequested(T, PEER, "r", 1, hashes(PROMPT))) == []  # repeated
    each.on(TransferClosed(T))
    quiet(each)


def test_a_home_asks_only_for_what_it_has_in_neither_memory() -> None:
    each = spilled(pulls=PULLS)
    longer = [*PROMPT[:16], *range(70, 79)]
    assert each.on(ReturnOffered("other", "r", 1, hashes(PROMPT))) == []
    [asked] = each.on(ReturnOffered("other", "r", 1, hashes(longer)))
    assert isinstance(asked, RequestPull) and asked.block_hashes == hashes(longer)[4:]
    [granted] = each.on(TransferOffered(asked.pull_id, "r", 1, 2))
    assert isinstance(granted, GrantTransfer) and granted.num_held_blocks == 0
    for place, block_id in enumerate(granted.block_ids, start=4):
        each.kv[block_id] = [digest(longer[: 4 * place + i + 1]) for i in range(4)]
    [save] = copies(each.on(TransferArrived(asked.pull_id, 0, (), 1, 0.1, 0.0)))
    assert save.direction is CopyDirection.TO_HOST and save.from_block_ids == granted.block_ids
    each.end_copies()
    quiet(each)
    load = submit(each, "next turn", longer)
    each.end_copy(load.copy_id)
    each.run()
    assert each.tokens_of("next turn") == expected_output(longer, 1)
    assert num_cached_tokens(each, "next turn") == 24


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_blocks", 0), ("max_saving_blocks", 0), ("s_per_token", -1.0), ("s_per_token", float("nan"))],
)
def test_settings_that_make_no_sense_are_refused(name: str, value: float) -> None:
    values = {"num_blocks": 4, "s_per_token": 0.1, name: value}
    with pytest.raises(ValueError, match=name):
        HostTierConfig(**values)  # type: ignore[arg-type]


def test_it_needs_the_prefix_cache() -> None:
    with pytest.raises(ValueError, match="host must be None"):
        config(host=HOST, enable_prefix_caching=False)
