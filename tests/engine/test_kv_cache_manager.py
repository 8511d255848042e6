from __future__ import annotations

import pytest

from engine.config import SchedulerConfig
from engine.kv_cache_manager import KVCacheManager
from engine.request import Request
from protos.block_hash import chain_hashes
from tests.engine.fake_worker import KEY, config, generate


def make(num_blocks: int = 8, **changes: int | bool) -> KVCacheManager:
    return KVCacheManager(config(**changes), num_blocks, KEY, "model")


def request(num_tokens: int, salt: bytes = b"") -> Request:
    return Request(generate("r", range(num_tokens), salt=salt), 0, 0.0)


def compute(manager: KVCacheManager, each: Request, num_tokens: int) -> None:
    assert manager.allocate_slots(each, num_tokens)
    each.num_computed_tokens += num_tokens
    manager.cache_full_blocks(each)


def test_block_size_must_be_a_multiple_of_the_hash_block_size() -> None:
    with pytest.raises(ValueError, match="block_size 6 is not a multiple of hash_block_size 4"):
        SchedulerConfig(max_model_len=10, block_size=6, hash_block_size=4)
    with pytest.raises(ValueError, match="max_num_seqs must be at least 1, got 0"):
        SchedulerConfig(max_model_len=10, max_num_seqs=0)


def test_slots_grow_block_by_block_and_all_or_nothing() -> None:
    manager, each = make(num_blocks=3), request(20)
    assert manager.allocate_slots(each, 5)
    assert len(manager.block_table(each)) == 2
    each.num_computed_tokens = 5
    assert manager.allocate_slots(each, 3)
    assert len(manager.block_table(each)) == 2
    assert not manager.allocate_slots(each, 8)
    assert len(manager.block_table(each)) == 2
    assert manager.ledger().free == 1


def test_hits_are_full_blocks_and_leave_a_token_to_compute() -> None:
    manager, first = make(), request(8)
    compute(manager, first, 8)
    assert manager.get_computed_blocks(request(8)) == manager.block_table(first)[:1]
    assert manager.get_computed_blocks(request(9)) == manager.block_table(first)
    assert manager.get_computed_blocks(request(4)) == []


def test_a_partial_block_is_cached_only_when_it_is_full() -> None:
    manager, first = make(), request(9)
    compute(manager, first, 7)
    assert len(manager.get_computed_blocks(request(12))) == 1
    compute(manager, first, 1)
    assert len(manager.get_computed_blocks(request(12))) == 2


def test_another_salt_shares_nothing() -> None:
    manager, first = make(), request(8)
    compute(manager, first, 8)
    assert manager.get_computed_blocks(request(9, salt=b"tenant")) == []


def test_without_prefix_caching_there_are_no_hits_and_no_cached_blocks() -> None:
    manager, first = make(enable_prefix_caching=False), request(8)
    compute(manager, first, 8)
    assert manager.get_computed_blocks(request(9)) == []
    manager.free(first)
    assert manager.ledger().free == 8


def test_the_chain_grows_and_equals_the_chain_from_scratch() -> None:
    manager, each = make(), request(8)
    manager.get_computed_blocks(each)
    early = list(each.hash_links)
    each.token_ids.extend([7] * 5)
    manager.get_computed_blocks(each)
    assert each.hash_links[: len(early)] == early
    fresh = request(8)
    fresh.token_ids.extend([7] * 5)
    manager.get_computed_blocks(fresh)
    assert each.hash_links == fresh.hash_links == chain_hashes(each.token_ids, 2, b"", KEY, known=early)


def test_idle_hits_are_not_counted_as_room() -> None:
    manager, first = make(num_blocks=3), request(12)
    compute(manager, first, 12)
    manager.free(first)
    hits = manager.get_computed_blocks(request(12))
    assert len(hits) == 2
    second = request(12)
    assert not manager.allocate_slots(second, 8, hits)  # two hits and two new blocks are four
    assert manager.ledger().cached == 3
    assert manager.allocate_slots(second, 4, hits)
    assert manager.block_table(second)[:2] == hits


def test_leased_blocks_outlive_their_request() -> None:
    manager, each = make(), request(8)
    compute(manager, each, 8)
    blocks = list(manager.block_table(each))
    manager.lease(b"t", blocks)
    assert (manager.ledger().held, manager.ledger().leased) == (2, 0)
    manager.free(each)
    assert (manager.ledger().held, manager.ledger().leased) == (0, 2)
    manager.release_lease(b"t")
    manager.release_lease(b"t")
    ledger = manager.ledger()
    assert (ledger.cached, ledger.free, ledger.balanced) == (2, 6, True)


def test_a_grant_pins_what_is_here_and_adopting_makes_it_the_table() -> None:
    manager, first = make(num_blocks=4), request(8)
    compute(manager, first, 8)
    held = list(manager.block_table(first))
    manager.free(first)
    each = request(10)
    assert manager.grant(b"t", each, 3, 10, num_spare_blocks=2) is None
    num_held, to_write = manager.grant(b"t", each, 3, 10, num_spare_blocks=1) or (0, [])
    assert (num_held, len(to_write)) == (2, 1)
    assert (manager.ledger().leased, manager.ledger().free) == (3, 1)
    manager.adopt(each, b"t")
    manager.release_lease(b"t")
    assert manager.block_table(each) == [*held, *to_write]
    assert manager.ledger().held == 3


def test_a_grant_may_hold_the_whole_prompt() -> None:
    manager, first = make(), request(8)
    compute(manager, first, 8)
    assert manager.grant(b"t", request(8), 2, 8, 0) == (2, [])


def test_the_ledger_notices_a_block_lost_and_a_block_used_twice() -> None:
    manager, each = make(), request(8)
    compute(manager, each, 8)
    assert manager.ledger().balanced
    table = manager.block_table(each)
    lost = table.pop()
    assert not manager.ledger().balanced
    table.append(table[0])
    assert not manager.ledger().balanced
    table[-1] = lost
    assert manager.ledger().balanced
    manager._pool.free.append(lost)
    assert not manager.ledger().balanced
